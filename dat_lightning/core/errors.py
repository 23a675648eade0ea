"""The one error about what a user gave: an argument, a file, data."""


class InputError(ValueError):
    """Says what is wrong with a user's input: which argument or file, its value, and what was expected.

    The command line prints it as a sentence. Every other error is a fault of a program and keeps its traceback.
    """
