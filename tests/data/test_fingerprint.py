from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dat_lightning.data import shared_images
from dat_lightning.data.fingerprint import image_digest


class Counting(Sequence[Tensor]):
    """Images that are constant at their index, but for those that are given; notes which were read."""

    def __init__(self, size: int, others: dict[int, float] | None = None) -> None:
        self.size, self.others, self.read = size, others or {}, list[int]()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return torch.full((1, 2, 2), self.others.get(index, float(index)))


def test_a_digest_is_that_of_the_pixels_whatever_holds_them() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    digest = image_digest(pixels)
    entries = (torch.from_numpy(pixels), Image.fromarray(pixels), (pixels, 3), np.asfortranarray(pixels))
    assert {image_digest(entry) for entry in entries} == {digest}


def test_images_of_bfloat16_are_told_apart_and_found_again() -> None:
    images = [torch.full((1, 2, 2), 2.0**-k, dtype=torch.bfloat16) for k in range(4)]
    assert len({image_digest(image) for image in images}) == 4
    assert shared_images(images, images[:2]) == [1.0]
    assert shared_images(images[2:], images[:2]) == [0.0]


@pytest.mark.parametrize("change", ["pixel", "shape", "dtype"])
def test_a_digest_changes_with_pixel_shape_and_type(change: str) -> None:
    pixels = np.zeros((2, 6), dtype=np.uint8)
    other = pixels.copy()
    if change == "pixel":
        other[1, 5] = 1
    elif change == "shape":
        other = other.reshape(3, 4)
    else:
        other = other.astype(np.int8)
    assert image_digest(other) != image_digest(pixels)


def test_identical_data_sets_share_all_images() -> None:
    for size in (1, 63, 64, 65, 1000):
        assert shared_images(Counting(size), Counting(size)) == [1.0]


def test_disjoint_data_sets_share_none() -> None:
    assert shared_images(Counting(5), Counting(5, {i: -1.0 - i for i in range(5)})) == [0.0]


def test_the_share_is_that_of_the_second_data_set() -> None:
    ten, two = Counting(10), Counting(2)
    assert shared_images(two, ten) == [0.2]
    assert shared_images(ten, two) == [1.0]


def test_the_order_does_not_matter() -> None:
    shuffled = Counting(1000, {i: float(999 - i) for i in range(1000)})
    assert shared_images(Counting(1000), shuffled) == [1.0]


def test_a_data_set_as_large_as_cifar_is_found_in_any_order() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    assert shared_images(pixels, pixels[np.random.default_rng(1).permutation(50_000)]) == [1.0]


@pytest.mark.parametrize("more", [0, 1])
def test_a_large_data_set_is_not_read_whole(more: int) -> None:
    a, b = Counting(1000), Counting(500)
    # Four values each.
    shared_images(a, b, num_samples=8, max_values=4000 - more)
    assert a.read[1:] == (list(range(0, 1000, 125)) if more else list(range(1000)))  # the first says how large all are
    assert len(b.read) == 8


def test_the_training_images_are_read_once_for_all_that_they_are_compared_with() -> None:
    a = Counting(100)
    others = [
        Counting(10),
        Counting(10, {i: -1.0 - i for i in range(10)}),
        Counting(20, dict.fromkeys(range(10), -1.0)),
    ]
    assert shared_images(a, *others) == [1.0, 0.0, 10 / 11]
    assert a.read[1:] == list(range(100))
