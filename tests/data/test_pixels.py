"""Eight-bit pixels."""

import pytest
import torch

from dat_lightning.data import to_uint8_rgb


def test_values_are_rounded_to_the_nearest_level() -> None:
    levels = torch.arange(256) / 255
    assert to_uint8_rgb(levels.view(1, 1, 16, 16)).flatten(2)[0, 0].tolist() == list(range(256))
    # 0.999 · 255 = 254.7, which truncation would lose; beyond the range there is no wrap-around.
    odd = torch.tensor([0.999, 0.5 / 255 + 1e-4, 1.2, -0.1]).view(1, 1, 2, 2)
    assert to_uint8_rgb(odd)[0, 2].flatten().tolist() == [255, 1, 255, 0]


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
