"""The one ascent loop: it attacks, draws contrastive samples, generates images and builds counterfactuals."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dat_lightning.core.errors import InputError, require_choice
from dat_lightning.core.objectives import Objective
from dat_lightning.core.random_streams import normal_noise, uniform_noise
from dat_lightning.core.threat_model import ThreatModel, project, random_start
from dat_lightning.core.update_rules import STEEPEST, State, Step, UpdateRule

Logits = Callable[[Tensor], Tensor]
"""Maps images (N, C, H, W) in [0, 1] to logits (N, K); an ``nn.Module`` or any function."""

AttackMode = Literal["eval", "train"]

Precision = Literal["float32", "bfloat16"]
"""Precision of an ascent's forward and backward passes; images and steps stay as they are."""

AUTOCAST_DTYPES: dict[Precision | None, torch.dtype | None] = {
    None: None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
"""A precision as :class:`Ascent` takes it; ``None`` is the surrounding one."""


@contextmanager
def no_trace(module: nn.Module, mode: AttackMode = "eval") -> Iterator[None]:
    """Prepares a module for input gradients and leaves it exactly as it was, also when the body raises.

    Inside, parameters need no gradient, so that a backward pass computes the input's gradient alone. With
    ``mode="eval"`` every submodule is in eval mode. With ``mode="train"`` every submodule keeps its own mode, and
    buffers that a forward pass changes, such as the running statistics of batch norm, are restored; dropout draws from
    torch's global generator, as it does in training.

    Args:
        module: The network under attack.
        mode: Which of the two.

    Raises:
        InputError: If it is another.
    """
    require_choice(get_args(AttackMode), mode=mode)
    parameters = [(p, p.requires_grad) for p in module.parameters()]
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()] if mode == "train" else []
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        if mode == "eval":
            # Not module.eval(): an overridden train() may have effects of its own.
            for submodule, _ in modes:
                submodule.training = False
        yield
    finally:
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
        for submodule, training in modes:
            submodule.training = training
        for buffer, value in buffers:
            # Through .data: a graph that is waiting for its backward pass may hold the buffer.
            buffer.data.copy_(value)


def input_gradient(logits: Logits, x: Tensor, y: Tensor, objective: Objective) -> Tensor:
    """Returns ∇ₓ objective(f(x), y), shape of ``x``; needs gradients enabled.

    The sum over the batch has each image's own gradient, as long as the network treats examples independently.
    """
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(logits(x), y).sum(), x)
    return gradient


@dataclass(frozen=True)
class Ascent:
    """A projected ascent, as a value: what is climbed, where it may go, and how a step is made.

    Calling it walks. Each step moves every image by what the rule makes of the gradient of its own objective, and
    projects it back onto the ball around ``x`` and into [0, 1].

    A walk is self-contained: it works under ``no_grad`` and ``inference_mode``, from any hook of any Trainer, and if
    ``logits`` is a module it leaves no trace on it (see :func:`no_trace`). ``x`` and ``y`` are not modified.

    Attributes:
        objective: What to climb.
        threat_model: Ball, step, norm and number of steps.
        rule: How a step is made; all rules take their step size from the threat model.
    """

    objective: Objective
    threat_model: ThreatModel
    rule: UpdateRule = STEEPEST

    def network_evaluations(self, num_steps: int | None = None) -> int:
        """Returns how often the network is evaluated for one image: twice for each input gradient.

        Args:
            num_steps: Of the number of steps; by default the threat model's.
        """
        steps = self.threat_model.num_steps if num_steps is None else num_steps
        return 2 * self.rule.gradients_per_step * steps

    def __call__(
        self,
        logits: Logits,
        x: Tensor,
        y: Tensor,
        *,
        start: Tensor | None = None,
        mode: AttackMode = "eval",
        draws: Tensor | None = None,
        seed: int = 0,
        autocast_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Returns the end of the walk, shape of ``x``, detached; its arguments are those of :meth:`snapshots`."""
        steps = self.threat_model.num_steps
        return self.snapshots(
            logits, x, y, (steps,), start=start, mode=mode, draws=draws, seed=seed, autocast_dtype=autocast_dtype
        )[steps]

    def snapshots(
        self,
        logits: Logits,
        x: Tensor,
        y: Tensor,
        steps: Collection[int],
        *,
        start: Tensor | None = None,
        mode: AttackMode = "eval",
        draws: Tensor | None = None,
        seed: int = 0,
        autocast_dtype: torch.dtype | None = None,
    ) -> dict[int, Tensor]:
        """Returns the states of one walk after the given numbers of steps, whatever the threat model's number is.

        Args:
            logits: The network, images to logits.
            x: Centre of the ball and, unless told otherwise, start; shape (N, C, H, W), in [0, 1].
            y: Labels, shape (N,): the true class for an attack, the target class for generation.
            steps: Numbers of steps after which to keep the state; 0 is the start.
            start: Where the walk begins instead, shape of ``x``; it is projected onto the ball around ``x`` first.
            mode: Whether a module is attacked in eval mode or in the mode that it is in.
            draws: Global index of each example, shape (N,), for random start and noise; by default its place in the
                batch.
            seed: Seed of their streams.
            autocast_dtype: Precision of the forward and backward passes, ``None`` for the surrounding one.

        Returns:
            Steps → images, shape of ``x``, detached.

        Raises:
            InputError: If there are no steps or one number is negative, images are not of floats, there is not one
                integer for each of them as a label, or not one draw, a start has another shape than ``x``, or there is
                one although the threat model asks for a random start.
        """
        if not steps or min(steps) < 0:
            raise InputError(f"snapshots must be step counts of at least 0, got {sorted(steps)}")
        if not x.is_floating_point():
            raise InputError(f"x must be images of floats in [0, 1], got {x.dtype}")
        if y.shape != x.shape[:1] or y.is_floating_point():
            # Images without a label would stay where they are, in silence.
            raise InputError(
                f"y must have one integer for each of {len(x)} images, got the shape {tuple(y.shape)} of {y.dtype}"
            )
        if draws is not None and draws.shape != x.shape[:1]:
            raise InputError(f"draws must have one number for each of {len(x)} images, got {tuple(draws.shape)}")
        if start is not None and start.shape != x.shape:
            raise InputError(f"start must have the shape of x, {tuple(x.shape)}, got {tuple(start.shape)}")
        if start is not None and self.threat_model.random_start:
            raise InputError("start and threat_model.random_start exclude each other: a walk has one start")
        norm, eps = self.threat_model.norm, self.threat_model.eps
        with ExitStack() as stack:
            # Tensors made in inference mode cannot be saved for backward: leave it first, then clone.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if isinstance(logits, nn.Module):
                stack.enter_context(no_trace(logits, mode))
            if autocast_dtype is not None:
                lower = None if autocast_dtype == torch.float32 else autocast_dtype
                stack.enter_context(torch.autocast(x.device.type, dtype=lower, enabled=lower is not None))
            center, y = x.detach().clone(), y.clone()
            streams = _Streams(center, draws, seed)
            if start is not None:
                first = project(start.detach().clone(), center, norm, eps)
            else:
                first = _random_start(center, self.threat_model, streams)
            chain = self._chain(logits, first, center, y, streams, max(steps))
            return {number: state for number, state in enumerate(chain) if number in steps}

    def _chain(
        self, logits: Logits, start: Tensor, center: Tensor, y: Tensor, streams: "_Streams", steps: int
    ) -> Iterator[Tensor]:
        """The states of the walk, its start first."""

        def gradient(z: Tensor) -> Tensor:
            return input_gradient(logits, z, y, self.objective)

        x, state = start, State()
        yield x
        for number in range(steps):
            noise = partial(streams.normal, f"noise of step {number}")
            moved, state = self.rule.move(Step(x, gradient, noise, self.threat_model), state)
            # A rule may have met images that want gradients, such as those of a constraint.
            x = project(x + moved.detach(), center, self.threat_model.norm, self.threat_model.eps)
            yield x


def unbounded_ascent(step_size: float, num_steps: int) -> ThreatModel:
    """Returns the threat model of contrastive samples and of generation: L2, no ball, no random start."""
    return replace(ThreatModel(), eps=float("inf"), step_size=step_size, num_steps=num_steps)


class _Streams:
    """Random numbers of the examples ``x``, each from streams named by the example's global index.

    Nothing names the ascent: those of one training step, of one seed and the same draws, have the same numbers.
    """

    def __init__(self, x: Tensor, draws: Tensor | None, seed: int) -> None:
        self.x, self.draws, self.seed = x, draws, seed

    @cached_property
    def indices(self) -> Sequence[int]:
        # Not before they are needed: a device is waited for.
        return range(len(self.x)) if self.draws is None else self.draws.tolist()

    def normal(self, name: str) -> Tensor:
        return normal_noise(self.seed, name, self.indices, tuple(self.x.shape[1:])).to(self.x)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return uniform_noise(self.seed, name, self.indices, shape).to(self.x)


def _random_start(center: Tensor, threat_model: ThreatModel, streams: _Streams) -> Tensor:
    """A random point of each example's ball, if the threat model asks for one, or its centre."""
    if not threat_model.random_start:
        return center
    name = "random start"
    flat = threat_model.norm == "Linf"
    noise = streams.uniform(name, tuple(center.shape[1:])) if flat else streams.normal(name)
    radius = streams.uniform(f"{name} radius", ())
    return random_start(center, threat_model.norm, threat_model.eps, noise, radius)
