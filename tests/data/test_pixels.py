"""Eight-bit pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dat_lightning.data import to_uint8_rgb
from dat_lightning.data.pixels import resized_by_pil


def test_values_are_rounded_to_the_nearest_level() -> None:
    levels = torch.arange(256) / 255
    assert to_uint8_rgb(levels.view(1, 1, 16, 16)).flatten(2)[0, 0].tolist() == list(range(256))
    # 0.999 · 255 = 254.7, which truncation would lose; beyond the range there is no wrap-around.
    odd = torch.tensor([0.999, 0.5 / 255 + 1e-4, 1.2, -0.1]).view(1, 1, 2, 2)
    assert to_uint8_rgb(odd)[0, 2].flatten().tolist() == [255, 1, 255, 0]


def test_values_are_cut_if_asked_for_and_eight_bit_images_keep_their_levels() -> None:
    levels = torch.arange(256) / 255
    assert to_uint8_rgb(levels.view(1, 1, 16, 16), "truncate").flatten(2)[0, 0].tolist() == list(range(256))
    odd = torch.tensor([0.999, 0.5 / 255 + 1e-4, 1.2, -0.1]).view(1, 1, 2, 2)
    assert to_uint8_rgb(odd, "truncate")[0, 2].flatten().tolist() == [254, 0, 255, 0]
    colours = torch.rand(2, 3, 4, 5)
    assert np.array_equal(to_uint8_rgb(colours, "truncate").numpy(), (colours.numpy() * 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(29, 31), (5, 40), (12, 7)])
def test_images_are_resized_as_pil_resizes_files(size: tuple[int, int]) -> None:
    pixels = torch.randint(256, (3, 3, 12, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = resized_by_pil(pixels, size)
    for image, resized in zip(pixels, found, strict=True):
        colours = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.asarray(colours.resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.array_equal(resized.permute(1, 2, 0).numpy(), expected)
    # One channel, seen three times, is as good.
    grey = resized_by_pil(pixels[:, :1].expand(-1, 3, -1, -1), size)
    assert torch.equal(grey, found[:, :1].expand(-1, 3, -1, -1))
    assert torch.equal(resized_by_pil(pixels, (12, 9)), pixels)


def test_colours_stay_and_grey_is_repeated() -> None:
    colours = torch.rand(2, 3, 4, 5)
    assert torch.equal(to_uint8_rgb(colours), (colours * 255).round().byte())
    grey = to_uint8_rgb(colours[:, :1])
    assert grey.shape == (2, 3, 4, 5)
    assert torch.equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 2, 4, 4), (1, 4, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must have shape"):
        to_uint8_rgb(torch.zeros(shape))
