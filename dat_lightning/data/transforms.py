"""Augmentations of CIFAR and ImageNet, from PIL images to tensors in [0, 1]; all randomness is torch's.

Each takes images of any size; besides PIL images, tensors (C, H, W), uint8 or float in [0, 1], such as noise.
The geometry is done on uint8 tensors, which torchvision resizes about three times as fast as PIL images; the results
differ by two levels of 255 at most, in about one pixel of a hundred. Evaluation and AutoAugment work on PIL images, as
published results do.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms import v2

from dat_lightning.core.errors import InputError, require_at_least, require_choice
from dat_lightning.data.draws import Transform
from dat_lightning.data.pixels import resized_by_pil

Interpolation = Literal["bilinear", "bicubic"]

# Of torch's bicubic kernel (a = −3/4), whose weights of one sign sum to 19/16 and of the other to 3/16 at the most, in
# each direction: (19/16)² + (3/16)² − 1.
_OVERSHOOT = 0.45
# Rounding.
_TOLERANCE = 1e-3


class Cutout(v2.Transform):  # type: ignore[misc]
    """Covers a square around a random pixel of an image tensor (C, H, W) in [0, 1]; at the border a part of it.

    Source: DeVries and Taylor 2017, arXiv 1708.04552, §3.2.

    Args:
        size: Side of the square, in pixels.
        fill: Value inside the square; the source fills with the mean, which is 0 after its normalisation.

    Raises:
        InputError: If the size is not positive, or the value outside [0, 1].
    """

    _transformed_types = (Tensor,)

    def __init__(self, size: int, fill: float = 0.0) -> None:
        super().__init__()
        require_at_least(1, size=size)
        if not 0 <= fill <= 1:
            raise InputError(f"fill must lie in [0, 1], got {fill}")
        self.size = size
        self.fill = fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Returns the centre."""
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"y": int(torch.randint(height, ())), "x": int(torch.randint(width, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Returns the image with the square covered."""
        top, left = params["y"] - self.size // 2, params["x"] - self.size // 2
        covered = inpt.clone()
        covered[..., max(top, 0) : top + self.size, max(left, 0) : left + self.size] = self.fill
        return covered


class CheckUnitRange(v2.Transform):  # type: ignore[misc]
    """Leaves an image as it is, unless it is a float tensor that is not in [0, 1].

    A data set's own bicubic resize may have overshot, which is tolerated: by 0.30 with torch's antialiasing and 0.45
    without, at the most, and in at most 40 % of an image's pixels, where that is black and white as print. Pixels from
    0 to 255 and most normalised ones reach beyond, or are outside in most of some image. NaN and infinite pixels pass:
    the guard of a training step skips and keeps their batch.

    Raises:
        InputError: If a finite pixel is outside [0, 1] by more than 0.45, or more than half of them are outside.
    """

    _transformed_types = (Tensor,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Returns the image."""
        if not inpt.is_floating_point():
            return inpt
        finite = inpt[inpt.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
        share = float((finite - finite.clamp(0, 1)).abs().gt(_TOLERANCE).float().mean()) if low < 0 or high > 1 else 0.0
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT or share > 0.5:
            raise InputError(
                f"float pixels must lie in [0, 1], got values in [{low:.3g}, {high:.3g}], {share:.0%} of them outside:"
                " let the data set give PIL images, uint8 tensors, or floats that are neither scaled nor normalised"
            )
        return inpt


class ToUnitRange(v2.Transform):  # type: ignore[misc]
    """Makes a tensor a float32 tensor in [0, 1]; of uint8, level k becomes the float nearest to k / 255.

    torchvision's ToDtype multiplies by the rounded 1 / 255 instead, which is off in the last place for half of the
    levels: images that other sources divide by 255 would not be equal to ours. Float tensors of any precision are
    clipped to [0, 1], since bicubic interpolation overshoots; :class:`CheckUnitRange` comes first.

    Raises:
        InputError: If a tensor is of another type.
    """

    _transformed_types = (Tensor,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Returns the float tensor."""
        if inpt.is_floating_point():
            return inpt.float().clamp(0, 1)
        if inpt.dtype != torch.uint8:
            raise InputError(f"images must be PIL images, uint8 tensors or float tensors in [0, 1], got {inpt.dtype}")
        return inpt.float().div_(255)


class Squash(v2.Transform):  # type: ignore[misc]
    """Brings an image tensor (C, H, W) to one height and width, without a crop: what is not of this shape is squashed.

    Eight-bit images are resized by PIL, float images by torch; bilinear, and smoothed where they become smaller.

    Args:
        size: Height and width.

    Raises:
        InputError: If one of them is not positive.
    """

    _transformed_types = (Tensor,)

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        height, width = size
        require_at_least(1, height=height, width=width)
        self.size = (height, width)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Returns the image in its new size."""
        if inpt.dtype == torch.uint8:
            return resized_by_pil(inpt, self.size)
        return v2.functional.resize(inpt, list(self.size), v2.InterpolationMode.BILINEAR, antialias=True)


def cifar_weak(image_size: int = 32) -> Transform:
    """Returns a shift by up to four pixels over a black border, and a flip."""
    return _composed(v2.PILToTensor(), *_shift_and_flip(image_size))


def cifar_seeds(image_size: int, *, resized_crop: bool = False, gen: v2.Transform | None = None) -> Transform:
    """Returns what OOD seeds have with the CIFAR recipes: what ``x_gen`` has, and so borders if that has borders.

    Args:
        image_size: Height and width of the result.
        resized_crop: Whether a part of 8 % to all of the image's area is cut out first, as of photographs.
        gen: The transform of ``x_gen``, of eight-bit tensors; by default that of :func:`cifar_weak`.
    """
    if resized_crop:
        first = [v2.RandomResizedCrop(_checked_size(image_size), antialias=True)]
    else:
        first = _resize_and_crop(image_size, image_size, "bicubic")
    augmented = _shift(image_size) if gen is None else [gen]
    return _composed(v2.PILToTensor(), *first, *augmented)


def cifar_strong(image_size: int = 32) -> Transform:
    """Returns a shift, a flip, AutoAugment's policy for CIFAR-10 (arXiv 1805.09501), and a cutout of 16 pixels."""
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    return _composed(*_shift_and_flip(image_size), policy, v2.PILToTensor(), after=Cutout(16))


def imagenet_weak(image_size: int, interpolation: Interpolation = "bilinear") -> Transform:
    """Returns a resize of the shorter side to ``image_size``, the centre, and a flip."""
    resize = _resize_and_crop(image_size, image_size, interpolation)
    return _composed(v2.PILToTensor(), *resize, v2.RandomHorizontalFlip())


def imagenet_strong(image_size: int, interpolation: Interpolation = "bilinear") -> Transform:
    """Returns 8 % to all of the image's area, resized to ``image_size``, and a flip; for OOD seeds too."""
    return seed_crop(image_size, (0.08, 1.0), interpolation)


def seed_crop(
    image_size: int, scale: tuple[float, float] = (0.08, 1.0), interpolation: Interpolation = "bilinear"
) -> Transform:
    """Returns a part of the image whose share of the area lies in ``scale``, resized to ``image_size``, and a flip.

    Raises:
        InputError: If ``scale`` is no range of shares, or another argument is outside its range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"scale must be a range within (0, 1], got {scale}")
    size, mode = _checked_size(image_size), _mode(interpolation)
    crop = v2.RandomResizedCrop(size, scale=tuple(scale), interpolation=mode, antialias=True)
    return _composed(v2.PILToTensor(), crop, v2.RandomHorizontalFlip())


def evaluation_resize(
    image_size: int, resize_size: int | None = None, interpolation: Interpolation = "bicubic"
) -> Transform:
    """Returns a resize of the shorter side to ``resize_size``, by default ``image_size``, and the centre.

    An image that has the size already keeps its pixels.

    Raises:
        InputError: If ``resize_size`` is below ``image_size``, or another argument is outside its range.
    """
    resize = image_size if resize_size is None else resize_size
    if resize < image_size:
        raise InputError(f"resize_size must be at least image_size {image_size}, got {resize}")
    return _composed(*_resize_and_crop(image_size, resize, interpolation), v2.PILToTensor())


def eight_bit(transform: v2.Transform) -> Transform:
    """Returns a transform of eight-bit image tensors (C, H, W) as one of any images to tensors in [0, 1]."""
    return _composed(v2.PILToTensor(), transform)


def squash(size: Sequence[int]) -> Transform:
    """Returns a resize of both sides to ``size``, height and width: no crop, no flip, nothing random."""
    return _composed(v2.PILToTensor(), Squash(size))


def _resize_and_crop(image_size: int, resize_size: int, interpolation: Interpolation) -> list[v2.Transform]:
    size, mode = _checked_size(image_size), _mode(interpolation)
    return [v2.Resize(resize_size, interpolation=mode, antialias=True), v2.CenterCrop(size)]


def _shift_and_flip(image_size: int) -> list[v2.Transform]:
    # The resize leaves CIFAR's own images as they are; it is for other sources.
    resize = _resize_and_crop(image_size, image_size, "bicubic")
    return [*resize, *_shift(image_size)]


def _shift(image_size: int) -> list[v2.Transform]:
    return [v2.RandomCrop(image_size, padding=4), v2.RandomHorizontalFlip()]


def _composed(*transforms: v2.Transform, after: v2.Transform | None = None) -> Transform:
    """The check, transforms of eight-bit images, the conversion to [0, 1], and one of the result."""
    last = [] if after is None else [after]
    composed: Transform = v2.Compose([CheckUnitRange(), *transforms, ToUnitRange(), *last])
    return composed


def _checked_size(image_size: int) -> int:
    require_at_least(1, image_size=image_size)
    return image_size


def _mode(interpolation: Interpolation) -> v2.InterpolationMode:
    require_choice(get_args(Interpolation), interpolation=interpolation)
    return v2.InterpolationMode(interpolation)
