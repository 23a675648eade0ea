"""How a step of an ascent is made: steepest, of random length, with momentum, by Adam, or by Langevin dynamics."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dat_lightning.core.errors import InputError, require_kind
from dat_lightning.core.threat_model import ThreatModel, steepest_step

State = tuple[Any, ...]
"""What a rule remembers from step to step; empty before the first."""


@dataclass(frozen=True)
class Step:
    """What a rule may use to make one step from ``x`` (N, C, H, W).

    Attributes:
        x: Where the images are, detached.
        gradient: Gives ∇ of the objective at images of the shape of ``x``; a forward and a backward pass.
        noise: Gives standard normal noise of the shape of ``x``, each image's of its own stream; anew in each step, the
            same when it is called again in one.
        threat_model: Its ``step_size`` is the length, or the rate; its ``norm`` the geometry.
    """

    x: Tensor
    gradient: Callable[[Tensor], Tensor]
    noise: Callable[[], Tensor]
    threat_model: ThreatModel


class UpdateRule(ABC):
    """How a step is made; the ascent then projects onto the ball and into [0, 1].

    A rule is a value, a frozen dataclass of numbers, strings and the like, by which samples are told apart: it keeps
    nothing itself, what it has to remember goes through ``state``. In a configuration it is named by its class path.
    A rule that asks for more than one gradient in a step says so in :attr:`gradients_per_step`, and one that asks for
    noise in :attr:`uses_noise`.
    """

    gradients_per_step: int = 1
    uses_noise: bool = False

    @abstractmethod
    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        """Returns what is added to the images, shape of ``step.x``, and the state for the next step."""


@dataclass(frozen=True)
class Steepest(UpdateRule):
    """Moves by η·d, with d the unit step of steepest ascent: PGD, and the method's own rule.

    Source: Madry et al. 2018 (arXiv 1706.06083); DAT (arXiv 2510.13872).
    """

    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        """Returns η·d."""
        threat_model = step.threat_model
        return threat_model.step_size * steepest_step(step.gradient(step.x), threat_model.norm), state


STEEPEST = Steepest()


@dataclass(frozen=True)
class RandomLength(UpdateRule):
    """Moves by u times what another rule would, with u of the image: its whole walk is shorter or longer.

    How far a seed lies from the images that it is to become differs from seed to seed. Walks of one length end too
    early for some and too late for others, and all alike; u, drawn once for each walk, is uniform in
    [1 − spread, 1 + spread], and of a stream named by the image's global index. The other rule knows nothing of u:
    where it looks ahead, as Nesterov's momentum does, it looks as far as without. It may use no noise: u is made of a
    pixel of the first step's, which would no longer be normal, nor independent of the length of the walk.

    Attributes:
        spread: In [0, 1); 0 is the other rule alone.
        rule: The other rule, by default the steepest.

    Raises:
        InputError: If the spread is outside its range, or the rule is none or uses noise.
    """

    spread: float = 0.3
    rule: UpdateRule = STEEPEST
    uses_noise = True

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1:
            raise InputError(f"spread must be in [0, 1), got {self.spread}")
        require_kind(UpdateRule, rule=self.rule)
        if self.rule.uses_noise:
            raise InputError(f"rule must be one without noise, of which the length is made, got {self.rule}")

    @property
    def gradients_per_step(self) -> int:  # type: ignore[override]
        """Those of the other rule."""
        return self.rule.gradients_per_step

    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        """Returns u times the other rule's move, and u, shape (N, 1, 1, 1), with the other rule's state."""
        factor, inner = state or (1 + self.spread * (2 * torch.special.ndtr(step.noise()[:, :1, :1, :1]) - 1), ())
        moved, inner = self.rule.move(step, inner)
        return factor * moved, (factor, inner)


@dataclass(frozen=True)
class Momentum(UpdateRule):
    """Moves by η·v, v ← μ·v + d, with d the unit step of steepest ascent at x (heavy ball) or at x + μ·η·v (Nesterov).

    The velocity begins at zero, and no projection changes it. Nesterov's point may lie outside of ball and box.

    Attributes:
        momentum: μ, in [0, 1).
        nesterov: Whether the gradient is taken where the velocity alone would lead.

    Raises:
        InputError: If μ is outside its range.

    Source: Polyak 1964; Nesterov 1983; Wang & Du 2025 (arXiv 2510.02300) for generation, with μ near 0.3.
    """

    momentum: float = 0.3
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be in [0, 1), got {self.momentum}")

    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        """Returns η·v, and v."""
        threat_model = step.threat_model
        (velocity,) = state or (torch.zeros_like(step.x),)
        ahead = step.x + self.momentum * threat_model.step_size * velocity if self.nesterov else step.x
        velocity = self.momentum * velocity + steepest_step(step.gradient(ahead), threat_model.norm)
        return threat_model.step_size * velocity, (velocity,)


@dataclass(frozen=True)
class PixelAdam(UpdateRule):
    """Moves each pixel as Adam does, upwards, with the step size as its rate: the authors' second way to climb.

    The threat model's norm is that of the ball alone.

    Attributes:
        betas: Decay of the averages of gradient and squared gradient, each in [0, 1).
        eps: What keeps the division finite.

    Raises:
        InputError: If a number is outside its range.

    Source: Kingma & Ba 2015 (arXiv 1412.6980), Algorithm 1; DAT (arXiv 2510.13872), its implementation.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be in [0, 1), got {self.betas}")
        if not 0 < self.eps < math.inf:
            raise InputError(f"eps must be a positive finite number, got {self.eps}")

    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        """Returns η·m̂/(√v̂ + eps), and the averages m, v with the number of steps."""
        gradient = step.gradient(step.x)
        first, second, count = state or (torch.zeros_like(gradient), torch.zeros_like(gradient), 0)
        b1, b2 = self.betas
        count += 1
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient * gradient
        direction = first / (1 - b1**count) / ((second / (1 - b2**count)).sqrt() + self.eps)
        return step.threat_model.step_size * direction, (first, second, count)


@dataclass(frozen=True)
class Langevin(UpdateRule):
    """Moves by η·g + noise·N(0, I), with g the gradient as it is: the chains of JEM, with η = 1.

    Each image's noise is of a stream named by its global index, so that samples depend on neither batch nor ranks. The
    threat model's norm is that of the ball alone.

    Attributes:
        noise: Standard deviation, in units of [0, 1] pixels; 0 is plain gradient ascent.

    Raises:
        InputError: If it is negative or not finite.

    Source: Welling & Teh 2011; Grathwohl et al. 2020, JEM (arXiv 1912.03263), with step and noise set apart.
    """

    noise: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise InputError(f"noise must be a finite deviation of at least 0, got {self.noise}")

    @property
    def uses_noise(self) -> bool:  # type: ignore[override]
        """Unless its deviation is 0."""
        return self.noise > 0

    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        """Returns η·g + noise·N(0, I)."""
        moved = step.threat_model.step_size * step.gradient(step.x)
        return (moved + self.noise * step.noise() if self.noise else moved), state
