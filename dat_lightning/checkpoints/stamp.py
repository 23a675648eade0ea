"""The number of a checkpoint's format, so that a file of a newer version is told from a damaged one."""

from collections.abc import Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FORMAT = 1
"""Number of the format that this version writes; it grows when older versions would misread a checkpoint."""

ENTRY = "dat_lightning"


def stamp(checkpoint: MutableMapping[str, Any]) -> None:
    """Writes the number of the format and the version of the package into a checkpoint."""
    checkpoint[ENTRY] = {"format": FORMAT, "version": _version()}


def check_stamp(checkpoint: Mapping[str, Any]) -> None:
    """Checks that this version can read a checkpoint; one without a stamp is older than stamps are.

    Raises:
        ValueError: If a newer version wrote it.
    """
    found = checkpoint.get(ENTRY)
    number = found.get("format") if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"the checkpoint has format {number}, of dat_lightning {found.get('version')}; this is version"
            f" {_version()}, which reads formats up to {FORMAT}: install that version or a newer one"
        )


def _version() -> str:
    try:
        return version("dat-lightning")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
