from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from dat_lightning.data import PhotographCrops, UniformNoise, ood


def test_noise_is_a_function_of_seed_and_index() -> None:
    noise = UniformNoise(20, (2, 3, 4), seed=1)
    assert len(noise) == 20
    assert noise[0].shape == (2, 3, 4)
    torch.manual_seed(0)
    first = noise[7]
    torch.rand(5)
    assert torch.equal(UniformNoise(8, (2, 3, 4), seed=1)[7], first)
    assert not torch.equal(UniformNoise(20, (2, 3, 4), seed=2)[7], first)
    assert not torch.equal(noise[8], first)


def test_noise_is_uniform() -> None:
    noise = UniformNoise(50, (1, 16, 16))
    pixels = torch.stack([noise[i] for i in range(50)])
    assert 0 <= pixels.min() < 0.01 < 0.99 < pixels.max() < 1
    assert abs(pixels.mean() - 1 / 2) < 0.01
    assert abs(pixels.var() - 1 / 12) < 0.002


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_crops_are_images_of_the_brightness_of_digits(part: Literal["train", "held_out"]) -> None:
    crops = PhotographCrops(100, part)
    images = torch.stack([crops[i] for i in range(100)])
    assert images.shape == (100, 1, 16, 16)
    assert 0 <= images.min() <= images.max() <= 1
    assert abs(images.mean() - 0.3) < 0.02
    # At most the upper end of the contrast range; clipping only lowers it.
    assert images.flatten(1).std(1).max() < 0.2
    assert len({image.numpy().tobytes() for image in images}) == 100


def test_a_crop_is_a_function_of_seed_part_and_index() -> None:
    torch.manual_seed(0)
    first = PhotographCrops(10)[3]
    torch.rand(5)
    assert torch.equal(PhotographCrops(4)[3], first)
    assert not torch.equal(PhotographCrops(10, seed=1)[3], first)
    assert not torch.equal(PhotographCrops(10, "held_out")[3], first)


@pytest.mark.parametrize("image_size", [2, 8, 32])
def test_crops_have_the_size_asked_for(image_size: int) -> None:
    assert PhotographCrops(4, image_size=image_size)[0].shape == (1, image_size, image_size)


@pytest.mark.parametrize("blur", [0.5, 0.8])
def test_the_blur_is_gaussian_with_reflected_borders(blur: float) -> None:
    sharp, blurred = PhotographCrops(6, blur=0)[5][0].numpy(), PhotographCrops(6, blur=blur)[5][0].numpy()
    radius = int(np.ceil(3 * blur))
    places = np.arange(-radius, radius + 1)
    weights = np.exp(-(places**2) / (2 * blur**2))
    padded = np.pad(sharp, radius, mode="reflect")
    expected = np.zeros_like(sharp)
    for i in range(16):
        for j in range(16):
            window = padded[i : i + 2 * radius + 1, j : j + 2 * radius + 1]
            expected[i, j] = (window * np.outer(weights, weights)).sum() / weights.sum() ** 2
    np.testing.assert_allclose(blurred, expected, atol=1e-6)
    assert abs(sharp - blurred).max() > 0.01


def test_the_parts_of_the_photographs_are_disjoint_and_together_the_whole() -> None:
    for photograph, train, held_out in zip(
        load_sample_images().images, ood._photographs("train"), ood._photographs("held_out"), strict=True
    ):
        grey = (photograph @ np.array([0.299, 0.587, 0.114])) / 255
        assert train.shape[-1] == 512
        assert held_out.shape[-1] == 128
        np.testing.assert_allclose(torch.cat([train, held_out], dim=-1)[0].numpy(), grey, atol=1e-6)


def test_crops_are_cut_from_their_own_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Training parts are flat; held-out parts grow lighter from top to bottom.
    parts: dict[str, list[Tensor]] = {
        "train": [torch.zeros(1, 200, 300)] * 2,
        "held_out": [torch.linspace(0, 1, 200).view(1, 200, 1).expand(1, 200, 140)] * 2,
    }
    monkeypatch.setattr(ood, "_photographs", parts.__getitem__)
    flat, graded = PhotographCrops(30, "train"), PhotographCrops(30, "held_out")
    for i in range(30):
        assert flat[i].std() < 1e-6
        assert graded[i].std() > 0.05


def test_crops_come_from_both_photographs_and_reach_every_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = list[tuple[int, int, int, int, int]]()

    class Recording:
        def __init__(self, number: int) -> None:
            self.number, self.shape = number, (1, 60, 90)

        def __getitem__(self, place: Any) -> Tensor:
            _, rows, columns = place
            reads.append((self.number, rows.start, rows.stop, columns.start, columns.stop))
            return torch.rand(1, rows.stop - rows.start, columns.stop - columns.start)

    monkeypatch.setattr(ood, "_photographs", lambda part: cast(Any, [Recording(0), Recording(1)]))
    crops = PhotographCrops(400)
    for i in range(400):
        crops[i]
    numbers, tops, bottoms, lefts, rights = np.array(reads).T
    assert np.bincount(numbers).tolist() == [200, 200]
    sides = bottoms - tops
    assert (sides == rights - lefts).all()
    assert (sides.min(), sides.max()) == (16, 60)  # at most the photograph's height
    assert (tops.min(), bottoms.max(), lefts.min(), rights.max()) == (0, 60, 0, 90)
    assert 30 < np.median(sides) < 60  # 16·8^u has the median 45


def test_indices_outside_are_refused() -> None:
    for dataset in (UniformNoise(3, (1, 2, 2)), PhotographCrops(3)):
        for index in (-1, 3):
            with pytest.raises(IndexError, match="0 … 2"):
                dataset[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1 .* got 0 and 16"),
        ({"image_size": 1}, "image_size at least 2, .* and 1$"),
        ({"contrast": (0.2, 0.1)}, "contrast"),
        ({"contrast": (0.0, 0.1)}, "contrast"),
        ({"brightness": 1.1}, "brightness .* 1.1"),
        ({"blur": -0.5}, "blur .* -0.5"),
        ({"blur": float("nan")}, "blur .* nan"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhotographCrops(**arguments)


def test_noise_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="size and shape must be positive"):
        UniformNoise(3, (1, 0, 2))
