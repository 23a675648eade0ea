"""Configurations as mappings: merged, with arguments set and places filled in, and hashed."""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dat_lightning.core.errors import InputError

CHECKPOINT = re.compile(r"\{checkpoint:([^{}]+)\}")
FOLDER = "{folder}"


def read_mapping(path: Path, what: str = "configuration") -> dict[str, Any]:
    """Returns the contents of a YAML file.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        FileNotFoundError: If there is none.
        InputError: If it is no YAML, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} must be a mapping of settings, got {type(contents).__name__}")
    return contents


def merged(paths: Sequence[Path], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns several files as one configuration, as the command line merges them, with arguments set.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If one is no mapping, or an argument leads nowhere.
    """
    config: dict[str, Any] = {}
    for path in paths:
        config = merge(config, read_mapping(path))
    return with_arguments(config, arguments)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns both mappings as one: mappings are merged, everything else is replaced by what is above.

    A class of another name takes no arguments over.
    """
    result = dict(below)
    if "class_path" in above and below.get("class_path", above["class_path"]) != above["class_path"]:
        result.pop("init_args", None)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def with_arguments(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with arguments set, which are named as on the command line.

    ``init_args`` may be left out of a name, and an entry of a list of classes is named by its class:
    ``trainer.callbacks.PGDSampler.num_samples``.

    Raises:
        InputError: If a name leads through something that is no mapping, or to a class that the list lacks.
    """
    result = copy.deepcopy(dict(config))
    for name, value in arguments.items():
        _set(result, name.split("."), value, name)
    return result


def fill(config: Any, replaced: Callable[[str], str]) -> Any:
    """Returns a configuration with a function applied to all of its texts."""
    if isinstance(config, str):
        return replaced(config)
    if isinstance(config, Mapping):
        return {key: fill(value, replaced) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [fill(value, replaced) for value in config]
    return config


def strings(config: Any) -> Iterator[str]:
    """Yields all texts of a configuration."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, Mapping):
        for value in config.values():
            yield from strings(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from strings(value)


def digest(config: Mapping[str, Any]) -> str:
    """Returns a hash of a configuration that does not depend on the order of its keys."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Yields, as ``name: old → new``, what differs between two configurations."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for k, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{name}.{k}")
    elif old != new:
        yield f"{name}: {_brief(old)} → {_brief(new)}"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _set(config: Any, names: Sequence[str], value: Any, whole: str) -> None:
    if isinstance(config, list):
        config, names = _entry(config, names[0], whole), names[1:]
    if not isinstance(config, dict):
        raise InputError(f"argument {whole} leads through {_brief(config)}, expected a mapping")
    if "class_path" in config and names and names[0] not in ("class_path", "init_args"):
        config = config.setdefault("init_args", {})
    if not names:
        raise InputError(f"argument {whole} names a class, expected one of its arguments")
    if len(names) == 1:
        config[names[0]] = value
        return
    _set(config.setdefault(names[0], {}), names[1:], value, whole)


def _entry(entries: list[Any], name: str, whole: str) -> Any:
    """The entry of a class, by the last part of its path."""
    paths = [entry.get("class_path", "") if isinstance(entry, dict) else "" for entry in entries]
    found = [entry for entry, path in zip(entries, paths, strict=True) if path.rpartition(".")[2] == name]
    if len(found) != 1:
        raise InputError(f"argument {whole}: expected one {name} in the list, got {len(found)} among {paths}")
    return found[0]
