"""The one error about what a user gave: an argument, a file, data; and its like about a run that fails."""


class InputError(ValueError):
    """Says what is wrong with a user's input: which argument or file, its value, and what was expected.

    The command line prints it as a sentence. Every other error is a fault of a program and keeps its traceback.
    """


def require_at_least(minimum: float, **values: float | None) -> None:
    """Checks arguments that have a least value; ``None``, which ``null`` in a configuration gives, has none.

    Raises:
        InputError: Naming the first that is less, or NaN.
    """
    for name, value in values.items():
        if value is None or not value >= minimum:
            raise InputError(f"{name} must be at least {minimum}, got {value}")


def require_kind(kind: type[object], **values: object) -> None:
    """Checks arguments that are to be objects of a class, and not, say, the settings of one.

    Raises:
        InputError: Naming the first that is something else.
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            raise InputError(f"{name} must be of the class {kind.__name__}, got {value!r}")


class TrainingFailureError(InputError):
    """A run that cannot get anywhere: the message names the signature, the cause and the remedy."""
