"""Configuration files that say only what differs: ``base`` names the file that a file goes on top of."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from dat_lightning.core.errors import InputError
from dat_lightning.runs.paths import at_home

# Aliases let a few lines stand for more values than any memory holds; nobody nests settings as deeply.
_MAX_VALUES = 100_000
_MAX_DEPTH = 100


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
        contents = read_yaml(path)
        if not isinstance(contents, dict):
            raise InputError(f"{path} must be a mapping of settings, got {type(contents).__name__}")
        files[path] = contents
        base = contents.pop("base", None)
        if base is None:
            return list(reversed(files.items()))
        if not isinstance(base, str):
            raise InputError(f"{path}: base must be the name of one file, got {base!r}")
        path = Path(os.path.normpath(named_by(path, base)))


def named_by(file: Path, name: str) -> Path:
    """Returns the file that another one names, relative to itself or to a home folder."""
    return file.parent / at_home(name)


def read_yaml(path: Path, load: Callable[[str], Any] | None = None) -> Any:
    """Returns what a file in YAML says.

    Args:
        path: The file.
        load: What makes values of the text; by default as the command line does, for which 1e-3 is a number.

    Raises:
        InputError: If it is no text in UTF-8, no YAML, has a key twice in one mapping, or stands for too much.
    """
    try:
        return _checked(load or get_loader("yaml"))(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(f"{path}{place} is no YAML: {reason}") from error


def _checked(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of YAML that refuses what others let pass: a key twice in one mapping, of which the last would count."""

    def checked_load(text: str) -> Any:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        _count(node, {}, max(_MAX_VALUES, len(text)))
        try:
            return load(text)
        except ValueError as error:  # 2001-99-99 is no date
            raise yaml.YAMLError(str(error)) from error

    return checked_load


def _count(node: yaml.Node | None, known: dict[int, int], limit: int, depth: int = 0) -> int:
    """The number of values that a node stands for, once for each alias of it."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = limit  # what holds itself has no end
    parts: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys: dict[tuple[str, str], yaml.Node] = {}
        for key, value in node.value:
            first = keys.setdefault((key.tag, str(key.value)), key)
            if first is not key:
                reason = f"the key {key.value!r} stands in line {first.start_mark.line + 1} already"
                raise yaml.MarkedYAMLError(problem=reason, problem_mark=key.start_mark)
            parts += [key, value]
    number = 1
    for part in parts:
        number += _count(part, known, limit, depth + 1)
        if number > limit or depth > _MAX_DEPTH:
            reason = f"stands for more than {limit} values or {_MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=reason, problem_mark=part.start_mark)
    known[id(node)] = number
    return number


# Files that are the value of a setting, and values in YAML on the command line, are read by jsonargparse alone, with a
# loader that is not there before its first use.
ArgumentParser(parser_mode="omegaconf+").parse_string("{}")
set_loader("omegaconf+", _checked(get_loader("omegaconf+")), (yaml.YAMLError,))


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
