"""What an edit of images keeps: pixels outside of a mask, or what a smaller image shows of them; and steps that do."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pixel_shuffle, pixel_unshuffle

from dat_lightning.core.errors import InputError, require_counts, require_kind
from dat_lightning.core.pixels import require_pixels
from dat_lightning.core.update_rules import STEEPEST, State, Step, UpdateRule


class Constraint(ABC):
    """A set of images given by linear equations, of which an ascent sees the part in [0, 1]."""

    @abstractmethod
    def tangent(self, direction: Tensor) -> Tensor:
        """Returns the part of directions (N, C, H, W) along which the equations go on to hold: the nearest such."""

    @abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """Returns the points of the set and of [0, 1] nearest to images (N, C, H, W) in L2."""


@dataclass(frozen=True, eq=False)
class FixedPixels(Constraint):
    """Images whose pixels outside of a mask are those of given ones, bit for bit.

    Attributes:
        known: The given images, (N, C, H, W), in [0, 1]; what rounding has brought out of it is clipped.
        mask: What may change, bool, (H, W) or four dimensions that broadcast to theirs, such as (N, 1, H, W); it is
            brought to their device.

    Raises:
        InputError: If the images or the mask are of another type or shape, or what is fixed is outside of [0, 1].
    """

    known: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        require_images(known=self.known)
        require_kind(Tensor, mask=self.mask)
        if self.mask.dtype != torch.bool:
            raise InputError(f"mask must be of type bool, true where pixels may change, got {self.mask.dtype}")
        shape, wanted = tuple(self.mask.shape), tuple(self.known.shape)
        # Of three dimensions the first would be taken for channels, and may have been meant for images.
        if len(shape) not in (2, 4) or not broadcasts(shape, wanted):
            raise InputError(f"mask must be (H, W), or four dimensions that broadcast to {wanted}, got {shape}")
        object.__setattr__(self, "mask", self.mask.to(self.known.device))
        # What the mask hides may be anything.
        require_pixels(torch.where(self.mask, 0, self.known), "known")
        object.__setattr__(self, "known", self.known.clamp(0, 1))

    def tangent(self, direction: Tensor) -> Tensor:
        """Returns directions that are zero outside of the mask."""
        return torch.where(self.mask, direction, 0)

    def nearest(self, x: Tensor) -> Tensor:
        """Returns images clipped to [0, 1] inside the mask, and the given pixels outside."""
        return torch.where(self.mask, x.clamp(0, 1), self.known)


@dataclass(frozen=True, eq=False)
class PooledPixels(Constraint):
    """Images whose average over blocks of ``factor`` × ``factor`` pixels are given: what smaller images show of them.

    Attributes:
        pooled: The smaller images, (N, C, h, w), in [0, 1]; what rounding has brought out of it is clipped.
        factor: Side of a block, 1 at least.

    Raises:
        InputError: If the factor is no whole number or less than 1, or the smaller images are none, or outside [0, 1],
            which no average is.
    """

    pooled: Tensor
    factor: int

    def __post_init__(self) -> None:
        require_counts(1, factor=self.factor)
        require_images(pooled=self.pooled)
        require_pixels(self.pooled, "pooled")
        object.__setattr__(self, "pooled", self.pooled.clamp(0, 1))

    def tangent(self, direction: Tensor) -> Tensor:
        """Returns directions less their mean over each block."""
        blocks = self._blocks(direction)
        return self._image(blocks - blocks.mean(2, keepdim=True))

    def nearest(self, x: Tensor) -> Tensor:
        """Returns the nearest images in [0, 1] with the given averages.

        Those of a block are clip(x − τ) to [0, 1] with the one number τ at which their mean is right (the conditions of
        Karush, Kuhn and Tucker). The mean falls with τ, in pieces that are linear between the points where some pixel
        begins or ends to be clipped, so that τ follows from the two points around it.
        """
        blocks, wanted = self._blocks(x), self.pooled.unsqueeze(2).to(x)
        corners = torch.cat([blocks - 1, blocks], 2).sort(2).values

        def corner(number: Tensor) -> tuple[Tensor, Tensor]:
            tau = corners.gather(2, number)
            return tau, (blocks - tau).clamp(0, 1).mean(2, keepdim=True)

        # By halving: the last corner whose mean is not too small. At the first, the mean is 1.
        left = torch.zeros_like(wanted, dtype=torch.long)
        last = corners.shape[2] - 1
        for power in reversed(range(last.bit_length())):
            further = (left + 2**power).clamp_max(last)
            left = torch.where(corner(further)[1] >= wanted, further, left)
        (low, more), (high, less) = corner(left), corner((left + 1).clamp_max(last))
        fraction = (more - wanted) / torch.where(more > less, more - less, 1)
        return self._image((blocks - (low + fraction * (high - low))).clamp(0, 1))

    def _blocks(self, x: Tensor) -> Tensor:
        """The pixels of each block, (N, C, factor², h, w)."""
        shape = (*self.pooled.shape[:2], *(side * self.factor for side in self.pooled.shape[2:]))
        if tuple(x.shape) != shape:
            raise InputError(f"images must be {self.factor} times as large as pooled, {shape}, got {tuple(x.shape)}")
        blocks: Tensor = pixel_unshuffle(x, self.factor).unflatten(1, (x.shape[1], self.factor**2))
        return blocks

    def _image(self, blocks: Tensor) -> Tensor:
        return pixel_shuffle(blocks.flatten(1, 2), self.factor)


@dataclass(frozen=True)
class Constrained(UpdateRule):
    """Moves as another rule does, along a constraint: its gradients are those along it, and it ends on it.

    The ball of a threat model with norm L2 around a point of the set keeps its images in the set; so does any without
    a ball. Tensors are compared by identity, so that this rule is for walks, not for configurations.

    Attributes:
        constraint: What to keep; of the images that walk, in their order.
        rule: The other rule, by default the steepest.

    Raises:
        InputError: If one of them is of another kind.
    """

    constraint: Constraint
    rule: UpdateRule = STEEPEST

    def __post_init__(self) -> None:
        require_kind(Constraint, constraint=self.constraint)
        require_kind(UpdateRule, rule=self.rule)

    @property
    def gradients_per_step(self) -> int:  # type: ignore[override]
        """Those of the other rule."""
        return self.rule.gradients_per_step

    @property
    def uses_noise(self) -> bool:  # type: ignore[override]
        """Whether the other rule does."""
        return self.rule.uses_noise

    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        """Returns the way to the point of the constraint nearest to where the other rule leads, and its state."""

        def gradient(x: Tensor) -> Tensor:
            return self.constraint.tangent(step.gradient(x))

        moved, state = self.rule.move(replace(step, gradient=gradient), state)
        return self.constraint.nearest(step.x + moved) - step.x, state


def pooled(x: Tensor, factor: int) -> Tensor:
    """Returns images (N, C, H, W) averaged over blocks of ``factor`` × ``factor`` pixels, (N, C, H/factor, W/factor).

    Raises:
        InputError: If the images are no float tensor of four dimensions, or the factor is no whole number of at least 1
            that divides height and width.
    """
    require_images(x=x)
    require_counts(1, factor=factor)
    if x.shape[2] % factor or x.shape[3] % factor:
        raise InputError(f"factor must divide the images' sides {x.shape[2]} and {x.shape[3]}, got {factor}")
    return avg_pool2d(x, factor)


def require_images(**images: Tensor) -> None:
    """Raises an InputError that names the argument unless it is a float tensor (N, C, H, W)."""
    for name, x in images.items():
        require_kind(Tensor, **{name: x})
        if x.dim() != 4 or not x.is_floating_point():
            raise InputError(f"{name} must be float images (N, C, H, W) in [0, 1], got {x.dtype} {tuple(x.shape)}")


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Returns whether a tensor of one shape takes the other by repetition alone."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))
