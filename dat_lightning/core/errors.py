"""The one error about what a user gave: an argument, a file, data; and its like about a run that fails."""

import math
from numbers import Integral


class InputError(ValueError):
    """Says what is wrong with a user's input: which argument or file, its value, and what was expected.

    The command line prints it as a sentence. Every other error is a fault of a program and keeps its traceback.
    """


_LONGEST = 2000  # characters of a message
_LONGEST_VALUE = 200
_UNCOUNTED = 2**62


def printable(text: str) -> str:
    """Returns text as a terminal may have it: without control characters, which a file can have in any name, and short.

    A sequence of such characters moves the cursor, or sets the terminal's title.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: _LONGEST + 1])
    return shown if len(text) <= _LONGEST else f"{shown}…"


def require_at_least(minimum: float, **values: float | None) -> None:
    """Checks arguments that have a least value; ``None``, which ``null`` in a configuration gives, has none.

    Raises:
        InputError: Naming the first that is less, or NaN.
    """
    for name, value in values.items():
        if value is None or not value >= minimum:
            raise InputError(f"{name} must be at least {minimum}, got {value}")


def require_finite(minimum: float, **values: float | None) -> None:
    """Checks numbers that a loss is multiplied by, or noise: finite, and not less than a least one.

    Raises:
        InputError: Naming the first that is something else.
    """
    for name, value in values.items():
        if value is None or not minimum <= value < math.inf:
            raise InputError(f"{name} must be a finite number of at least {minimum}, got {value}")


def require_counts(minimum: int, **values: object) -> None:
    """Checks numbers that count something: whole, and not less than a least one.

    Raises:
        InputError: Naming the first that is something else.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not minimum <= int(value) < _UNCOUNTED:
            raise InputError(f"{name} must be a whole number of at least {minimum}, got {str(value)[:80]}")


def require_choice(choices: tuple[object, ...], **values: object) -> None:
    """Checks arguments that are one of a few, as ``get_args`` of a ``Literal`` gives them.

    Raises:
        InputError: Naming the first that is none of them.
    """
    for name, value in values.items():
        if value not in choices:
            raise InputError(f"{name} must be one of {choices}, got {value!r}")


def require_kind(kind: type[object], **values: object) -> None:
    """Checks arguments that are to be objects of a class, and not, say, the settings of one.

    Raises:
        InputError: Naming the first that is something else.
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            # Arrays have many lines.
            found = " ".join(repr(value).split())
            raise InputError(f"{name} must be of the class {kind.__name__}, got {found[:_LONGEST_VALUE]}")


class TrainingFailureError(InputError):
    """A run that cannot get anywhere: the message names the signature, the cause and the remedy."""
