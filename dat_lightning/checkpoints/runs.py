"""Checkpoints of runs: read whole or refused, and the newest whole one found where another is damaged."""

import pickle
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dat_lightning.checkpoints.stamp import check_stamp

# What a checkpoint has that training can go on from; one with weights alone lacks the optimiser.
_NEEDED = ("pytorch-lightning_version", "state_dict", "loops", "optimizer_states", "lr_schedulers")


class DamagedCheckpointError(ValueError):
    """Says that a file is not a checkpoint that can be read whole."""


def is_archive(path: Path) -> bool:
    """Returns whether a file begins as the archives of ``torch.save`` do, by which ``torch.load`` tells them."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def damaged_part(path: Path) -> str | None:
    """Returns what is wrong with a file that ``torch.save`` wrote, or ``None``; every byte of it is read.

    ``torch.load`` does not compare checksums: a file with a flipped bit gives other numbers in silence. A file that was
    saved without checksums, which torch allows, has zeros in their place and cannot be checked.
    """
    size = path.stat().st_size
    if size == 0:
        return "it is of another kind: it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(entry.CRC for entry in archive.infolist()):
                return None
            broken = next((entry.filename for entry in archive.infolist() if _is_odd(entry)), None) or archive.testzip()
    except Exception:  # whatever a reader of archives stumbles over
        return f"it is damaged or of another kind ({size} bytes)"
    return None if broken is None else f"it is damaged, in its part {broken}"


def _is_odd(entry: zipfile.ZipInfo) -> bool:
    """Whether a part is marked as a folder, for which torch's reader leaves memory as it was, or has two sizes."""
    return bool(entry.external_attr & 0x10) or (entry.compress_type == 0 and entry.compress_size != entry.file_size)


def check_whole(path: Path) -> None:
    """Reads every byte of a file that ``torch.save`` wrote.

    Raises:
        DamagedCheckpointError: If it is damaged, as far as its checksums tell, or of another kind.
    """
    fault = damaged_part(path)
    if fault is not None:
        raise DamagedCheckpointError(f"{path} is not a readable checkpoint: {fault}")


def read_run(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Returns a checkpoint of a run, on the CPU; every byte is checked first, and nothing in it is executed.

    Args:
        path: The file.
        mmap: Whether tensors stay in the file until they are used.

    Raises:
        DamagedCheckpointError: If the file is damaged, of another kind, or names something that could run code.
        ValueError: If a newer version of this package wrote it.
    """
    check_whole(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
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
    try:
        check_stamp(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return contents


def can_resume(contents: Mapping[str, Any]) -> bool:
    """Returns whether training can go on from a checkpoint: one of a run, with the state of its optimiser."""
    return all(name in contents for name in _NEEDED)


def checkpoints_in(folder: Path, pattern: str = "*.ckpt") -> list[Path]:
    """Returns the files in a folder that are called like checkpoints."""
    return sorted(path for path in folder.glob(pattern) if path.is_file()) if folder.is_dir() else []


def newest_whole(candidates: Iterable[Path], names: Collection[str] = (), to_train: bool = True) -> Path | None:
    """Returns the checkpoint that was written last and is whole, or ``None``; candidates are read until one is found.

    Args:
        candidates: Checkpoints.
        names: What the state dict has to hold; nothing is compared if it is empty.
        to_train: Whether training has to be able to go on from it.
    """
    for path in sorted(candidates, key=lambda path: (-path.stat().st_mtime_ns, path.name)):
        try:
            contents = read_run(path, mmap=True)
        except (ValueError, OSError):
            continue
        fits = not names or set(contents.get("state_dict", ())) == set(names)
        if fits and (can_resume(contents) or not to_train):
            return path
    return None


def offer(path: Path, names: Collection[str] = ()) -> str:
    """Returns the part of a sentence that says what to go on from where a checkpoint cannot be used."""
    other = newest_whole((other for other in checkpoints_in(path.parent) if other.name != path.name), names)
    return f"; no other checkpoint in {path.parent} is whole" if other is None else f"; the newest whole one is {other}"
