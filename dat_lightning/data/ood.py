"""Out-of-distribution images: the seeds of contrastive samples and of generation."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import gaussian_blur

from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import stream_generator

# Share of each photograph's width that is kept for held-out seeds, at its right end.
HELD_OUT_SHARE = 0.2


class UniformNoise(Dataset[Tensor]):
    """Images of independent uniform pixels; image i is a pure function of (seed, i).

    Args:
        size: Number of images.
        shape: Channels, height and width.
        seed: Seed of the images; another seed gives other images.

    Raises:
        InputError: If a size is not positive.
    """

    def __init__(self, size: int, shape: Sequence[int], seed: int = 0) -> None:
        if min(size, *shape) < 1:
            raise InputError(f"size and shape must be positive, got {size} and {tuple(shape)}")
        self.size = size
        self.shape = tuple(shape)
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        """Returns image ``index``, (C, H, W) in [0, 1)."""
        if not 0 <= index < self.size:
            raise IndexError(f"image {index} is outside 0 … {self.size - 1}")
        return torch.rand(self.shape, generator=stream_generator(self.seed, "uniform noise", index))


class PhotographCrops(Dataset[Tensor]):
    """Grey crops of scikit-learn's two sample photographs, of many scales, at the brightness of handwritten digits.

    Crop i is a pure function of (seed, i): a photograph, a side of 16 to 128 pixels on a logarithmic scale, a place, a
    reflection, and a contrast. Training and held-out crops come from different parts of the photographs.

    Args:
        size: Number of crops.
        part: The left four fifths of each photograph, or the right fifth.
        image_size: Height and width of a crop after resizing.
        contrast: Range of a crop's standard deviation, before the blur.
        brightness: Mean of every crop before clipping to [0, 1].
        blur: Standard deviation of a Gaussian blur, in pixels of the resized crop; 0 for none.
        seed: Seed of the crops.

    Raises:
        InputError: If a number is outside its range.
    """

    def __init__(
        self,
        size: int = 4000,
        part: Literal["train", "held_out"] = "train",
        image_size: int = 16,
        contrast: tuple[float, float] = (0.07, 0.175),
        brightness: float = 0.3,
        blur: float = 0.8,
        seed: int = 0,
    ) -> None:
        if size < 1 or image_size < 2:
            raise InputError(f"size must be at least 1 and image_size at least 2, got {size} and {image_size}")
        if not 0 < contrast[0] <= contrast[1]:
            raise InputError(f"contrast must be a range of positive numbers, got {contrast}")
        if not 0 <= brightness <= 1:
            raise InputError(f"brightness must lie in [0, 1], got {brightness}")
        if not blur >= 0:
            raise InputError(f"blur must be at least 0, got {blur}")
        self.size = size
        self.part = part
        self.image_size = image_size
        self.contrast = contrast
        self.brightness = brightness
        self.blur = blur
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        """Returns crop ``index``, (1, image_size, image_size) in [0, 1]."""
        if not 0 <= index < self.size:
            raise IndexError(f"crop {index} is outside 0 … {self.size - 1}")
        generator = stream_generator(self.seed, "photograph crop", self.part, index)
        photograph = _photographs(self.part)[index % 2]
        height, width = photograph.shape[-2:]
        scale, top, left, flip, mirror, transpose, contrast = torch.rand(7, generator=generator).tolist()
        side = min(int(16 * 8**scale), height, width)
        y, x = int(top * (height - side + 1)), int(left * (width - side + 1))
        crop: Tensor = photograph[:, y : y + side, x : x + side].unsqueeze(0)
        size = (self.image_size, self.image_size)
        crop = F.interpolate(crop, size=size, mode="bilinear", antialias=True, align_corners=False)[0]
        crop = crop.flip(-1) if flip < 0.5 else crop
        crop = crop.flip(-2) if mirror < 0.5 else crop
        crop = crop.transpose(-1, -2) if transpose < 0.5 else crop
        deviation = self.contrast[0] + (self.contrast[1] - self.contrast[0]) * contrast
        # The small constant leaves a patch of plain sky nearly flat instead of blowing up its noise.
        crop = (crop - crop.mean()) / (crop.std() + 0.02) * deviation + self.brightness
        return _blurred(crop.clamp(0, 1), self.blur)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """The image (C, H, W), blurred."""
    if sigma == 0:
        return image
    # Borders are reflected, which needs a radius below the size.
    radius = min(math.ceil(3 * sigma), min(image.shape[-2:]) - 1)
    blurred: Tensor = gaussian_blur(image, kernel_size=[2 * radius + 1] * 2, sigma=[sigma, sigma])
    return blurred


@lru_cache(maxsize=2)
def _photographs(part: Literal["train", "held_out"]) -> list[Tensor]:
    """The photographs' parts as grey images (1, H, W) in [0, 1]."""
    # Importing scikit-learn takes seconds.
    from sklearn.datasets import load_sample_images

    parts = []
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601 luma
    for photograph in load_sample_images().images:
        grey = ((torch.from_numpy(photograph.copy()).float() / 255) @ weights).unsqueeze(0)
        cut = int((1 - HELD_OUT_SHARE) * grey.shape[-1])
        parts.append(grey[..., :cut] if part == "train" else grey[..., cut:])
    return parts
