"""What a gradient attack may do to an image: norm, ball and steps, with the projections that enforce them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dat_lightning.core.errors import InputError, require_counts

Norm = Literal["L2", "Linf"]

# Keeps the direction finite where a gradient vanishes (the method's step is g / (‖g‖₂ + 1e-10)).
_TINY = 1e-10

# From where on that constant would shorten the step by more than a hundredth.
_SMALL = 1e-8


@dataclass(frozen=True)
class ThreatModel:
    """The set of images that an ascent may reach, and how it walks there.

    The same description serves the attack of adversarial training, the contrastive chain of Stage 2 and the generation
    of images; the last two are unbounded (``eps`` infinite), so that only the [0, 1] box holds them.

    Attributes:
        norm: Geometry of both the ball and the step.
        eps: Radius of the ball around the clean image, in units of [0, 1] pixels; ``inf`` for no ball, 0 for the
            clean image itself.
        step_size: Length of one step in the same norm.
        num_steps: Number of steps; 0 leaves the start as it is.
        random_start: Whether the ascent begins at a random point of the ball instead of its centre.

    Raises:
        InputError: If a number is negative or NaN, the norm is unknown, or a random start is asked for in an infinite
            ball.

    Source: Madry et al. 2018 (arXiv 1706.06083), Eq. 2.1; DAT (arXiv 2510.13872).
    """

    norm: Norm = "L2"
    eps: float = 0.5
    step_size: float = 0.1
    num_steps: int = 10
    random_start: bool = False

    def __post_init__(self) -> None:
        if self.norm not in ("L2", "Linf"):
            raise InputError(f"norm must be 'L2' or 'Linf', got {self.norm!r}")
        if math.isnan(self.eps) or self.eps < 0:
            raise InputError(f"eps must be a radius of at least 0 (or inf), got {self.eps}")
        if not math.isfinite(self.step_size) or self.step_size < 0:
            raise InputError(f"step_size must be a finite length of at least 0, got {self.step_size}")
        require_counts(0, num_steps=self.num_steps)
        if self.random_start and math.isinf(self.eps):
            raise InputError("random_start needs a finite eps: there is no uniform point in an infinite ball")


def per_example_norm(x: Tensor, order: float = 2) -> Tensor:
    """Returns the norm of each example, shape (N, 1, …, 1), of a tensor of shape (N, …), at least in float32."""
    flat = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    # In float16 the sum of squares overflows soon, and the constant that keeps a step finite is 0.
    dtype = torch.promote_types(x.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(flat, order, dim=1, dtype=dtype).view(-1, *([1] * (x.dim() - 1)))
    return norms


def steepest_step(gradient: Tensor, norm: Norm) -> Tensor:
    """Returns the unit step of steepest ascent for each example: g/(‖g‖₂ + 1e-10) for L2, sign(g) for Linf.

    Where ‖g‖₂ is below 1e-8, or overflows, g is divided by its largest value first: the step is a whole one, however
    flat or steep the network.

    Args:
        gradient: Shape (N, …). An example whose gradient is zero does not move. A NaN is not hidden, which would pass
            for robustness: the step of its pixel (Linf) or of its example (L2) is NaN.
        norm: Geometry of the step.
    """
    if norm == "Linf":
        # The sign of NaN is 0.
        return torch.where(gradient.isnan(), gradient, gradient.sign())
    length, largest = per_example_norm(gradient), per_example_norm(gradient, math.inf)
    odd = ((length < _SMALL) | length.isinf()) & (largest > 0)
    # Division by 1 changes no bit, so that all other steps are those of the formula alone.
    scaled = gradient / torch.where(odd, largest, 1)
    return (scaled / (per_example_norm(scaled) + _TINY)).to(gradient.dtype)


def vanishes(gradient: Tensor) -> Tensor:
    """Returns whether each example's gradient, of shape (N, …), is shorter than 1e-10 in L2, (N,).

    What is left of it is rounding as much as direction: an attack that follows it says little of the network.
    """
    return per_example_norm(gradient).flatten() < _TINY


def project(x: Tensor, center: Tensor, norm: Norm, eps: float) -> Tensor:
    """Returns the point nearest to ``x`` in the ball around ``center``, clipped to [0, 1].

    With ``center`` in [0, 1] the clipping never leaves the ball, since it moves no coordinate away from the centre. NaN
    stays NaN, in its own example alone.

    Args:
        x: Shape (N, …).
        center: Shape (N, …), in [0, 1].
        norm: Geometry of the ball.
        eps: Radius; infinite for the box alone.
    """
    if math.isinf(eps):
        return x.clamp(0, 1)
    delta = x - center
    if norm == "Linf":
        # A bound that the type cannot hold is refused by torch.
        bound = min(eps, torch.finfo(delta.dtype).max)
        delta = delta.clamp(-bound, bound)
    else:
        length = per_example_norm(delta)
        delta = delta * (eps / length.clamp_min(_TINY)).clamp_max(1.0)
    return (center + delta).clamp(0, 1).to(x.dtype)


def random_start(center: Tensor, norm: Norm, eps: float, noise: Tensor, radius: Tensor) -> Tensor:
    """Returns a point drawn uniformly from the ball around ``center``, clipped to [0, 1].

    Args:
        center: Shape (N, …), in [0, 1].
        norm: Geometry of the ball.
        eps: Finite radius of the ball.
        noise: Shape of ``center``: standard normal for L2, uniform in [0, 1) for Linf.
        radius: Shape (N,), uniform in [0, 1); L2 only, where its d-th root makes the draw uniform in volume.
    """
    if norm == "Linf":
        return project(center + eps * (2 * noise - 1), center, norm, eps)
    dimensions = center.shape[1:].numel()
    length = radius.view(-1, *([1] * (center.dim() - 1))) ** (1 / dimensions)
    return project(center + eps * length * steepest_step(noise, "L2"), center, norm, eps)
