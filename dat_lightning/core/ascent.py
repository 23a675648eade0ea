"""The one ascent loop: it attacks, draws contrastive samples, generates images and builds counterfactuals."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dat_lightning.core.errors import InputError
from dat_lightning.core.objectives import Objective
from dat_lightning.core.random_streams import normal_noise, uniform_noise
from dat_lightning.core.threat_model import ThreatModel, project, random_start, steepest_step

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
"""A precision as :func:`ascend` takes it; ``None`` is the surrounding one."""


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
    """
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


def ascend_snapshots(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    threat_model: ThreatModel,
    snapshots: Collection[int],
    *,
    start: Tensor | None = None,
    mode: AttackMode = "eval",
    draws: Tensor | None = None,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
) -> dict[int, Tensor]:
    """Returns the states of one projected ascent after the given numbers of steps.

    Each step moves every image by ``step_size`` along the steepest direction of its own objective and projects it back
    onto the ball around ``x`` and into [0, 1]. The chain is walked once, however many snapshots are asked for.

    The call is self-contained: it works under ``no_grad`` and ``inference_mode``, from any hook of any Trainer, and if
    ``logits`` is a module it leaves no trace on it (see :func:`no_trace`). ``x`` and ``y`` are not modified.

    Args:
        logits: The network, images to logits.
        x: Centre of the ball and, unless told otherwise, start; shape (N, C, H, W), in [0, 1].
        y: Labels, shape (N,): the true class for an attack, the target class for generation.
        objective: What to climb.
        threat_model: Ball, step and norm; its ``num_steps`` is replaced by the largest snapshot.
        snapshots: Numbers of steps after which to keep the state; 0 is the start.
        start: Where the walk begins instead, shape of ``x``; it is projected onto the ball around ``x`` first.
        mode: Whether a module is attacked in eval mode or in the mode that it is in.
        draws: Global index of each example, shape (N,), for the random start; by default its place in the batch.
        seed: Seed of the random start's streams.
        autocast_dtype: Precision of the forward and backward passes, ``None`` for the surrounding one.

    Returns:
        Steps → images, shape of ``x``, detached.

    Raises:
        InputError: If there are no snapshots or one is negative, a start has another shape than ``x``, or there is one
            although the threat model asks for a random start.
    """
    if not snapshots or min(snapshots) < 0:
        raise InputError(f"snapshots must be step counts of at least 0, got {sorted(snapshots)}")
    if start is not None and start.shape != x.shape:
        raise InputError(f"start must have the shape of x, {tuple(x.shape)}, got {tuple(start.shape)}")
    if start is not None and threat_model.random_start:
        raise InputError("start and threat_model.random_start exclude each other: a walk has one start")
    with ExitStack() as stack:
        # Tensors made in inference mode cannot be saved for backward: leave it first, then clone.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if isinstance(logits, nn.Module):
            stack.enter_context(no_trace(logits, mode))
        if autocast_dtype is not None:
            enabled = autocast_dtype != torch.float32
            stack.enter_context(
                torch.autocast(x.device.type, dtype=autocast_dtype if enabled else None, enabled=enabled)
            )
        center, y = x.detach().clone(), y.clone()
        if start is not None:
            first = project(start.detach().clone(), center, threat_model.norm, threat_model.eps)
        else:
            first = _start(center, threat_model, draws, seed) if threat_model.random_start else center
        chain = _chain(logits, first, center, y, objective, threat_model, max(snapshots))
        return {step: state for step, state in enumerate(chain) if step in snapshots}


def ascend(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    threat_model: ThreatModel,
    *,
    num_steps: int | None = None,
    start: Tensor | None = None,
    mode: AttackMode = "eval",
    draws: Tensor | None = None,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the end of the projected ascent, shape of ``x``, detached.

    Args:
        logits: See :func:`ascend_snapshots`, as for all arguments not named here.
        x: Centre of the ball, shape (N, C, H, W), in [0, 1].
        y: Labels, shape (N,).
        objective: What to climb.
        threat_model: Ball, step, norm and number of steps.
        num_steps: Takes the place of the threat model's, as the curriculum of Stage 2 does.
        start: Where the walk begins, if not at ``x``.
        mode: Eval mode, or the mode that the module is in.
        draws: Global indices for the random start.
        seed: Seed of the random start.
        autocast_dtype: Precision of the passes.
    """
    steps = threat_model.num_steps if num_steps is None else num_steps
    states = ascend_snapshots(
        logits,
        x,
        y,
        objective,
        threat_model,
        (steps,),
        start=start,
        mode=mode,
        draws=draws,
        seed=seed,
        autocast_dtype=autocast_dtype,
    )
    return states[steps]


def unbounded_ascent(step_size: float, num_steps: int) -> ThreatModel:
    """Returns the unbounded L2 ascent of contrastive samples and of generation: no ball, no random start."""
    return replace(ThreatModel(), eps=float("inf"), step_size=step_size, num_steps=num_steps)


def _start(center: Tensor, threat_model: ThreatModel, draws: Tensor | None, seed: int) -> Tensor:
    """A random point of each example's ball, from streams named by the example's global index."""
    indices = range(len(center)) if draws is None else draws.tolist()
    draw = normal_noise if threat_model.norm == "L2" else uniform_noise
    shape = tuple(center.shape[1:])
    noise = draw(seed, "random start", indices, shape).to(center)
    radius = uniform_noise(seed, "random start radius", indices, ()).to(center)
    return random_start(center, threat_model.norm, threat_model.eps, noise, radius)


def _chain(
    logits: Logits,
    start: Tensor,
    center: Tensor,
    y: Tensor,
    objective: Objective,
    threat_model: ThreatModel,
    steps: int,
) -> Iterator[Tensor]:
    """The states of the walk, its start first."""
    x = start
    yield x
    for _ in range(steps):
        direction = steepest_step(input_gradient(logits, x, y, objective), threat_model.norm)
        x = project(x + threat_model.step_size * direction, center, threat_model.norm, threat_model.eps)
        yield x
