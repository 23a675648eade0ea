"""Hashes of images, data sets and networks: to find data that are equal, and caches that are stale."""

import hashlib
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


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
        digest.update(image_digest(dataset[k * size // count]).encode())
    return digest.hexdigest()


def module_fingerprint(module: nn.Module) -> str:
    """Returns a hash of a network's class, structure and weights."""
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}\n{module}".encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shared_images(a: SizedDataset, b: SizedDataset, num_samples: int = 64, whole_up_to: int = 20_000) -> float:
    """Returns which share of ``num_samples`` evenly spaced images of ``b`` are in ``a``.

    Up to ``whole_up_to`` images, ``a`` is searched whole; of more, ``num_samples`` are looked at, which finds data in
    the same order. Only images that are equal byte for byte, in the same layout and type, count.
    """

    def digests(dataset: SizedDataset, count: int) -> set[str]:
        return {image_digest(dataset[k * len(dataset) // count]) for k in range(count)}

    few = digests(b, min(len(b), num_samples))
    many = digests(a, len(a) if len(a) <= whole_up_to else min(len(a), num_samples))
    return len(many & few) / len(few)
