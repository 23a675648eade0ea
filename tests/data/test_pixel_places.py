"""Where pixels come from: every draw's image, put together again from its data set's by the places."""

from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from dat_lightning import DigitsDataModule
from dat_lightning.core.errors import InputError
from dat_lightning.data import DrawStream
from dat_lightning.data.pixel_places import pixel_places
from dat_lightning.data.transforms import Cutout, cifar_strong, cifar_weak, imagenet_strong


class Images:
    """Eight-bit images, no two pixels of which are alike but by chance."""

    def __init__(self, *shape: int) -> None:
        self.images = torch.randint(256, (6, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Any:
        return self.images[index], index


@pytest.mark.parametrize("size", [32, 16])
def test_a_draw_is_its_image_at_the_places(size: int) -> None:
    """Shifts over a black border and flips, as CIFAR's weak augmentation has them."""
    images = Images(3, size, size)
    stream = DrawStream(images, cifar_weak(size), seed=4, name="gen")
    draws = list(range(9, 29))
    places = pixel_places(stream, draws, (size, size))
    assert places.shape == (20, size * size)
    for row, draw in zip(places.tolist(), draws, strict=True):
        found, source = stream(draw)[0].flatten(1), images.images[stream.index(draw)].flatten(1)
        expected = [[int(channel[k]) if k >= 0 else 0 for k in row] for channel in source]
        assert torch.equal((found * 255).round(), torch.tensor(expected, dtype=torch.float32))
    assert (places < 0).any()
    assert len({tuple(row) for row in places.tolist()}) > 10


def test_a_draw_of_the_digits_is_its_image_at_the_places() -> None:
    data = DigitsDataModule(max_shift_clf=2)
    stream: Any = data.training_stream("clf")
    (places,) = pixel_places(stream, [1700], (16, 16))
    source = stream.dataset[stream.index(1700)][0].flatten()
    expected = torch.where(places >= 0, source[places.clamp_min(0)], 0)
    assert torch.equal(stream(1700)[0].flatten(), expected)


def test_what_is_covered_has_no_place() -> None:
    stream = DrawStream(Images(3, 8, 8), Cutout(4), seed=0, name="clf")
    (row,) = pixel_places(stream, [3], (8, 8))
    kept = row >= 0
    assert torch.equal(row[kept], torch.arange(64)[kept])
    assert 0 < int((~kept).sum()) <= 16


@pytest.mark.parametrize(
    "transform",
    [
        cifar_strong(16),
        imagenet_strong(16),
        v2.Compose([v2.Lambda(lambda image: 0.5 * image)]),
        v2.Compose([v2.Lambda(lambda image: image.clamp(max=1e-5))]),
        v2.Compose([v2.RandomRotation((20, 30), interpolation=v2.InterpolationMode.BILINEAR)]),
    ],
    ids=["AutoAugment", "RandomResizedCrop", "darker", "clipped", "rotated"],
)
def test_what_changes_values_is_refused(transform: Any) -> None:
    stream = DrawStream(Images(3, 16, 16), transform, seed=0, name="clf")
    with pytest.raises(InputError, match="augmentation of the 'clf' stream does more than to move pixels"):
        pixel_places(stream, list(range(20)), (16, 16))


def test_a_replayed_draw_is_the_draw_and_leaves_the_generator_alone() -> None:
    images = Images(3, 16, 16)
    stream = DrawStream(images, cifar_weak(16), seed=1, name="gen")
    before = torch.get_rng_state()
    assert torch.equal(stream.unaugmented(11), images.images[stream.index(11)])
    again = stream.replayed(11, stream.unaugmented(11))
    assert torch.equal(again, stream(11)[0])
    assert torch.equal(torch.get_rng_state(), before)
