"""Edits by the one ascent: inpainting, denoising and super-resolution are where it starts, and what it keeps."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dat_lightning.core.ascent import Ascent, Logits
from dat_lightning.core.constraints import Constrained, Constraint, FixedPixels, PooledPixels
from dat_lightning.core.errors import InputError


@dataclass(frozen=True, eq=False)
class Edit:
    """Images that an ascent is to make more likely, and how far it may change them; calling it walks.

    :func:`inpainting`, :func:`denoising` and :func:`super_resolution` make edits of what is known of images. Another
    class's image is the edit that keeps nothing but a distance, with the other class as ``y``. Where no class is known,
    :func:`~dat_lightning.core.negative_marginal_energy` is climbed.

    Attributes:
        start: The images to begin with, (N, C, H, W), in [0, 1].
        keeps: What the result has in common with them, exactly.
        eps: Radius of the L2 ball around them, in units of [0, 1] pixels, if the ascent's own is not smaller.
    """

    start: Tensor
    keeps: Constraint | None = None
    eps: float = math.inf

    def ascent(self, climb: Ascent) -> Ascent:
        """Returns an ascent from ``start`` that keeps what is to be kept.

        Raises:
            InputError: If it starts at random, or has a ball that is none of L2: both would leave the constraint.
        """
        eps = min(self.eps, climb.threat_model.eps)
        if climb.threat_model.random_start:
            raise InputError("an edit begins at its images: threat_model.random_start must be false, got true")
        if climb.threat_model.norm != "L2" and math.isfinite(eps):
            raise InputError(f"an edit inside a ball needs norm L2, got {climb.threat_model.norm} and eps {eps:g}")
        rule = climb.rule if self.keeps is None else Constrained(self.keeps, climb.rule)
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
        steps = climb.threat_model.num_steps
        return self.snapshots(logits, y, climb, (steps,), draws=draws, seed=seed)[steps]


def inpainting(x: Tensor, mask: Tensor, fill: Tensor | float = 0.5) -> Edit:
    """Returns the edit that changes pixels inside a mask alone: those outside stay as they are, bit for bit.

    Args:
        x: Images (N, C, H, W) in [0, 1].
        mask: What is to be filled, bool, of a shape that broadcasts to theirs, such as (H, W) or (N, 1, H, W).
        fill: What the walk finds there, in [0, 1]: a number, or images; what ``x`` has there is not looked at.

    Raises:
        InputError: If the mask is of another type or shape, or the fill is outside of [0, 1].
    """
    fill = torch.as_tensor(fill, dtype=x.dtype, device=x.device)
    if not bool(((fill >= 0) & (fill <= 1)).all()):
        raise InputError(f"fill must lie in [0, 1], got {float(fill.min()):g} … {float(fill.max()):g}")
    keeps = FixedPixels(x, mask.to(x.device))
    return Edit(torch.where(keeps.mask, fill, x), keeps)


def denoising(x: Tensor, sigma: float) -> Edit:
    """Returns the edit of noisy images that goes no farther than their originals probably are: σ√d in L2.

    Args:
        x: Noisy images (N, C, H, W) in [0, 1], d values each.
        sigma: Standard deviation of the Gaussian noise, in units of [0, 1] pixels.

    Raises:
        InputError: If the deviation is negative or not finite.
    """
    if not 0 <= sigma < math.inf:
        raise InputError(f"sigma must be a finite deviation of at least 0, got {sigma}")
    return Edit(x, eps=sigma * math.sqrt(x.shape[1:].numel()))


def super_resolution(pooled: Tensor, factor: int) -> Edit:
    """Returns the edit of enlarged images whose averages over ``factor`` × ``factor`` pixels stay what they are.

    The walk begins at blocks of one colour, and each step ends at the nearest images in [0, 1] with those averages.

    Args:
        pooled: Small images (N, C, h, w) in [0, 1]; the result is (N, C, factor·h, factor·w).
        factor: How many times larger height and width become.

    Raises:
        InputError: If the factor is less than 1, or the images are outside of [0, 1].
    """
    keeps = PooledPixels(pooled, factor)
    return Edit(pooled.repeat_interleave(factor, 2).repeat_interleave(factor, 3), keeps)
