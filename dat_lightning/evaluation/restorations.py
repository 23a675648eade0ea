"""What an evaluation does to images before an edit is to undo it: hides a part, adds noise, or shrinks them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from dat_lightning.core.constraints import pooled
from dat_lightning.core.editing import Edit, denoising, inpainting, super_resolution
from dat_lightning.core.errors import InputError, require_choice, require_counts
from dat_lightning.core.random_streams import normal_noise

Region = Literal["center", "bottom", "right"]


@dataclass(frozen=True, kw_only=True)
class Restoration(ABC):
    """A way to degrade images, with the walk that is to undo it; a value, by whose fields figures are told apart.

    Attributes:
        step_size: L2 length of a step of the walk.
        num_steps: How many of them.

    Raises:
        InputError: If the step is negative or not finite, or the number of steps no whole one of at least 1.
    """

    step_size: float
    num_steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.step_size < math.inf:
            raise InputError(f"step_size must be a finite length of at least 0, got {self.step_size}")
        require_counts(1, num_steps=self.num_steps)

    @property
    @abstractmethod
    def name(self) -> str:
        """Tells it from others, in names of figures and files."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What happens to an image."""

    @abstractmethod
    def degraded(self, x: Tensor, indices: Sequence[int], seed: int) -> Tensor:
        """Returns what is left of images: all that may be known when they are restored, (N, C, H, W) in [0, 1].

        Args:
            x: Originals, likewise.
            indices: Their global indices, (N,), by which randomness is drawn.
            seed: Seed of its streams.
        """

    @abstractmethod
    def edit(self, degraded: Tensor) -> Edit:
        """Returns the edit that is to give the originals of degraded images (N, C, H, W) back."""

    def simple(self, degraded: Tensor) -> Tensor:
        """Returns what does without a network, to compare with; by default where the walk starts."""
        return self.edit(degraded).start


@dataclass(frozen=True, kw_only=True)
class Inpainting(Restoration):
    """Hides a part of the images behind grey, and fills it again; the simple way is the smoothest filling.

    Attributes:
        region: The central square of half the height and width, the lower half, or the right half.

    Raises:
        InputError: If the region is another one.
    """

    region: Region = "center"
    step_size: float = 0.5
    num_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Region), region=self.region)

    @property
    def name(self) -> str:
        """Such as ``inpainting_center``."""
        return f"inpainting_{self.region}"

    @property
    def words(self) -> str:
        """Which part is hidden."""
        parts = {"center": "central quarter", "bottom": "lower half", "right": "right half"}
        return f"the {parts[self.region]} hidden behind grey"

    def degraded(self, x: Tensor, indices: Sequence[int], seed: int) -> Tensor:
        """Returns images with a grey part."""
        return torch.where(self.mask(*x.shape[2:]).to(x.device), 0.5, x)

    def edit(self, degraded: Tensor) -> Edit:
        """Returns the edit that changes the hidden part alone."""
        return inpainting(degraded, self.mask(*degraded.shape[2:]))

    def mask(self, height: int, width: int) -> Tensor:
        """Returns what is hidden, bool (H, W)."""
        mask = torch.zeros(height, width, dtype=torch.bool)
        if self.region == "center":
            mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
        elif self.region == "bottom":
            mask[height // 2 :] = True
        else:
            mask[:, width // 2 :] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class Denoising(Restoration):
    """Adds Gaussian noise, clipped to [0, 1] with the image, and takes it away inside an L2 ball of radius σ√d.

    The simple way is a Gaussian filter.

    Attributes:
        sigma: Standard deviation, in units of [0, 1] pixels.
        blur: That of the filter, in pixels.

    Raises:
        InputError: If sigma is outside of (0, 1], or the filter's deviation is not positive and finite.
    """

    sigma: float = 0.2
    blur: float = 0.8
    step_size: float = 0.1
    num_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma <= 1:
            raise InputError(f"sigma must lie in (0, 1], in units of [0, 1] pixels, got {self.sigma}")
        if not 0 < self.blur < math.inf:
            raise InputError(f"blur must be a finite deviation above 0, got {self.blur}")

    @property
    def name(self) -> str:
        """Such as ``denoising_0.2``."""
        return f"denoising_{self.sigma:g}"

    @property
    def words(self) -> str:
        """How strong the noise is."""
        return f"with Gaussian noise of sigma {self.sigma:g}"

    def degraded(self, x: Tensor, indices: Sequence[int], seed: int) -> Tensor:
        """Returns noisy images; the noise is of a stream of each image's own."""
        noise = normal_noise(seed, f"noise of {self.name}", indices, tuple(x.shape[1:])).to(x)
        return (x + self.sigma * noise).clamp(0, 1)

    def edit(self, degraded: Tensor) -> Edit:
        """Returns the edit of the noisy images."""
        return denoising(degraded, self.sigma)

    def simple(self, degraded: Tensor) -> Tensor:
        """Returns filtered images."""
        # Images are reflected at their border, once.
        radius = min(math.ceil(2 * self.blur), min(degraded.shape[2:]) - 1)
        filtered: Tensor = gaussian_blur(degraded, [2 * radius + 1] * 2, [self.blur] * 2)
        return filtered


@dataclass(frozen=True, kw_only=True)
class SuperResolution(Restoration):
    """Averages blocks of pixels, and sharpens the image so that the averages stay; the simple way is bicubic.

    Attributes:
        factor: Side of a block; it divides the images' sides.

    Raises:
        InputError: If it is no whole number of at least 2.
    """

    factor: int = 2
    step_size: float = 0.1
    num_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(2, factor=self.factor)

    @property
    def name(self) -> str:
        """Such as ``super_resolution_2``."""
        return f"super_resolution_{self.factor}"

    @property
    def words(self) -> str:
        """How much smaller it is."""
        return f"averaged over {self.factor} x {self.factor} pixels"

    def degraded(self, x: Tensor, indices: Sequence[int], seed: int) -> Tensor:
        """Returns images of blocks."""
        small = pooled(x, self.factor).clamp(0, 1)
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def edit(self, degraded: Tensor) -> Edit:
        """Returns the edit that keeps the averages."""
        # All pixels of a block are alike, and one is read without rounding.
        return super_resolution(degraded[..., :: self.factor, :: self.factor], self.factor)
