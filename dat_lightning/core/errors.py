"""The one error about what a user gave: an argument, a file, data; and its like about a run that fails."""


class InputError(ValueError):
    """Says what is wrong with a user's input: which argument or file, its value, and what was expected.

    The command line prints it as a sentence. Every other error is a fault of a program and keeps its traceback.
    """


class TrainingFailureError(InputError):
    """A run that cannot get anywhere: the message names the signature, the cause and the remedy."""
