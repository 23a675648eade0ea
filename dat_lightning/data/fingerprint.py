"""Hashes of images, data sets and networks: to find data that are equal, and caches that are stale."""

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dat_lightning.data.pixels import CorruptImageError


class SizedDataset(Protocol):
    """A map-style data set that knows its length; an entry is an image or an (image, label) pair."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def image_digest(entry: Any) -> str:
    """Returns a hash of an entry's raw image: a PIL image, array or tensor, or a pair that begins with one."""
    image = entry[0] if isinstance(entry, tuple) else entry
    array = np.ascontiguousarray(image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image))
    return hashlib.sha256(repr((array.shape, array.dtype.str)).encode() + array.tobytes()).hexdigest()


def data_fingerprint(dataset: SizedDataset, whole_up_to: int = 20_000, num_samples: int = 2_000) -> str:
    """Returns a hash of a data set's images: of all up to a size, beyond it of evenly spaced ones and the length."""
    size = len(dataset)
    count = size if size <= whole_up_to else num_samples
    digest = hashlib.sha256(f"{size}".encode())
    for k in range(count):
        digest.update((_readable_digest(dataset, k * size // count) or "unreadable").encode())
    return digest.hexdigest()


def _readable_digest(dataset: SizedDataset, index: int) -> str | None:
    """The hash of an entry; ``None`` if its image is corrupt."""
    try:
        return image_digest(dataset[index])
    except CorruptImageError:
        return None


def module_fingerprint(module: nn.Module) -> str:
    """Returns a hash of a network's class, structure, weights and buffers, those outside its state dict among them."""
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}\n{module}".encode())
    # First the state dict, for which a module may load its weights.
    tensors = {**module.state_dict(), **dict(module.named_buffers())}
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shared_images(a: SizedDataset, b: SizedDataset, num_samples: int = 64, whole_up_to: int = 20_000) -> float:
    """Returns which share of ``num_samples`` evenly spaced images of ``b`` are in ``a``.

    An image is shared if its name is, where both data sets have ``name(index)``: then ``a`` is searched whole, and no
    image is read. It is also shared if it is equal byte for byte, in the same layout and type; for that, ``a`` is
    searched whole up to ``whole_up_to`` images, and of more only ``num_samples`` are looked at. Corrupt ones are left
    out.
    """
    places = [k * len(b) // min(len(b), num_samples) for k in range(min(len(b), num_samples))]
    name_of_a, name_of_b = getattr(a, "name", None), getattr(b, "name", None)
    if callable(name_of_a) and callable(name_of_b):
        names = {name_of_b(place) for place in places}
        named = sum(name_of_a(index) in names for index in range(len(a)))
        if named:
            return min(1.0, named / len(places))

    def digests(dataset: SizedDataset, count: int) -> set[str]:
        found = (_readable_digest(dataset, k * len(dataset) // count) for k in range(count))
        return {digest for digest in found if digest is not None}

    few = digests(b, min(len(b), num_samples))
    many = digests(a, len(a) if len(a) <= whole_up_to else min(len(a), num_samples))
    return len(many & few) / max(1, len(few))


def file_digest(path: Path, whole_up_to: int = 20_000, num_samples: int = 2_000) -> str:
    """Returns a digest of a file, or of the files in a folder: of all up to a number, beyond it of evenly spaced ones.

    Folders with the same files in them are alike, wherever they lie.
    """
    if path.is_file():
        return _sha256(path)[:16]
    files = sorted(Path(where) / name for where, _, names in os.walk(path) for name in names)
    count = len(files) if len(files) <= whole_up_to else num_samples
    digest = hashlib.sha256(f"{len(files)}".encode())
    for file in (files[k * len(files) // count] for k in range(count)):
        digest.update(f"{file.relative_to(path).as_posix()} {_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()
