import math
import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dat_lightning.core.errors import InputError
from dat_lightning.data.digits import load_images
from dat_lightning.data.draws import Transform
from dat_lightning.data.transforms import (
    CheckUnitRange,
    Cutout,
    ToUnitRange,
    cifar_strong,
    cifar_weak,
    evaluation_resize,
    imagenet_strong,
    imagenet_weak,
    seed_crop,
)

RNG = np.random.default_rng(0)
SMALL = Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def photograph(width: int, height: int) -> Image.Image:
    """A smooth image with all levels, different at every place."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    blue = 127 + 127 * np.sin(x / 9 + y / 7)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).round().astype(np.uint8))


RANDOM: dict[str, Callable[[int], Transform]] = {
    "cifar_weak": cifar_weak,
    "cifar_strong": cifar_strong,
    "imagenet_weak": imagenet_weak,
    "imagenet_strong": imagenet_strong,
    "seed_crop": lambda size: seed_crop(size, (0.1, 0.5)),
}
ALL: dict[str, Callable[[int], Transform]] = {
    **RANDOM,
    "evaluation_resize": evaluation_resize,
    "evaluation_resize and crop": lambda size: evaluation_resize(size, size * 292 // 256),
}


def seeded(transform: Transform, image: Any, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return transform(image)


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255))


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize("size", [(32, 32), (20, 45), (300, 80), (64, 64), (1, 3)])
@pytest.mark.parametrize("image_size", [32, 48])
def test_images_of_any_size_come_out_square_and_in_range(
    make: Callable[[int], Transform], size: tuple[int, int], image_size: int
) -> None:
    transform = make(image_size)
    for seed in range(3):
        image = seeded(transform, photograph(*size), seed)
        assert image.shape == (3, image_size, image_size)
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("source", [SMALL, photograph(90, 70)], ids=["small", "large"])
def test_results_are_a_function_of_torch_s_seed_alone(make: Callable[[int], Transform], source: Image.Image) -> None:
    transform = make(32)
    results = [seeded(transform, source, seed) for seed in range(12)]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before: Any = random.getstate(), np.random.get_state()  # noqa: NPY002
    again = [seeded(make(32), source, seed) for seed in range(12)]
    after: Any = random.getstate(), np.random.get_state()  # noqa: NPY002
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert before[0] == after[0]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert len({image.numpy().tobytes() for image in results}) >= (2 if make is imagenet_weak else 8)


@pytest.mark.parametrize("transform", [evaluation_resize(32), evaluation_resize(32, 40)])
def test_evaluation_consumes_no_randomness(transform: Transform) -> None:
    state = torch.get_rng_state()
    assert torch.equal(transform(photograph(50, 60)), transform(photograph(50, 60)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_white_stays_exactly_one_and_the_image_given_stays_as_it_was(make: Callable[[int], Transform]) -> None:
    white = Image.new("RGB", (61, 47), "white")
    image = seeded(make(32), white, 3)
    assert image.max() == 1
    # The shift and the cutout bring black; AutoAugment may invert or shear. Everything else has one level.
    if not (make is cifar_weak or make is cifar_strong):
        assert image.min() == 1
    assert white.getextrema() == ((255, 255),) * 3
    tensor = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    copy = tensor.clone()
    seeded(make(32), tensor, 0)
    assert torch.equal(tensor, copy)


def test_every_level_becomes_the_float_nearest_to_its_fraction_of_255() -> None:
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=-1))
    image = evaluation_resize(16)(levels)
    expected = np.array([np.float32(k / 255) for k in range(256)]).reshape(16, 16)
    assert np.array_equal(image[1].numpy(), expected)


def test_tensors_are_taken_as_images_are() -> None:
    uint8 = torch.from_numpy(np.asarray(SMALL).transpose(2, 0, 1).copy())
    for transform in (cifar_weak(), imagenet_weak(48), imagenet_strong(16), evaluation_resize(32)):
        assert torch.equal(seeded(transform, uint8, 1), seeded(transform, SMALL, 1))
    noise = torch.rand(3, 32, 32)
    assert torch.equal(evaluation_resize(32)(noise), noise)
    # Bicubic interpolation of a hard edge overshoots before it is clipped.
    edge = torch.zeros(3, 8, 8)
    edge[..., 4:] = 1
    enlarged = evaluation_resize(32)(edge)
    assert [enlarged.min(), enlarged.max()] == [0, 1]
    with pytest.raises(InputError, match=r"images must be PIL images, .* got torch.int32"):
        ToUnitRange()(torch.zeros(3, 2, 2, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_precision_become_float32(dtype: torch.dtype) -> None:
    """Eighths and sixteenths are exact in all of them."""
    image = torch.arange(3 * 32 * 32).view(3, 32, 32) % 17 / 16
    resized = evaluation_resize(32)(image.to(dtype))
    assert resized.dtype == torch.float32
    assert torch.equal(resized, image)


def test_weak_cifar_images_are_shifted_by_up_to_four_pixels_over_black_and_flipped() -> None:
    padded = torch.nn.functional.pad(tensor_of(SMALL), (4, 4, 4, 4))
    where = {}
    for dy in range(9):
        for dx in range(9):
            crop = padded[:, dy : dy + 32, dx : dx + 32].contiguous()
            where[crop.numpy().tobytes()] = (dy, dx, False)
            where[crop.flip(-1).contiguous().numpy().tobytes()] = (dy, dx, True)
    transform = cifar_weak()
    torch.manual_seed(0)
    found = [where[transform(SMALL).contiguous().numpy().tobytes()] for _ in range(400)]
    assert {dy for dy, _, _ in found} == {dx for _, dx, _ in found} == set(range(9))
    assert 140 < sum(flipped for *_, flipped in found) < 260


def test_strong_cifar_images_have_the_policy_between_shift_and_cutout() -> None:
    strong, policy = cifar_strong(), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    changed = 0
    for seed in range(40):
        image = seeded(strong, SMALL, seed)
        # The same draws in the same order, by hand.
        torch.manual_seed(seed)
        shifted = (cifar_weak()(SMALL) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        expected = tensor_of(policy(Image.fromarray(shifted)))
        y, x = int(torch.randint(32, ())), int(torch.randint(32, ()))
        expected[:, max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0
        assert torch.equal(image, expected)
        changed += not torch.equal(expected, seeded(cifar_weak(), SMALL, seed))
    assert changed == 40


def test_cutout_covers_a_square_around_each_pixel_clipped_at_the_border() -> None:
    image = torch.full((3, 9, 7), 0.5)
    for size in (1, 4, 5):
        cutout, seen = Cutout(size, fill=0.25), set()
        for seed in range(600):
            torch.manual_seed(seed)
            covered = cutout(image)
            assert torch.equal(covered == 0.25, (covered[:1] == 0.25).expand(3, 9, 7))
            assert set(covered.unique().tolist()) == {0.25, 0.5}
            rows, columns = ((covered[0] == 0.25).any(dim).nonzero().flatten().tolist() for dim in (1, 0))
            assert (covered == 0.25).sum() == 3 * len(rows) * len(columns)
            seen.add((rows[0], rows[-1], columns[0], columns[-1]))
        half = size // 2
        spans = [{(max(0, c - half), min(length, c - half + size) - 1) for c in range(length)} for length in (9, 7)]
        assert seen == {(*vertical, *horizontal) for vertical in spans[0] for horizontal in spans[1]}
    assert (image == 0.5).all()


def test_cutout_s_centre_is_uniform_over_the_pixels() -> None:
    cutout, counts = Cutout(1), np.zeros((4, 5))
    torch.manual_seed(0)
    for _ in range(4000):
        counts += (cutout(torch.ones(1, 4, 5))[0] == 0).numpy()
    assert counts.sum() == 4000
    # 200 each, with a standard deviation of 14.
    assert 140 < counts.min() <= counts.max() < 260


def published_resize(image: Image.Image, resize: int, crop: int, mode: Image.Resampling) -> Tensor:
    """The shorter side to ``resize`` and the centre, with Pillow alone."""
    scale = resize / min(image.size)
    width, height = (resize if side == min(image.size) else int(side * scale) for side in image.size)
    image = image.resize((width, height), mode)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return tensor_of(image.crop((left, top, left + crop, top + crop)))


@pytest.mark.parametrize("size", [(90, 70), (33, 64), (292, 300), (32, 40)])
def test_evaluation_is_pillow_s_resize_to_the_last_bit(size: tuple[int, int]) -> None:
    image = photograph(*size)
    bicubic, bilinear = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
    assert torch.equal(evaluation_resize(32)(image), published_resize(image, 32, 32, bicubic))
    assert torch.equal(evaluation_resize(56, 64)(image), published_resize(image, 64, 56, bicubic))
    assert torch.equal(evaluation_resize(56, 64, "bilinear")(image), published_resize(image, 64, 56, bilinear))
    assert torch.equal(evaluation_resize(256, 292)(image), published_resize(image, 292, 256, bicubic))


def test_an_image_that_has_the_size_keeps_its_pixels() -> None:
    assert torch.equal(evaluation_resize(32)(SMALL), tensor_of(SMALL))
    flips = {tensor_of(SMALL).numpy().tobytes(), tensor_of(SMALL).flip(-1).contiguous().numpy().tobytes()}
    assert {seeded(imagenet_weak(32), SMALL, seed).contiguous().numpy().tobytes() for seed in range(12)} == flips


@pytest.mark.parametrize("size", [(90, 70), (300, 420), (33, 50)])
def test_weak_imagenet_images_are_pillow_s_to_two_levels_and_flipped_half_the_time(size: tuple[int, int]) -> None:
    image = photograph(*size)
    expected = published_resize(image, 64, 64, Image.Resampling.BILINEAR)
    flips = 0
    for seed in range(40):
        result = seeded(imagenet_weak(64), image, seed)
        errors = [(result - e).abs().max() * 255 for e in (expected, expected.flip(-1))]
        assert min(errors) < 2.5
        flips += bool(errors[1] < errors[0])
    assert 10 < flips < 30


def box_of(image: Tensor, width: int, height: int) -> tuple[float, float, bool]:
    """Width and height of the part of a ``photograph`` that a result shows, and whether it is mirrored."""
    size = image.shape[-1]
    # Red grows with x by 1 / (width − 1), green with y, and interpolation keeps slopes away from the border.
    inner = slice(size // 4, 3 * size // 4)
    slope_x = (image[0, :, inner].diff(dim=1)).mean().item() * (width - 1)
    slope_y = (image[1, inner].diff(dim=0)).mean().item() * (height - 1)
    return abs(slope_x) * size, slope_y * size, slope_x < 0


@pytest.mark.parametrize(
    ("transform", "low", "high"),
    [(imagenet_strong(64), 0.08, 1.0), (seed_crop(64), 0.08, 1.0), (seed_crop(64, (0.1, 0.3)), 0.1, 0.3)],
)
def test_crops_have_the_share_and_the_shape_asked_for(transform: Transform, low: float, high: float) -> None:
    width, height = 200, 160
    source = photograph(width, height)
    torch.manual_seed(0)
    boxes = [box_of(transform(source), width, height) for _ in range(300)]
    shares = np.array([w * h / (width * height) for w, h, _ in boxes])
    ratios = np.log([w / h for w, h, _ in boxes])
    assert shares.min() > 0.93 * low
    assert shares.max() < 1.05 * high
    spread = high - low
    assert shares.min() < low + 0.06 * spread
    assert shares.max() > high - 0.15 * spread
    assert abs(ratios).max() < math.log(4 / 3) + 0.06
    assert ratios.max() - ratios.min() > 0.4
    assert 110 < sum(mirrored for *_, mirrored in boxes) < 190


def test_interpolation_is_the_one_asked_for() -> None:
    image = photograph(90, 70)
    makers: list[Callable[[Any], Transform]] = [
        lambda mode: imagenet_weak(32, mode),
        lambda mode: imagenet_strong(32, mode),
        lambda mode: seed_crop(32, (0.5, 1.0), mode),
        lambda mode: evaluation_resize(32, 40, mode),
    ]
    noisy = Image.fromarray(RNG.integers(0, 256, (70, 90, 3), dtype=np.uint8))
    for make in makers:
        results = [seeded(make(mode), noisy, 0) for mode in ("bilinear", "bicubic")]
        assert not torch.equal(*results)
        with pytest.raises(ValueError, match=r"interpolation must be one of .*'bicubic'.*, got 'nearest'"):
            make("nearest")
    assert torch.equal(seeded(imagenet_weak(32), image, 0), seeded(imagenet_weak(32, "bilinear"), image, 0))
    assert torch.equal(evaluation_resize(32, 40)(noisy), evaluation_resize(32, 40, "bicubic")(noisy))


def test_settings_that_differ_show_in_the_repr() -> None:
    transforms: list[Any] = [
        cifar_weak(),
        cifar_weak(64),
        cifar_strong(),
        cifar_strong(64),
        imagenet_weak(32),
        imagenet_weak(32, "bicubic"),
        imagenet_strong(32),
        imagenet_strong(32, "bicubic"),
        imagenet_strong(64),
        seed_crop(32, (0.1, 1.0)),
        seed_crop(32, (0.08, 0.9)),
        evaluation_resize(32),
        evaluation_resize(32, 40),
        evaluation_resize(32, 40, "bilinear"),
        evaluation_resize(36, 40),
        Cutout(8),
        Cutout(9),
        Cutout(8, 0.5),
    ]
    for a, b in combinations(transforms, 2):
        assert repr(a) != repr(b)
    assert repr(seed_crop(32)) == repr(imagenet_strong(32))
    assert "object at 0x" not in "".join(map(repr, transforms))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cifar_weak(0), "image_size must be at least 1, got 0"),
        (lambda: seed_crop(-1), "image_size must be at least 1, got -1"),
        (lambda: evaluation_resize(64, 63), "resize_size must be at least image_size 64, got 63"),
        (lambda: seed_crop(32, (0, 1)), r"scale must be a range within \(0, 1\], got \(0, 1\)"),
        (lambda: seed_crop(32, (0.5, 0.4)), "scale must be a range"),
        (lambda: seed_crop(32, (0.5, 1.1)), "scale must be a range"),
        (lambda: Cutout(0), "size must be at least 1, got 0"),
        (lambda: Cutout(8, 1.5), r"fill must lie in \[0, 1\], got 1.5"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [12, 17, 24, 40, 100])
def test_what_any_bicubic_resize_overshoots_is_tolerated(antialias: bool, size: int) -> None:
    """Of images as black and white as can be: digits, single points, and noise."""
    digits = (load_images()[0][:100] > 0.5).float()
    points = torch.rand(100, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for images in (digits, (points > 0.97).float(), (points < 0.97).float(), (points > 0.5).float()):
        resized = v2.functional.resize(
            images, [size, size], interpolation=v2.InterpolationMode.BICUBIC, antialias=antialias
        )
        if size > 16:
            assert resized.min() < -0.1
            assert resized.max() > 1.1
        for image in resized:
            assert CheckUnitRange()(image) is image


@pytest.mark.parametrize(("mean", "std"), [(0.2, 1.0), (0.3, 1.2), (0.25, 0.8), (0.5, 1.0), (0.1307, 0.3081)])
def test_a_few_normalised_images_are_refused_also_near_the_range(mean: float, std: float) -> None:
    images = (load_images()[0][:30] - mean) / std
    with pytest.raises(InputError, match=r"float pixels must lie in \[0, 1\], got values in .*, \d+% of them outside"):
        list(map(CheckUnitRange(), images))
    assert CheckUnitRange()(images[0] * std + mean).shape == (1, 16, 16)
