"""What a checkpoint says of its run: the number of its format, the module's class, the run, and its settings."""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from dat_lightning.core.errors import InputError
from dat_lightning.weights.files import require_regular

FORMAT = 1
"""Number of the format that this version writes; it grows when older versions would misread a checkpoint."""

ENTRY = "dat_lightning"

# Of the settings that the command line stores, those that do not decide what is computed; of execution one does.
_NOT_COMPARED = frozenset({"_class_path", "_instantiator", "execution"})

# What is logged beside a module's settings, and what makes modules from theirs.
_OF_THE_RUN = ("class_path", "data", "trainer", "seed_everything", "float32_matmul_precision")
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"

# A subclass, such as NumPy's of float, is an object to torch.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def stamp(checkpoint: MutableMapping[str, Any], kind: str | None = None, run: str | None = None) -> None:
    """Writes into a checkpoint what tells it from others: the number of the format and the version of the package.

    Args:
        checkpoint: What is about to be saved.
        kind: Path of the module's class.
        run: Name of the run, the same in all its lives.
    """
    checkpoint[ENTRY] = {"format": FORMAT, "version": _version(), "module": kind, "run": run}


def check_stamp(checkpoint: Mapping[str, Any], kind: str | None = None) -> None:
    """Checks that this version can read a checkpoint; one without a stamp is older than stamps are.

    Args:
        checkpoint: Its contents.
        kind: Path of the class whose training goes on; by default any will do.

    Raises:
        InputError: If a newer version wrote it, or a module of another class.
    """
    found = checkpoint.get(ENTRY)
    if found is not None and not isinstance(found, Mapping):
        raise InputError(f"its entry {ENTRY} is a {type(found).__name__}, and not what a run says of itself")
    number = found.get("format") if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and isinstance(number, int) and number > FORMAT:
        raise InputError(
            f"the checkpoint has format {number}, of dat_lightning {found.get('version')}; this is version"
            f" {_version()}, which reads formats up to {FORMAT}: install that version or a newer one"
        )
    if kind is not None and not is_of_kind(checkpoint, kind):
        raise InputError(
            f"the checkpoint is one of a {kind_of(checkpoint)}, from which a {kind} cannot go on; init_from takes its"
            " weights alone"
        )


def kind_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Returns the path of the class that a checkpoint is of, or ``None`` if it does not say."""
    entry, settings = checkpoint.get(ENTRY), checkpoint.get("hyper_parameters")
    kind = entry.get("module") if isinstance(entry, Mapping) else None
    if kind is None and isinstance(settings, Mapping):  # of a run of the command line, before classes were stamped
        kind = settings.get("_class_path")
    return kind if isinstance(kind, str) else None


def is_of_kind(checkpoint: Mapping[str, Any], kind: str) -> bool:
    """Returns whether a checkpoint is of a class, by its name alone: a class may move to another file."""
    found = kind_of(checkpoint)
    return found is None or found.rpartition(".")[2] == kind.rpartition(".")[2]


def run_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Returns the name of the run that a checkpoint is of, or ``None`` if it does not say."""
    entry = checkpoint.get(ENTRY)
    run = entry.get("run") if isinstance(entry, Mapping) else None
    return run if isinstance(run, str) else None


def settings_in_yaml(hparams_file: str | Path | None) -> dict[str, Any]:
    """Returns what a file of hyperparameters holds, as loggers write it; empty if it is no YAML by its name.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it cannot be read.
    """
    if hparams_file is None or Path(hparams_file).suffix not in (".yaml", ".yml"):
        return {}
    if Path(hparams_file).exists():
        require_regular(Path(hparams_file))
    try:
        found = yaml.safe_load(Path(hparams_file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{hparams_file} has no hyperparameters that can be read: {error}") from error
    return found if isinstance(found, dict) else {}


def settings_of_module(hparams_file: str | Path) -> dict[str, Any]:
    """Returns a module's settings, in the form of a checkpoint, from the file of hyperparameters of a whole run.

    Empty, if the file is none that a run of the command line has logged.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it cannot be read.
    """
    found = settings_in_yaml(hparams_file)
    if not {"class_path", "trainer"} <= found.keys():
        return {}
    settings = {name: value for name, value in found.items() if name not in _OF_THE_RUN}
    return {"_class_path": found["class_path"], **settings, "_instantiator": _INSTANTIATOR}


def changed_settings(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Returns, as ``name: old → new``, which of the module's settings are others than those of a checkpoint.

    Args:
        checkpoint: Its contents.
        settings: The present ones, in the form that the command line stores; nothing is compared if there are none.
    """
    old = checkpoint.get("hyper_parameters")
    if not isinstance(old, Mapping) or not old or not settings:
        return []
    return list(_changed(_compared(old), _compared(settings)))


def check_hyperparameters(settings: Mapping[str, Any], of: str = "") -> None:
    """Checks that hyperparameters are what a checkpoint gives back: numbers, strings, tensors, and collections of them.

    Args:
        settings: As they are about to be saved.
        of: Whose they are, for the message, if they are not the module's.

    Raises:
        InputError: If one is an object; it is named.
    """
    for name, value in settings.items():
        found = next(_objects(value), None)
        if found is not None:
            again = "the constructor" if of else "load_from_checkpoint"
            raise InputError(
                f"the hyperparameter {of}{name} holds a {type(found).__qualname__}, which no checkpoint gives back:"
                f" leave it out, self.save_hyperparameters(ignore=[{name!r}]), and give it to {again}"
            )


def check_states(states: Mapping[str, Any]) -> None:
    """Checks that the states of callbacks are what a checkpoint gives back.

    Args:
        states: By callback, as they are about to be saved.

    Raises:
        InputError: If one holds an object; the callback is named.
    """
    for name, state in states.items():
        found = next(_objects(state), None)
        if found is not None:
            raise InputError(
                f"the state_dict of the callback {name} holds a {type(found).__qualname__}, which no checkpoint gives"
                " back: let it hold numbers, strings, tensors, and collections of them"
            )


def _objects(value: Any) -> Iterator[Any]:
    if type(value) in (dict, OrderedDict, Counter):
        yield from _objects([*value, *value.values()])
    elif type(value) in (list, tuple, set):
        for entry in value:
            yield from _objects(entry)
    elif not (type(value) in _PLAIN or isinstance(value, torch.Tensor)):
        yield value


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    precision = (settings.get("execution") or {}).get("attack_precision")
    kept = {name: value for name, value in settings.items() if name not in _NOT_COMPARED}
    return {**kept, "execution": {"attack_precision": precision}}


def _changed(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("class_path") != new.get("class_path"):
            # The arguments of two classes have nothing in common.
            old, new = ({"class_path": each.get("class_path")} for each in (old, new))
        for key in dict.fromkeys((*old, *new)):
            # As on the command line, where init_args can be left out.
            inner = name if key == "init_args" else f"{name}.{key}".lstrip(".")
            yield from _changed(old.get(key), new.get(key), inner)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if _differs(list(old), list(new)):
            yield f"{name}: {_brief(list(old))} → {_brief(list(new))}"
    elif _differs(old, new):
        yield f"{name}: {_brief(old)} → {_brief(new)}"


def _differs(old: Any, new: Any) -> bool:
    """Whether two settings are not equal; tensors, of which torch says so number by number, are."""
    try:
        return bool(old != new)
    except (RuntimeError, ValueError):
        return True


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _version() -> str:
    try:
        return version("dat-lightning")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
