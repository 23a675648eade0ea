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
        images = ReadableImages(dataset)
        entries = (images.read(k * len(dataset) // count) for k in range(count))
        return {image_digest(entry) for entry in entries if entry is not None}

    few = digests(b, min(len(b), num_samples))
    many = digests(a, len(a) if len(a) <= whole_up_to else min(len(a), num_samples))
    return len(many & few) / max(1, len(few))
