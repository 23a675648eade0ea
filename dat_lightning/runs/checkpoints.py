"""Checkpoints of runs: read whole or refused, and the newest whole one found where another is damaged."""

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dat_lightning.core.errors import InputError
from dat_lightning.weights.archives import DamagedCheckpointError, check_whole, damaged_part, read_pickle
from dat_lightning.weights.extents import check_pickle, check_tensors
from dat_lightning.weights.stamp import changed_settings, check_stamp, is_of_kind, kind_of, run_of

# What a checkpoint has that training can go on from; one with weights alone lacks the optimiser.
_NEEDED = ("pytorch-lightning_version", "state_dict", "loops", "optimizer_states", "lr_schedulers")


@dataclass(frozen=True)
class Requirements:
    """What a checkpoint has to be of, for a run to use it.

    Args:
        kind: Path of the module's class; any if it is ``None``.
        shapes: Shapes in the state dict by name; nothing is compared if it is empty.
        settings: The module's settings; a checkpoint with others will do, but one with the same comes first.
        to_train: Whether training has to be able to go on from it.
        check: Raises an ``InputError`` about contents that the module cannot have saved.
    """

    kind: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    to_train: bool = True
    check: Callable[[Mapping[str, Any]], None] = lambda contents: None

    def unmet(self, contents: Mapping[str, Any]) -> str | None:
        """Returns what is wrong with a checkpoint of another kind of module or network, or ``None``."""
        if self.kind is not None and not is_of_kind(contents, self.kind):
            return f"it is one of a {kind_of(contents)}"
        found = shapes_of(contents.get("state_dict", {}))
        if not self.shapes or found == self.shapes:
            return None
        own = self.shapes.keys()
        if own != found.keys():
            missing, unexpected = len(own - found.keys()), len(found.keys() - own)
            return f"{missing} names missing, {unexpected} unexpected, such as {min(own ^ found.keys())}"
        name = next(name for name, shape in self.shapes.items() if shape != found[name])
        return f"{name} has the shape {_shape_text(found[name])}, not {_shape_text(self.shapes[name])}"


_ANY = Requirements()


def shapes_of(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes in a state dict; what is no tensor has none."""
    return {name: tuple(getattr(value, "shape", ())) for name, value in state_dict.items()}


def _shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "of a number"


def read_run_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Returns a checkpoint of a run, on the CPU; every byte is checked first, and nothing in it is executed.

    Args:
        path: The file.
        mmap: Whether tensors stay in the file until they are used.

    Raises:
        DamagedCheckpointError: If the file is damaged, of another kind, or names something that could run code.
        InputError: If a newer version of this package wrote it.
    """
    check_whole(path)
    return _load(path, mmap)


def read_without_tensors(path: Path) -> dict[str, Any]:
    """Returns a checkpoint of a run, on the CPU, whose tensors stay in the file and have not been checked.

    Raises:
        DamagedCheckpointError: As :func:`read_run_checkpoint` does, without the tensors' bytes.
        InputError: If a newer version of this package wrote it.
    """
    fault = damaged_part(path, tensors=False)
    if fault is not None:
        raise DamagedCheckpointError(f"{path} is not a readable checkpoint: {fault}")
    return _load(path, mmap=True)


def _load(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            check_pickle(pickletools.genops(read_pickle(archive)[0]), path.stat().st_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors, which are no weights here
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        check_tensors(contents)
    except InputError as error:
        raise DamagedCheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    except pickle.UnpicklingError as error:
        raise DamagedCheckpointError(
            f"{path} is not a readable checkpoint: it holds Python objects, which are not loaded because that could run"
            " code"
        ) from error
    except Exception as error:
        raise DamagedCheckpointError(
            f"{path} is not a readable checkpoint: it is damaged or of another kind"
        ) from error
    if not isinstance(contents, dict):
        raise DamagedCheckpointError(f"{path} holds a {type(contents).__name__}, not a checkpoint")
    fault = _misshapen(contents)
    if fault is not None:
        raise DamagedCheckpointError(f"{path} is no checkpoint of a run: {fault}")
    try:
        check_stamp(contents)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return contents


# What each entry that Lightning writes is, and so what it is believed to be.
_FORMS: dict[str, type] = {
    "state_dict": Mapping,
    "current_model_state": Mapping,
    "hyper_parameters": Mapping,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}

_COUNTED = ("ready", "started", "processed", "completed")  # by loops


def _misshapen(contents: Mapping[Any, Any]) -> str | None:
    """Says which entry is not what a run saves, if one is."""
    for name, form in _FORMS.items():
        value = contents.get(name)
        if name in contents and value is not None and not isinstance(value, form):
            return f"its {name} is a {type(value).__name__}"
    for name in ("state_dict", "current_model_state"):
        for key, value in (contents.get(name) or {}).items():
            extra = isinstance(key, str) and key.endswith("_extra_state")  # of torch.nn.Module, which may be anything
            if not ((isinstance(key, str) and isinstance(value, torch.Tensor)) or extra):
                return f"its {name} has a {type(value).__name__} as {str(key)[:80]!r}"
    for name in ("optimizer_states", "lr_schedulers"):
        wrong = next((part for part in contents.get(name) or [] if not isinstance(part, Mapping)), None)
        if wrong is not None:
            return f"its {name} hold a {type(wrong).__name__}"
    written_by = contents.get("pytorch-lightning_version", "2")
    if not (isinstance(written_by, str) and re.match(r"\d+(\.\d+)*", written_by)):
        return f"its pytorch-lightning_version is {str(written_by)[:80]!r}"
    counts = {name: contents.get(name) for name in ("epoch", "global_step", "loops")}
    wrong = next(_no_counts(counts), None)
    return None if wrong is None else f"its {wrong[0]} is {str(wrong[1])[:80]}"


def _counts(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**62


def _no_counts(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers that count nothing in what only counts, such as the progress of loops, and where they are."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _no_counts(inner, f"{name}.{key}".lstrip("."))
    elif (isinstance(value, int) or name.rpartition(".")[2] in _COUNTED) and not _counts(value):
        yield name, value


def can_resume(contents: Mapping[str, Any]) -> bool:
    """Returns whether training can go on from a checkpoint: one of a run, with the state of its optimiser."""
    return all(name in contents for name in _NEEDED)


def checkpoints_in(folder: Path, pattern: str = "*.ckpt") -> list[Path]:
    """Returns the files in a folder that are called like checkpoints."""
    return sorted(path for path in folder.glob(pattern) if path.is_file()) if folder.is_dir() else []


def newest_whole(
    candidates: Iterable[Path], required: Requirements = _ANY, tell: Callable[[str], None] = lambda sentence: None
) -> Path | None:
    """Returns the newest checkpoint that is whole, or ``None``.

    Those with the settings of the run come first. Then the run of which a file was written last decides: its
    checkpoint with the most steps is the newest, and of two with as many the one that was written later. The time of
    writing alone would change when files are copied; steps alone would prefer an older run in the same folder.

    Args:
        candidates: Checkpoints; all are opened, and read whole until a whole one is found.
        required: What it has to be of.
        tell: Is told, in a sentence each, which are passed over because they cannot be used at all.
    """
    found: list[tuple[Path, int, dict[str, Any]]] = []
    last_written: dict[str | None, int] = {}
    for path in candidates:
        try:
            contents, written = read_without_tensors(path), path.stat().st_mtime_ns
        except (ValueError, OSError) as error:
            tell(str(error))
            continue
        if required.unmet(contents) is None and (can_resume(contents) or not required.to_train):
            found.append((path, written, contents))
            last_written[run_of(contents)] = max(written, last_written.get(run_of(contents), 0))

    def rank(entry: tuple[Path, int, dict[str, Any]]) -> tuple[bool, int, int, int, str]:
        path, written, contents = entry
        others = bool(changed_settings(contents, required.settings))
        return others, -last_written[run_of(contents)], -step_of(contents), -written, path.name

    for path, _, _ in sorted(found, key=rank):
        try:
            required.check(read_run_checkpoint(path))
        except (ValueError, OSError) as error:
            tell(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        return path
    return None


def step_of(contents: Mapping[str, Any]) -> int:
    """Returns how many steps of the optimiser a checkpoint has behind it."""
    step = contents.get("global_step")
    return step if isinstance(step, int) else 0


def name_another(path: Path, required: Requirements = _ANY) -> str:
    """Returns the part of a sentence that says what to go on from where a checkpoint cannot be used."""
    other = newest_whole((other for other in checkpoints_in(path.parent) if other.name != path.name), required)
    return f"; no other checkpoint in {path.parent} is whole" if other is None else f"; the newest whole one is {other}"
