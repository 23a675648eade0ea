"""Files of weights: the formats, and one clear error for each file that is none of them."""

import tarfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dat_lightning.core.errors import InputError
from dat_lightning.weights.archives import check_whole, is_archive
from dat_lightning.weights.extents import check_tensors
from dat_lightning.weights.files import require_regular
from dat_lightning.weights.foreign import StandIn, foreign_names, load_with_stand_ins
from dat_lightning.weights.stamp import check_stamp


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Returns the contents of a file of weights, on the CPU; nothing in the file is executed.

    Reads what ``torch.save`` writes, ``.safetensors``, and the folder that huggingface_hub's mixin writes. Where a file
    holds other Python objects besides tensors and primitives, those become a
    :class:`~dat_lightning.weights.StandIn` with their name, which does nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no checkpoint, is damaged, holds what ``torch.load`` does not read, or stands for more than
            any checkpoint has.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    require_regular(file)
    # Before anything in it is believed. The formats without an archive have no checksums.
    if is_archive(file):
        check_whole(file)
    try:
        contents = _read_safetensors(file) if file.suffix == ".safetensors" else load_with_stand_ins(file)
    except InputError as error:
        raise InputError(f"{path} is not a readable checkpoint: {error}") from error
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        raise InputError(f"{path} is not a readable checkpoint: {_diagnosis(file)}") from error
    if not isinstance(contents, Mapping):
        kind = contents.name if isinstance(contents, StandIn) else type(contents).__name__
        raise InputError(f"{path} holds a {kind}, not a checkpoint or state dict")
    try:
        check_tensors(contents)
        check_stamp(contents)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return contents


def _read_safetensors(file: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    tensors: Mapping[str, Any] = load_file(file, device="cpu")
    return tensors


def _diagnosis(file: Path) -> str:
    """Says what kind of file it is that could not be read."""
    if file.stat().st_size == 0:
        return "it is of another kind: it is empty"
    if file.suffix == ".safetensors":
        return "it is damaged or of another kind than safetensors"
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
            if "constants.pkl" in names:
                return "it is of another kind: a TorchScript archive, which is a program; save its state_dict() instead"
        elif tarfile.is_tarfile(file):
            return "it is of another kind: torch's tar format of 2016, or another tar file; save it with a newer torch"
    except Exception:  # a damaged directory of an archive
        return "it is damaged"
    found: list[str] = []
    with suppress(Exception):
        found = foreign_names(file)
    what = f"; it holds {', '.join(found[:5])}" if found else ""
    return (
        f"it is damaged or of another kind than torch.load(weights_only=True) reads{what}; if you trust it, load it"
        " where it was made, and save its state dict with safetensors.torch.save_file"
    )
