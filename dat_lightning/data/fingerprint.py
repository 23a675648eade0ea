"""Hashes of images, to find data that are equal."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dat_lightning.data.entries import ReadableImages, SizedDataset, image_of


def image_digest(entry: Any) -> str:
    """Returns a hash of an entry's raw image: a PIL image, array or tensor, or a pair that begins with one."""
    image = image_of(entry)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        # NumPy has no bfloat16.
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    array = np.ascontiguousarray(image)
    return hashlib.sha256(repr((array.shape, array.dtype.str)).encode() + array.tobytes()).hexdigest()


def shared_images(
    a: SizedDataset, *others: SizedDataset, num_samples: int = 64, max_values: int = 2**28
) -> list[float]:
    """Returns, for each of the others, which share of ``num_samples`` evenly spaced images of it are in ``a``.

    An image is shared if its name is, where both data sets have ``name(index)``: then ``a`` is searched whole, and no
    image is read. It is also shared if it is equal byte for byte, in the same layout and type. For that ``a`` is read
    whole, once for all others, if its pixels have at most ``max_values`` values, by its first image: 87 000 images of
    3×32×32, 1 780 of 3×224×224. Of a larger one only ``num_samples`` are looked at, which finds equal data in the same
    order, and hardly any in another. Corrupt images are left out.
    """
    many: set[str] | None = None
    shares = []
    for b in others:
        share = _named(a, b, num_samples)
        if not share:
            if many is None:
                few = len(a) * _num_values(a) > max_values
                many = _digests(a, num_samples if few else len(a))
            digests = _digests(b, num_samples)
            share = len(many & digests) / max(1, len(digests))
        shares.append(share)
    return shares


def _named(a: SizedDataset, b: SizedDataset, num_samples: int) -> float:
    name_of_a, name_of_b = getattr(a, "name", None), getattr(b, "name", None)
    if not (callable(name_of_a) and callable(name_of_b)):
        return 0.0
    names = {name_of_b(place) for place in _spaced(b, num_samples)}
    return min(1.0, sum(name_of_a(index) in names for index in range(len(a))) / max(1, len(names)))


def _spaced(dataset: SizedDataset, count: int) -> list[int]:
    count = min(len(dataset), count)
    return [k * len(dataset) // count for k in range(count)]


def _digests(dataset: SizedDataset, count: int) -> set[str]:
    images = ReadableImages(dataset)
    entries = (images.read(place) for place in _spaced(dataset, count))
    return {image_digest(entry) for entry in entries if entry is not None}


def _num_values(dataset: SizedDataset) -> int:
    entry = ReadableImages(dataset).read(0) if len(dataset) else None
    image = None if entry is None else image_of(entry)
    return image.numel() if isinstance(image, Tensor) else np.asarray(image).size
