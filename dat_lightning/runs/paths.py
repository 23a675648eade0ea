"""Paths among settings: ``~`` is a home folder everywhere, and what a run writes and reads is in one place."""

import os
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from jsonargparse import Namespace

from dat_lightning.core.errors import InputError

# Settings whose paths Lightning gives to fsspec.
_PLACES = ("dirpath", "default_root_dir", "save_dir", "ckpt_path")


def at_home(path: str | Path) -> str:
    """Returns a path that begins with the home folder in place of ``~`` or ``~user``, if there is such a user."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises for a name that nobody has


def with_home(settings: Any, name: str = "") -> Any:
    """Returns parsed settings in which each text that begins with ``~`` or ``~user`` begins with the home folder.

    Args:
        settings: Of a parser, or a part of them.
        name: Its dotted name.

    Raises:
        InputError: If a place of a run is several, chained by ``::``, or a URL of a kind that nothing here reads.
    """
    if isinstance(settings, Namespace):
        vars(settings).update({key: with_home(value, f"{name}.{key}") for key, value in vars(settings).items()})
        return settings
    if isinstance(settings, dict):
        return {key: with_home(value, f"{name}.{key}") for key, value in settings.items()}
    if isinstance(settings, list):
        return [with_home(value, f"{name}.{place}") for place, value in enumerate(settings)]
    if not isinstance(settings, str | Path):
        return settings
    if name.rpartition(".")[2] in _PLACES:
        _check_place(str(settings), name.lstrip("."))
    return type(settings)(at_home(settings)) if str(settings).startswith("~") else settings


def _check_place(place: str, name: str) -> None:
    if "::" in place:
        raise InputError(f"{name} must be one path or URL, got {place!r}: '::' chains file systems")
    protocol, mark, _ = place.partition("://")
    if not mark or protocol in ("http", "https"):  # which torch reads itself
        return
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise InputError(f"{name} is {place!r}, which cannot be reached from here: {error}") from error
