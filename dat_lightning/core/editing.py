"""Edits by the one ascent: inpainting, denoising and super-resolution are where it starts, and what it keeps."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from dat_lightning.core.ascent import Ascent, Logits
from dat_lightning.core.constraints import (
    Constrained,
    Constraint,
    FixedPixels,
    PooledPixels,
    broadcasts,
    require_images,
)
from dat_lightning.core.errors import InputError, require_kind
from dat_lightning.core.pixels import require_pixels

# Keeps divisions finite.
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Edit:
    """Images that an ascent is to make more likely, and how far it may change them; calling it walks.

    :func:`inpainting`, :func:`denoising` and :func:`super_resolution` make edits of what is known of images. Another
    class's image is the edit that keeps nothing but a distance, with the other class as ``y``. Where no class is known,
    :func:`~dat_lightning.core.negative_marginal_energy` is climbed.

    Attributes:
        start: The images to begin with, (N, C, H, W), in [0, 1], clipped where rounding has brought them out of it;
            with a constraint, the nearest to those given on which it holds.
        constraint: What all states of the walk have in common, exactly.
        eps: Radius of the L2 ball around ``start``, in units of [0, 1] pixels, if the ascent's own is not smaller.

    Raises:
        InputError: If the images are no float tensor of that shape or outside [0, 1], or the constraint is none.
    """

    start: Tensor
    constraint: Constraint | None = None
    eps: float = math.inf

    def __post_init__(self) -> None:
        require_images(start=self.start)
        if self.constraint is not None:
            require_kind(Constraint, constraint=self.constraint)
            object.__setattr__(self, "start", self.constraint.nearest(self.start))
        require_pixels(self.start, "start")
        object.__setattr__(self, "start", self.start.clamp(0, 1))

    def ascent(self, climb: Ascent) -> Ascent:
        """Returns an ascent from ``start`` that keeps what is to be kept.

        Raises:
            InputError: If it is none, starts at random, or has a ball that is none of L2: the last two would leave the
                constraint.
        """
        require_kind(Ascent, climb=climb)
        eps = min(self.eps, climb.threat_model.eps)
        if climb.threat_model.random_start:
            raise InputError("an edit begins at its images: threat_model.random_start must be false, got true")
        if climb.threat_model.norm != "L2" and math.isfinite(eps):
            raise InputError(f"an edit inside a ball needs norm L2, got {climb.threat_model.norm} and eps {eps:g}")
        rule = climb.rule if self.constraint is None else Constrained(self.constraint, climb.rule)
        return replace(climb, threat_model=replace(climb.threat_model, eps=eps), rule=rule)

    def snapshots(
        self,
        logits: Logits,
        y: Tensor,
        climb: Ascent,
        steps: Collection[int],
        *,
        draws: Tensor | None = None,
        seed: int = 0,
    ) -> dict[int, Tensor]:
        """Returns the states of one walk after the given numbers of steps, each shaped as ``start``.

        Arguments and errors are those of :meth:`Ascent.snapshots <dat_lightning.core.Ascent.snapshots>` and of
        :meth:`ascent`.
        """
        return self.ascent(climb).snapshots(logits, self.start, y, steps, draws=draws, seed=seed)

    def __call__(
        self, logits: Logits, y: Tensor, climb: Ascent, *, draws: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """Returns the end of the walk, shape of ``start``, detached; see :meth:`snapshots`."""
        return self.ascent(climb)(logits, self.start, y, draws=draws, seed=seed)


def inpainting(x: Tensor, mask: Tensor, fill: Tensor | float | None = None) -> Edit:
    """Returns the edit that changes pixels inside a mask alone: those outside stay as they are, bit for bit.

    Args:
        x: Images (N, C, H, W) in [0, 1].
        mask: What is to be filled, bool, (H, W) or four dimensions that broadcast to theirs, such as (N, 1, H, W).
        fill: What the walk finds there, in [0, 1]: a number, or images; by default what :func:`harmonic` makes of the
            other pixels. What ``x`` has there is not looked at.

    Raises:
        InputError: If images, mask or fill are of another type or shape, or outside of [0, 1].
    """
    constraint = FixedPixels(x, mask)
    if fill is None:
        return Edit(harmonic(constraint.known, constraint.mask), constraint)
    fill = torch.as_tensor(fill, dtype=x.dtype, device=x.device)
    if not broadcasts(tuple(fill.shape), tuple(x.shape)):
        raise InputError(f"fill must have a shape that broadcasts to {tuple(x.shape)}, got {tuple(fill.shape)}")
    require_pixels(fill, "fill")
    return Edit(fill.expand_as(x), constraint)


def denoising(x: Tensor, sigma: float) -> Edit:
    """Returns the edit of noisy images that goes no farther than their originals probably are: σ√d in L2.

    Args:
        x: Noisy images (N, C, H, W) in [0, 1], d values each.
        sigma: Standard deviation of the Gaussian noise, in units of [0, 1] pixels.

    Raises:
        InputError: If the deviation is outside of [0, 1], or the images are.
    """
    if not 0 <= sigma <= 1:
        raise InputError(f"sigma must lie in [0, 1], in units of [0, 1] pixels, got {sigma}")
    require_images(x=x)
    require_pixels(x, "x")
    return Edit(x, eps=sigma * math.sqrt(x.shape[1:].numel()))


def super_resolution(pooled: Tensor, factor: int) -> Edit:
    """Returns the edit of enlarged images whose averages over ``factor`` × ``factor`` pixels stay what they are.

    The walk begins at the bicubic enlargement, or what is nearest to it with those averages, as each step ends.

    Args:
        pooled: Small images (N, C, h, w) in [0, 1]; the result is (N, C, factor·h, factor·w).
        factor: How many times larger height and width become.

    Raises:
        InputError: If the factor is no whole number of at least 1, or the images are outside of [0, 1].
    """
    constraint = PooledPixels(pooled, factor)
    return Edit(interpolate(constraint.pooled, scale_factor=factor, mode="bicubic"), constraint)


def harmonic(x: Tensor, mask: Tensor) -> Tensor:
    """Returns images (N, C, H, W) with the smoothest filling: each pixel inside a mask is the mean of its neighbours.

    The discrete Laplace equation is solved by conjugate gradients, of as many steps for every image; where nothing is
    known, there is grey.

    Args:
        x: In [0, 1]; what they have inside the mask is not looked at.
        mask: Bool, of a shape that broadcasts to theirs.

    Source: Hestenes & Stiefel 1952 (conjugate gradients).
    """

    def laplacian(v: Tensor) -> Tensor:
        p = pad(v, (1, 1, 1, 1), mode="replicate")
        around = p[..., 1:-1, 2:] + p[..., 1:-1, :-2] + p[..., 2:, 1:-1] + p[..., :-2, 1:-1]
        return torch.where(mask, around - 4 * v, 0)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((2, 3), keepdim=True)

    filled = torch.where(mask, 0.5, x)
    rest = direction = laplacian(filled)
    length = product(rest, rest)
    for _ in range(2 * sum(x.shape[2:])):
        slope = laplacian(direction)
        curvature = -product(direction, slope)
        # Once the rest is zero, nothing moves.
        rate = torch.where(curvature > 0, length / curvature.clamp_min(_TINY), 0)
        filled, rest = filled + rate * direction, rest + rate * slope
        longer = product(rest, rest)
        direction = rest + torch.where(length > 0, longer / length.clamp_min(_TINY), 0) * direction
        length = longer
    return torch.where(mask, filled.clamp(0, 1), x)
