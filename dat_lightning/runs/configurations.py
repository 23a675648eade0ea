"""Configuration files that say only what differs: ``base`` names the file that a file goes on top of."""

import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader

from dat_lightning.core.errors import InputError


def with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Returns the contents of a file and of those below it, the lowest first, without the key ``base``.

    A base is named relative to the file that names it.

    Raises:
        FileNotFoundError: If a base is missing.
        InputError: If bases lead in a circle, or a file is no YAML or no mapping.
    """
    files: dict[Path, dict[str, Any]] = {}
    while True:
        if path in files:
            raise InputError(f"{path} is its own base: {' on top of '.join(map(str, [*files, path]))}")
        if files and not path.is_file():
            raise FileNotFoundError(f"{next(reversed(files))} names a base that is missing: {path}")
        contents = _contents(path)
        if not isinstance(contents, dict):
            raise InputError(f"{path} must be a mapping of settings, got {type(contents).__name__}")
        files[path] = contents
        base = contents.pop("base", None)
        if base is None:
            return list(reversed(files.items()))
        if not isinstance(base, str):
            raise InputError(f"{path}: base must be the name of one file, got {base!r}")
        path = Path(os.path.normpath(path.parent / base))


def _contents(path: Path) -> Any:
    try:
        return get_loader("yaml")(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(f"{path}{place} is no YAML: {reason}") from error


def with_changed_callbacks(contents: dict[str, Any], below: Namespace, file: Path) -> dict[str, Any]:
    """Returns a file's contents with the callbacks of its base in full, if it only changes arguments of some.

    Lists are replaced as a whole; but a mapping in the place of this one names callbacks by their class:
    ``callbacks: {PGDSampler: {num_steps: [20]}}``.

    Args:
        contents: Of the file.
        below: What its base says.
        file: Its name, for messages.

    Raises:
        InputError: If there is not exactly one callback of a class.
    """
    trainer = contents.get("trainer")
    changes = trainer.get("callbacks") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(changes, dict) or "class_path" in changes:
        return contents
    entries = below.get("trainer.callbacks")
    callbacks = [entry.as_dict() for entry in entries] if isinstance(entries, list) else []
    for name, arguments in changes.items():
        found = [callback for callback in callbacks if callback["class_path"].rpartition(".")[2] == name]
        if len(found) != 1:
            raise InputError(
                f"{file}: trainer.callbacks changes {name}, of which its base has {len(found)}, not one; the files of"
                " another --config are no base"
            )
        if not isinstance(arguments, dict):
            raise InputError(f"{file}: trainer.callbacks.{name} must be a mapping of arguments, got {arguments!r}")
        found[0]["init_args"] = {**found[0].get("init_args", {}), **arguments}
    return {**contents, "trainer": {**trainer, "callbacks": callbacks}}
