"""Each rule against a plain loop in NumPy, one image at a time, with derivatives by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from dat_lightning.core import (
    Ascent,
    Constrained,
    FixedPixels,
    Langevin,
    Momentum,
    Norm,
    PixelAdam,
    RandomLength,
    Steepest,
    Step,
    ThreatModel,
    UpdateRule,
    ascend,
    cross_entropy,
    normal_noise,
    targeted_logit,
    unbounded_ascent,
)
from tests.core.test_ascent import TanhNetwork, assert_no_trace, images, plain_gradient, prepared_network, trace

RULES: tuple[UpdateRule, ...] = (
    Steepest(),
    RandomLength(0.3),
    RandomLength(0.4, Momentum(0.4, nesterov=True)),
    Momentum(0.4),
    Momentum(0.4, nesterov=True),
    PixelAdam(),
    PixelAdam((0.5, 0.9), 1e-3),
    Langevin(0.05),
    Langevin(0.0),
)
PLACES: tuple[tuple[Norm, float], ...] = (("L2", 0.3), ("Linf", 0.1), ("L2", math.inf), ("Linf", math.inf))

Gradient = Callable[[np.ndarray], np.ndarray]


def unit(gradient: np.ndarray, norm: Norm) -> np.ndarray:
    if norm == "Linf":
        return np.asarray(np.sign(gradient))
    return np.asarray(gradient / (math.sqrt(sum(gradient**2)) + 1e-10))


def nearest(x: np.ndarray, center: np.ndarray, threat: ThreatModel) -> np.ndarray:
    delta = x - center
    if threat.norm == "Linf":
        delta = np.minimum(np.maximum(delta, -threat.eps), threat.eps)
    elif (length := math.sqrt(sum(delta**2))) > threat.eps:
        delta = delta * threat.eps / length
    return np.asarray(np.minimum(np.maximum(center + delta, 0), 1))


def plain_walk(
    gradient: Gradient, start: np.ndarray, rule: UpdateRule, threat: ThreatModel, seed: int, index: int
) -> list[np.ndarray]:
    """The states of one image's walk, flat."""
    x, states, eta, factor = start.copy(), [start.copy()], threat.step_size, 1.0
    if isinstance(rule, RandomLength):
        normal = float(normal_noise(seed, "noise of step 0", [index], (len(x),))[0, 0])
        share = (1 + math.erf(normal / math.sqrt(2))) / 2  # the normal distribution's: uniform in [0, 1]
        factor, rule = 1 - rule.spread + 2 * rule.spread * share, rule.rule
    v = m = s = np.zeros_like(x)
    for number in range(threat.num_steps):
        if isinstance(rule, Steepest):
            move = eta * unit(gradient(x), threat.norm)
        elif isinstance(rule, Momentum):
            at = x + rule.momentum * eta * v if rule.nesterov else x
            v = rule.momentum * v + unit(gradient(at), threat.norm)
            move = eta * v
        elif isinstance(rule, PixelAdam):
            g, (b1, b2), t = gradient(x), rule.betas, number + 1
            m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g**2
            move = eta * (m / (1 - b1**t)) / (np.sqrt(s / (1 - b2**t)) + rule.eps)
        elif isinstance(rule, Langevin):
            noise = normal_noise(seed, f"noise of step {number}", [index], (len(x),))[0].double().numpy()
            move = eta * gradient(x) + rule.noise * noise
        x = nearest(x + factor * move, start, threat)
        states.append(x)
    return states


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("norm", "eps"), PLACES)
@pytest.mark.parametrize("objective", [cross_entropy, targeted_logit])
def test_a_rule_equals_a_plain_loop(rule: UpdateRule, norm: Norm, eps: float, objective: Any) -> None:
    network, (x, y) = TanhNetwork(), images()
    threat, steps = ThreatModel(norm, eps, step_size=0.05, num_steps=9), (0, 1, 2, 9)
    draws = torch.tensor([7, 3, 11, 0, 5])
    found = Ascent(objective, threat, rule).snapshots(network, x, y, steps, draws=draws, seed=4)
    for row, (start, label) in enumerate(zip(x.flatten(1).numpy(), y.tolist(), strict=True)):
        gradient = partial(plain_gradient, network, label=label, objective=objective)
        states = plain_walk(gradient, start, rule, threat, 4, int(draws[row]))
        for number in steps:
            np.testing.assert_allclose(found[number][row].flatten().numpy(), states[number], atol=1e-11)
    # Somebody has felt the ball, or else the box.
    distance = (found[9] - x).flatten(1).norm(dim=1, p=2 if norm == "L2" else math.inf)
    at_the_border = (found[9] == 0) | (found[9] == 1)
    assert bool(at_the_border.any()) if math.isinf(eps) else float(distance.max()) == pytest.approx(eps)


def test_rules_differ() -> None:
    network, (x, y) = TanhNetwork(), images()
    ends = [ascend(network, x, y, targeted_logit, unbounded_ascent(0.02, 4), rule=rule) for rule in RULES]
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert (one - other).abs().max() > 1e-4


def test_adam_on_pixels_is_torch_s_on_images_that_are_clipped_after_each_step() -> None:
    network, (x, y) = TanhNetwork(), images()
    pixels = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.Adam([pixels], lr=0.07, maximize=True)
    for _ in range(8):
        optimizer.zero_grad()
        targeted_logit(network(pixels), y).sum().backward()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    found = ascend(network, x, y, targeted_logit, unbounded_ascent(0.07, 8), rule=PixelAdam())
    torch.testing.assert_close(found, pixels.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_without_momentum_a_step_is_the_steepest_bit_by_bit(norm: Norm, nesterov: bool) -> None:
    network, (x, y) = TanhNetwork(), images()
    threat = ThreatModel(norm, 0.3, 0.05, 6)
    found = ascend(network, x, y, cross_entropy, threat, rule=Momentum(0.0, nesterov))
    assert torch.equal(found, ascend(network, x, y, cross_entropy, threat))


def test_a_walk_of_random_length_has_one_length_and_all_lengths_come() -> None:
    x, y = torch.full((2000, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(2000, dtype=torch.long)
    rule, chain = RandomLength(0.4), unbounded_ascent(0.1, 3)
    states = Ascent(targeted_logit, chain, rule).snapshots(lambda z: z.flatten(1), x, y, (0, 1, 2, 3))
    first, second, third = ((states[n] - states[n - 1])[:, 0, 0, 0] for n in (1, 2, 3))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    torch.testing.assert_close(third, first, rtol=0, atol=1e-12)
    lengths = first.sort().values
    uniform = torch.linspace(0.06, 0.14, 2000, dtype=torch.float64)
    assert (lengths - uniform).abs().max() < 0.004  # Kolmogorov: 1.63/√2000 of 0.08, one in a hundred
    assert torch.equal(
        ascend(TanhNetwork(), *images(), targeted_logit, chain, rule=RandomLength(0.0)),
        ascend(TanhNetwork(), *images(), targeted_logit, chain),
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_image_s_walk_does_not_depend_on_the_others(rule: UpdateRule) -> None:
    network, (x, y) = TanhNetwork(), images()
    draws, threat = torch.tensor([10, 20, 30, 40, 50]), ThreatModel("L2", 0.4, 0.1, 5, random_start=True)

    def walk(rows: list[int]) -> Tensor:
        return ascend(network, x[rows], y[rows], cross_entropy, threat, rule=rule, draws=draws[rows], seed=2)

    whole = walk([0, 1, 2, 3, 4])
    torch.testing.assert_close(walk([3, 1]), whole[[3, 1]], rtol=0, atol=1e-13)
    torch.testing.assert_close(walk([4]), whole[[4]], rtol=0, atol=1e-13)


def test_noise_is_another_in_each_step_for_each_index_and_seed_and_leaves_the_global_generator_alone() -> None:
    x, y = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64), torch.zeros(2).long()
    before = torch.get_rng_state()

    def noise(**arguments: Any) -> list[Tensor]:
        flat = ThreatModel("L2", math.inf, 1.0)
        states = Ascent(targeted_logit, flat, Langevin(1e-3)).snapshots(
            lambda z: 0 * z.flatten(1), x, y, (0, 1, 2), **arguments
        )
        return [(states[k + 1] - states[k])[i] for k in (0, 1) for i in (0, 1)]

    drawn = noise() + noise(seed=1) + noise(draws=torch.tensor([2, 3]))
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == len(drawn) == 12
    assert float(torch.stack(drawn).std()) == pytest.approx(1e-3, rel=0.2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_rule_leaves_no_trace_on_network_and_images(rule: UpdateRule, mode: Any) -> None:
    network, (x, y) = prepared_network(), images(dtype=torch.float32)
    before, images_before = trace(network), x.clone()
    with torch.inference_mode():
        found = ascend(network, x.clone(), y.clone(), cross_entropy, ThreatModel(num_steps=3), rule=rule, mode=mode)
    assert_no_trace(network, before)
    assert torch.equal(x, images_before)
    assert (found.dtype, found.requires_grad, found.is_inference()) == (torch.float32, False, False)
    assert not torch.equal(found, x)


@dataclass(frozen=True)
class Midpoint(UpdateRule):
    """A rule of somebody else's, with two gradients in a step."""

    gradients_per_step = 2

    @override
    def move(self, step: Step, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        size = step.threat_model.step_size
        return size * step.gradient(step.x + size / 2 * step.gradient(step.x)), state


@pytest.mark.parametrize("rule", [*RULES, Midpoint()], ids=str)
def test_an_ascent_knows_how_often_the_network_is_evaluated(rule: UpdateRule) -> None:
    network, (x, y), passes = TanhNetwork(), images(), {"forward": 0, "backward": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            passes["forward"] += len(z)
            return z.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            passes["backward"] += len(gradients[0])
            return gradients[0]

    def logits(z: Tensor) -> Tensor:
        counted: Tensor = Counted.apply(z)
        logits: Tensor = network(counted)
        return logits

    ascent = Ascent(cross_entropy, ThreatModel(num_steps=6), rule)
    ascent(logits, x, y)
    assert ascent.network_evaluations() * len(x) == sum(passes.values())
    assert ascent.network_evaluations(3) * 2 == ascent.network_evaluations()
    assert ascent.network_evaluations(0) == 0


@pytest.mark.parametrize("rule", [*RULES, RandomLength(0.3, Langevin(0.0)), Midpoint()], ids=str)
def test_a_rule_knows_whether_it_uses_noise(rule: UpdateRule) -> None:
    (x, _), asked = images(), []

    def noise() -> Tensor:
        asked.append(True)
        return torch.zeros_like(x)

    step = Step(x, lambda z: z, noise, ThreatModel())
    anywhere = Constrained(FixedPixels(x, torch.ones(x.shape[2:], dtype=torch.bool)), rule)
    for each in (rule, anywhere):
        asked.clear()
        _, state = each.move(step, ())
        each.move(step, state)
        assert each.uses_noise == bool(asked)


def test_an_ascent_is_a_value() -> None:
    network, (x, y) = TanhNetwork(), images()
    threat = ThreatModel("L2", 0.3, 0.1, 4)
    ascent = Ascent(cross_entropy, threat, Momentum(0.5))
    assert ascent == Ascent(cross_entropy, threat, Momentum(0.5)) != replace(ascent, rule=Momentum(0.6))
    assert len({ascent, replace(ascent), replace(ascent, threat_model=ThreatModel())}) == 2
    states = ascent.snapshots(network, x, y, (2, 4))
    assert torch.equal(states[4], ascent(network, x, y))
    assert torch.equal(states[2], ascend(network, x, y, cross_entropy, threat, rule=Momentum(0.5), num_steps=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomLength(1.0), r"spread must be in \[0, 1\), got 1.0"),
        (lambda: RandomLength(-0.1), "got -0.1"),
        (lambda: RandomLength(0.1, {"momentum": 0.4}), "rule must be of the class UpdateRule, got {'momentum': 0.4}"),  # type: ignore[arg-type]
        (lambda: RandomLength(0.3, Langevin()), r"rule must be one without noise, .* got Langevin\(noise=0.01\)"),
        (lambda: RandomLength(0.3, RandomLength()), "rule must be one without noise"),
        (lambda: Momentum(1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: Momentum(-0.1), "got -0.1"),
        (lambda: Momentum(math.nan), "got nan"),
        (lambda: PixelAdam((0.9, 1.0)), r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        (lambda: PixelAdam(eps=-1.0), "eps must be .* got -1.0"),
        (lambda: PixelAdam(eps=0.0), "eps must be a positive finite number, got 0.0"),
        (lambda: Langevin(-0.01), "noise must be .* got -0.01"),
        (lambda: Langevin(math.inf), "got inf"),
    ],
)
def test_numbers_outside_their_range_are_refused(make: Callable[[], UpdateRule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
