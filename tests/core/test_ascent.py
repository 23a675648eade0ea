import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dat_lightning.core import (
    Ascent,
    AttackMode,
    Norm,
    Objective,
    ThreatModel,
    ascend,
    cross_entropy,
    distance_to_uniform,
    input_gradient,
    negative_marginal_energy,
    targeted_logit,
    unbounded_ascent,
)
from dat_lightning.core.errors import InputError

MODES: tuple[AttackMode, ...] = ("eval", "train")
NORMS: tuple[Norm, ...] = ("L2", "Linf")
PIXELS, HIDDEN, CLASSES = 12, 7, 4


class TanhNetwork(nn.Module):
    """f(x) = tanh(x A + a) B + b, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(PIXELS, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.outer(torch.tanh(self.inner(x.flatten(1))))
        return logits


class BatchNormNetwork(nn.Module):
    """Every kind of layer whose mode matters, on images (N, 3, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 5, 2)
        self.norm2 = nn.BatchNorm2d(5)
        self.dropout = nn.Dropout(0.5)
        self.norm3 = nn.LayerNorm(5)
        self.fc = nn.Linear(5, CLASSES)
        self.untracked = nn.BatchNorm1d(CLASSES, track_running_stats=False)
        generator = torch.Generator().manual_seed(0)
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
        nn.init.normal_(self.conv.weight, generator=generator)
        nn.init.normal_(self.fc.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm2(self.conv(self.norm1(x))))
        logits: Tensor = self.untracked(self.fc(self.norm3(self.dropout(h.flatten(1)))))
        return logits


def images(count: int = 5, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 2, 2) in [0, 1], some pixels at the border of the box, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = (1.2 * torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64) - 0.1).clamp(0, 1)
    return x.to(dtype), torch.randint(CLASSES, (count,), generator=generator)


# The same ascent once more, in numpy, one image at a time, with derivatives by hand.


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits)
    return np.asarray(exponentials / exponentials.sum())


def logit_derivative(objective: Objective, logits: np.ndarray, label: int) -> np.ndarray:
    one_hot = np.eye(CLASSES)[label]
    derivatives: dict[Objective, np.ndarray] = {
        cross_entropy: softmax(logits) - one_hot,
        targeted_logit: one_hot,
        negative_marginal_energy: softmax(logits),
        distance_to_uniform: softmax(logits) - 1 / CLASSES,
    }
    return derivatives[objective]


def plain_gradient(network: TanhNetwork, x: np.ndarray, label: int, objective: Objective) -> np.ndarray:
    a_weight, a_bias = network.inner.weight.detach().numpy(), network.inner.bias.detach().numpy()
    b_weight, b_bias = network.outer.weight.detach().numpy(), network.outer.bias.detach().numpy()
    h = np.tanh(a_weight @ x + a_bias)
    at_logits = logit_derivative(objective, b_weight @ h + b_bias, label)
    return np.asarray(a_weight.T @ ((1 - h**2) * (b_weight.T @ at_logits)))


def plain_ascent(
    network: TanhNetwork, start: np.ndarray, label: int, objective: Objective, threat: ThreatModel
) -> np.ndarray:
    center, x = start.reshape(-1), start.reshape(-1).copy()
    for _ in range(threat.num_steps):
        gradient = plain_gradient(network, x, label, objective)
        if threat.norm == "L2":
            x = x + threat.step_size * gradient / (math.sqrt(sum(gradient**2)) + 1e-10)
            length = math.sqrt(sum((x - center) ** 2))
            if length > threat.eps:
                x = center + (x - center) * threat.eps / length
        else:
            x = x + threat.step_size * np.sign(gradient)
            x = np.minimum(np.maximum(x, center - threat.eps), center + threat.eps)
        x = np.minimum(np.maximum(x, 0), 1)
    return np.asarray(x.reshape(start.shape))


@pytest.mark.parametrize("objective", [cross_entropy, targeted_logit, negative_marginal_energy, distance_to_uniform])
def test_input_gradient_is_each_image_s_own(objective: Objective) -> None:
    network, (x, y) = TanhNetwork(), images()
    gradient = input_gradient(network, x, y, objective).flatten(1).numpy()
    for row, image, label in zip(gradient, x.flatten(1).numpy(), y.tolist(), strict=True):
        np.testing.assert_allclose(row, plain_gradient(network, image, label, objective), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("objective", [cross_entropy, targeted_logit, negative_marginal_energy, distance_to_uniform])
@pytest.mark.parametrize("num_steps", [1, 12])
@pytest.mark.parametrize(
    ("norm", "eps", "step_size"),
    [("L2", 0.3, 0.1), ("L2", math.inf, 0.2), ("L2", 0.0, 0.1), ("Linf", 0.1, 0.03), ("Linf", math.inf, 0.1)],
)
def test_the_ascent_equals_a_plain_loop(
    norm: Norm, eps: float, step_size: float, num_steps: int, objective: Objective
) -> None:
    network, (x, y) = TanhNetwork(), images()
    threat = ThreatModel(norm, eps, step_size, num_steps)
    result = ascend(network, x, y, objective, threat)
    for reached, start, label in zip(result.numpy(), x.numpy(), y.tolist(), strict=True):
        np.testing.assert_allclose(reached, plain_ascent(network, start, label, objective, threat), atol=1e-11)


def test_contrastive_ascent_is_unbounded_l2_without_random_start() -> None:
    assert unbounded_ascent(0.1, 7) == ThreatModel("L2", math.inf, 0.1, 7, random_start=False)


def test_an_image_where_the_gradient_vanishes_stays() -> None:
    x, y = images()
    result = ascend(lambda z: (z * 0).flatten(1)[:, :CLASSES], x, y, cross_entropy, unbounded_ascent(0.5, 3))
    assert torch.equal(result, x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", [False, True])
def test_snapshots_equal_separate_runs_bit_by_bit(norm: Norm, start: bool) -> None:
    network, (x, y) = TanhNetwork(), images()
    threat = ThreatModel(norm, 0.3, 0.05, 10, random_start=start)
    states = Ascent(cross_entropy, threat).snapshots(network, x, y, [7, 0, 3, 3])
    assert sorted(states) == [0, 3, 7]
    for steps, state in states.items():
        assert torch.equal(state, ascend(network, x, y, cross_entropy, threat, num_steps=steps))
    assert torch.equal(states[0], x) != start


def test_the_chain_is_walked_once_for_all_snapshots() -> None:
    network, (x, y), calls = TanhNetwork(), images(), [0]

    def counting(z: Tensor) -> Tensor:
        calls[0] += 1
        return network(z)  # type: ignore[no-any-return]

    Ascent(cross_entropy, ThreatModel()).snapshots(counting, x, y, [0, 2, 5])
    assert calls == [5]


@pytest.mark.parametrize("snapshots", [[], [3, -1]])
def test_snapshots_that_cannot_be_are_refused(snapshots: list[int]) -> None:
    x, y = images()
    with pytest.raises(ValueError, match="snapshots must be"):
        Ascent(cross_entropy, ThreatModel()).snapshots(TanhNetwork(), x, y, snapshots)


@pytest.mark.parametrize("num_steps", [0, 2])
def test_the_result_is_new_and_detached_and_the_images_are_not_changed(num_steps: int) -> None:
    x, y = images()
    x.requires_grad_(True)
    before, labels = x.detach().clone(), y.clone()
    result = ascend(TanhNetwork(), x, y, cross_entropy, ThreatModel(num_steps=num_steps))
    assert not result.requires_grad
    result.fill_(7)
    assert torch.equal(x, before)
    assert torch.equal(y, labels)
    assert x.grad is None


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    norm=st.sampled_from(NORMS),
    eps=st.one_of(st.just(0.0), st.just(math.inf), st.floats(1e-3, 5)),
    step_size=st.floats(0, 3),
    num_steps=st.integers(0, 4),
    start=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_an_ascent_stays_in_the_ball_and_the_box(
    shape: tuple[int, ...], norm: Norm, eps: float, step_size: float, num_steps: int, start: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (1.4 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.2).clamp(0, 1)
    weight = torch.randn(x[0].numel(), 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, shape[:1], generator=generator)
    threat = ThreatModel(norm, eps, step_size, num_steps, random_start=start and math.isfinite(eps))
    result = ascend(lambda z: torch.tanh(z.flatten(1) @ weight), x, y, cross_entropy, threat, seed=seed)
    assert result.shape == x.shape
    assert 0 <= result.min() <= result.max() <= 1
    delta = (result - x).flatten(1).numpy()
    length = np.linalg.norm(delta, ord=2 if norm == "L2" else np.inf, axis=1)
    assert (length <= eps * (1 + 1e-12) + 1e-12).all()
    # Without a ball, the length of the way bounds the distance.
    assert (length <= num_steps * step_size + (eps if threat.random_start else 0) + 1e-9).all()


# No trace on the module.


def prepared_network() -> BatchNormNetwork:
    """A network in a state that no single train() or requires_grad_() call would restore."""
    network = BatchNormNetwork().train()
    network.norm2.eval()
    network.norm3.eval()
    network.conv.weight.requires_grad_(False)
    network.fc.weight.grad = torch.full_like(network.fc.weight, 3.0)
    return network


def trace(network: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {f"state {k}": v.clone() for k, v in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        state[f"requires_grad {name}"] = parameter.requires_grad
        state[f"grad {name}"] = None if parameter.grad is None else parameter.grad.clone()
    for name, module in network.named_modules():
        state[f"training {name}"] = module.training
        state[f"tracking {name}"] = getattr(module, "track_running_stats", None)
    return state


def assert_no_trace(network: nn.Module, before: dict[str, Any]) -> None:
    after = trace(network)
    assert after.keys() == before.keys()
    for key, value in after.items():
        same = torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]
        assert same, key


@pytest.mark.parametrize("mode", MODES)
def test_an_attack_leaves_no_trace(mode: AttackMode) -> None:
    network, (x, y) = prepared_network(), images(dtype=torch.float32)
    before = trace(network)
    result = ascend(network, x, y, cross_entropy, ThreatModel(), mode=mode)
    assert_no_trace(network, before)
    assert not torch.equal(result, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_attack_that_is_interrupted_leaves_no_trace(mode: AttackMode, error: type[BaseException]) -> None:
    class Breaking(BatchNormNetwork):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            logits = super().forward(x)
            if self.calls == 3:
                raise error("in the third step")
            return logits

    network, (x, y) = Breaking().train(), images(dtype=torch.float32)
    network.norm1.eval()
    before = trace(network)
    with pytest.raises(error, match="in the third step"):
        ascend(network, x, y, cross_entropy, ThreatModel(), mode=mode)
    assert_no_trace(network, before)
    assert torch.is_grad_enabled()


def test_during_an_attack_parameters_need_no_gradient() -> None:
    network, (x, y), seen = prepared_network(), images(dtype=torch.float32), list[bool]()
    hook = network.fc.register_forward_hook(lambda m, i, o: seen.append(any(p.requires_grad for p in m.parameters())))
    ascend(network, x, y, cross_entropy, ThreatModel(num_steps=2))
    hook.remove()
    assert seen == [False, False]


def test_eval_mode_attacks_the_network_that_is_evaluated() -> None:
    network, (x, y) = prepared_network(), images(dtype=torch.float32)
    result = ascend(network, x, y, cross_entropy, ThreatModel(), mode="eval")
    assert torch.equal(result, ascend(network.eval(), x, y, cross_entropy, ThreatModel(), mode="train"))


def test_eval_mode_does_not_call_a_train_method_that_has_effects() -> None:
    class Loud(BatchNormNetwork):
        calls = 0

        def train(self, mode: bool = True) -> "Loud":
            self.calls += 1
            return super().train(mode)

    network, (x, y) = Loud(), images(dtype=torch.float32)
    ascend(network, x, y, cross_entropy, ThreatModel(num_steps=1))
    assert network.calls == 0


def test_in_eval_mode_images_do_not_influence_each_other() -> None:
    network, (x, y) = TanhNetwork(), images()
    together = ascend(network, x, y, cross_entropy, ThreatModel())
    for i in range(len(x)):
        alone = ascend(network, x[i : i + 1], y[i : i + 1], cross_entropy, ThreatModel())
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-14)


def manual_logits(network: BatchNormNetwork, x: Tensor) -> Tensor:
    """Train mode by hand, without dropout: norm1 by the statistics of the batch, norm2 by its running ones."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    one, two = network.norm1, network.norm2
    h = (x - mean) / (var + one.eps).sqrt() * one.weight.view(1, -1, 1, 1) + one.bias.view(1, -1, 1, 1)
    h = F.conv2d(h, network.conv.weight, network.conv.bias).flatten(1)
    assert two.running_mean is not None
    assert two.running_var is not None
    h = torch.tanh((h - two.running_mean) / (two.running_var + two.eps).sqrt() * two.weight + two.bias)
    logits: Tensor = network.fc(network.norm3(h))
    centered = logits - logits.mean(0)
    last = network.untracked
    return centered / (logits.var(0, unbiased=False) + last.eps).sqrt() * last.weight + last.bias


def test_train_mode_uses_batch_statistics_where_the_layer_is_in_train_mode() -> None:
    network, (x, y) = BatchNormNetwork().double().train(), images()
    network.norm2.eval()
    network.dropout.eval()
    expected = x
    for _ in range(3):
        z = expected.clone().requires_grad_(True)
        loss = -torch.log_softmax(manual_logits(network, z), 1)[torch.arange(5), y].sum()
        (gradient,) = torch.autograd.grad(loss, z)
        lengths = gradient.flatten(1).square().sum(1).sqrt().view(-1, 1, 1, 1)
        expected = (expected + 0.05 * gradient / lengths).clamp(0, 1)
    result = ascend(network, x, y, cross_entropy, unbounded_ascent(0.05, 3), mode="train")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    evaluated = ascend(network, x, y, cross_entropy, unbounded_ascent(0.05, 3), mode="eval")
    assert (evaluated - expected).abs().max() > 1e-3


# Other types, and gradients that are none.

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_an_ascent_in_any_type_agrees_with_float64_to_its_precision(norm: Norm, dtype: torch.dtype) -> None:
    x, y = images(dtype=dtype)
    threat = ThreatModel(norm, eps=0.3, step_size=0.1, num_steps=5)
    # A linear logit has the same gradient everywhere, so that rounding is all that differs.
    weight = torch.randn(PIXELS, CLASSES, generator=torch.Generator().manual_seed(3)).to(dtype)
    result = ascend(lambda z: z.flatten(1) @ weight, x, y, targeted_logit, threat)
    exact = ascend(lambda z: z.flatten(1) @ weight.double(), x.double(), y, targeted_logit, threat)
    assert result.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=10 * unit)
    assert ((result >= 0) & (result <= 1)).all()
    distance = (result.double() - x.double()).flatten(1).norm(dim=1, p=2 if norm == "L2" else math.inf)
    assert (distance <= 0.3 + math.sqrt(PIXELS) * unit).all()
    assert (distance > 0.1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 0.3, math.inf])
def test_in_any_type_an_image_without_gradient_stays(eps: float, norm: Norm, dtype: torch.dtype) -> None:
    x, y = images(dtype=dtype)
    flat = ascend(lambda z: 0 * z.flatten(1)[:, :CLASSES], x, y, targeted_logit, ThreatModel(norm, eps))
    assert torch.equal(flat, x)


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_that_is_nan_shows_in_its_image_alone(norm: Norm) -> None:
    """Staying where it is, an image would count as robust."""
    network, (x, y) = TanhNetwork(), images()

    def broken(z: Tensor) -> Tensor:
        # The root's slope at 0 is infinite, its value 0.
        hurt = torch.zeros(len(z), 1, dtype=z.dtype)
        if len(z) > 2:
            hurt[2] = (0 * z[2].sum()).sqrt()
        logits: Tensor = network(z) + hurt
        return logits

    result, expected = (ascend(f, x, y, targeted_logit, ThreatModel(norm)) for f in (broken, network))
    others = [0, 1, 3, 4]
    assert torch.equal(result[others], expected[others])
    assert result[2].isnan().all()


# The surroundings.


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, nullcontext])
def test_an_attack_is_the_same_where_gradients_are_off(
    surroundings: Callable[[], AbstractContextManager[Any]],
) -> None:
    network, (x, y) = prepared_network(), images(dtype=torch.float32)
    threat = ThreatModel(random_start=True)
    expected, before = ascend(network, x, y, cross_entropy, threat), trace(network)
    with surroundings():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x_inside, y_inside, draws = x.clone(), y.clone(), torch.arange(len(x))
        assert x_inside.is_inference() == inference
        result = ascend(network, x_inside, y_inside, cross_entropy, threat, draws=draws)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
        assert torch.equal(result, expected)
    assert not result.is_inference()  # so that a loss may be computed at it
    assert_no_trace(network, before)


def test_a_network_trains_after_an_attack_in_inference_mode() -> None:
    network, (x, y) = BatchNormNetwork(), images(dtype=torch.float32)
    with torch.inference_mode():
        ascend(network, x.clone(), y.clone(), cross_entropy, ThreatModel(), mode="train")
    gradients = torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        (None, None, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_autocast_dtype_sets_the_precision_of_the_passes(
    outer: torch.dtype | None, inner: torch.dtype | None, expected: torch.dtype
) -> None:
    layer, (x, y), seen = nn.Linear(PIXELS, CLASSES), images(dtype=torch.float32), set[torch.dtype]()

    def logits(z: Tensor) -> Tensor:
        result: Tensor = layer(z.flatten(1))
        seen.add(result.dtype)
        return result

    with torch.autocast("cpu", dtype=outer, enabled=outer is not None):
        result = ascend(logits, x, y, cross_entropy, ThreatModel(), autocast_dtype=inner)
    assert seen == {expected}
    assert result.dtype == torch.float32


# The random start.


@pytest.fixture(params=NORMS)
def started(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Returns the random start alone, of images with room on all sides."""
    threat = ThreatModel(request.param, eps=0.3, num_steps=0, random_start=True)

    network = TanhNetwork()

    def start(count: int = 6, **arguments: Any) -> Tensor:
        x = torch.full((count, 3, 2, 2), 0.5, dtype=torch.float64)
        return ascend(network, x, torch.zeros(count).long(), cross_entropy, threat, **arguments)

    return start


def test_each_image_s_start_depends_on_its_draw_alone(started: Callable[..., Tensor]) -> None:
    by_place = started()
    assert torch.equal(started(3, draws=torch.tensor([5, 0, 2])), by_place[[5, 0, 2]])
    assert len({tuple(row) for row in by_place.flatten(1).tolist()}) == 6
    assert not (started(seed=1) == by_place).flatten(1).all(1).any()


def test_a_start_neither_reads_nor_moves_the_global_generator(started: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), started()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(started(), first)


def test_starts_are_uniform_in_the_ball() -> None:
    count, eps = 3000, 0.3
    x = torch.full((count, 1, 1, 2), 0.5, dtype=torch.float64)
    for norm in NORMS:
        threat = ThreatModel(norm, eps, num_steps=0, random_start=True)
        start = ascend(lambda z: z.flatten(1), x, torch.zeros(count).long(), cross_entropy, threat)
        delta = (start - x).view(count, 2).numpy() / eps
        order = 2 if norm == "L2" else np.inf
        # Area of the disc, or of the square, of half the radius; standard error 0.008.
        assert abs((np.linalg.norm(delta, ord=order, axis=1) < 0.5).mean() - 0.25) < 0.03
        assert np.linalg.norm(delta, ord=order, axis=1).max() <= 1 + 1e-9
        # All four quadrants alike.
        assert np.abs(np.sign(delta).mean(0)).max() < 0.06
        assert abs(np.sign(delta).prod(1).mean()) < 0.06


def test_the_ball_is_around_the_image_not_around_the_start() -> None:
    x, y = images()
    threat = ThreatModel("L2", eps=0.2, step_size=0.2, num_steps=5, random_start=True)
    result = ascend(TanhNetwork(), x, y, cross_entropy, threat)
    assert (result - x).flatten(1).norm(dim=1).max() <= 0.2 + 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_a_walk_may_begin_elsewhere_in_the_ball(norm: Norm) -> None:
    network, (x, y) = TanhNetwork(), images()
    threat = ThreatModel(norm, eps=0.2, step_size=0.05, num_steps=3)
    inside = (x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()).clamp(0, 1)
    states = Ascent(cross_entropy, threat).snapshots(network, x, y, (0, 1), start=inside)
    torch.testing.assert_close(states[0], inside, rtol=0, atol=1e-15)
    first = torch.stack(
        [
            torch.from_numpy(
                plain_ascent(network, i.numpy(), int(k), cross_entropy, ThreatModel(norm, math.inf, 0.05, 1))
            )
            for i, k in zip(inside, y, strict=True)
        ]
    )
    torch.testing.assert_close(states[1], first, rtol=0, atol=1e-11)
    assert torch.equal(ascend(network, x, y, cross_entropy, threat, num_steps=1, start=inside), states[1])


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_outside_the_ball_is_projected_onto_it(norm: Norm) -> None:
    x, y = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64), torch.zeros(1).long()
    far = x + torch.linspace(0.05, 0.4, 12, dtype=torch.float64).view(1, 3, 2, 2)
    threat = ThreatModel(norm, eps=0.2, num_steps=0)
    (delta,) = (ascend(TanhNetwork(), x, y, cross_entropy, threat, start=far) - x).flatten(1)
    steps = torch.linspace(0.05, 0.4, 12, dtype=torch.float64)
    expected = steps.clamp(max=0.2) if norm == "Linf" else steps * 0.2 / steps.square().sum().sqrt()
    torch.testing.assert_close(delta, expected)


@pytest.mark.parametrize("labels", [2, 1, 4])
def test_an_ascent_asks_for_one_label_per_image(labels: int) -> None:
    """With fewer, the other images would stay where they are."""
    x, y = torch.rand(3, 1, 2, 2), torch.zeros(labels, dtype=torch.long)
    said = rf"y must have one integer for each of 3 images, got the shape \({labels},\) of torch.int64"
    with pytest.raises(InputError, match=said):
        Ascent(targeted_logit, unbounded_ascent(0.1, 1))(lambda z: z.flatten(1), x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (2 * x - 1, y), r"x must be images in \[0, 1\], got values in \[-"),
        (lambda x, y: (1.0021 * (x / x.max()), y), r"x must be images in \[0, 1\], got values in \[.*, 1.002\]"),
        (lambda x, y: (x * torch.nan, y), r"x must be images in \[0, 1\], got values in \[nan"),
        (lambda x, y: ((x > 0.5).byte(), y), r"x must be images of floats in \[0, 1\], got torch.uint8"),
        (lambda x, y: (x, y - 100), "y must have labels of at least 0, got -100"),
        (lambda x, y: (x, y.float()), "y must have one integer for each of 5 images, .* of torch.float32"),
        (lambda x, y: (x, y.unsqueeze(1)), r"y must have one integer for each of 5 images, got the shape \(5, 1\)"),
    ],
)
def test_images_and_labels_that_no_walk_takes(change: Any, message: str) -> None:
    """Of a label −100 torch's loss knows nothing: its image would stay where it is, and look robust."""
    x, y = change(*images())
    with pytest.raises(InputError, match=message):
        ascend(TanhNetwork(), x, y, cross_entropy, ThreatModel())


def test_an_unknown_mode_is_refused_and_not_taken_for_train() -> None:
    x, y = images()
    with pytest.raises(InputError, match=r"mode must be one of \('eval', 'train'\), got 'evl'"):
        ascend(TanhNetwork(), x, y, cross_entropy, ThreatModel(), mode="evl")  # type: ignore[arg-type]


def test_pixels_that_a_transform_has_rounded_are_taken_as_everywhere_else() -> None:
    x, y = images()
    found = ascend(TanhNetwork(), 1.0009 * (x / x.max()), y, cross_entropy, ThreatModel())
    assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("draws", [torch.arange(1), torch.arange(4), torch.arange(5).unsqueeze(1)])
def test_each_image_needs_a_draw_of_its_own(draws: Tensor) -> None:
    """One for all would give all the same random start."""
    x, y = images()
    with pytest.raises(InputError, match=f"draws must have one number for each of 5 images, .*{len(draws)}"):
        ascend(TanhNetwork(), x, y, cross_entropy, ThreatModel(random_start=True), draws=draws)


def test_a_start_that_cannot_be_is_refused() -> None:
    x, y = images()
    with pytest.raises(ValueError, match=r"start must have the shape of x, \(5, 3, 2, 2\), got \(1, 3, 2, 2\)"):
        ascend(TanhNetwork(), x, y, cross_entropy, ThreatModel(), start=x[:1])
    with pytest.raises(ValueError, match="a walk has one start"):
        ascend(TanhNetwork(), x, y, cross_entropy, ThreatModel(random_start=True), start=x)


def test_train_mode_restores_any_buffer_that_a_pass_changes() -> None:
    norm = nn.InstanceNorm2d(1, track_running_stats=True)
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 3))
    model = nn.Sequential(norm, nn.BatchNorm2d(1), nn.Flatten(), linear).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ascend(model, torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.long), cross_entropy, ThreatModel(), mode="train")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_train_mode_leaves_a_waiting_graph_alone() -> None:
    """TRADES-like losses attack between a forward pass and its backward pass."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)).train()
    x, y = torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)
    clean = cross_entropy(model(x), y).sum()
    ascend(model, x, y, cross_entropy, ThreatModel(), mode="train")
    clean.backward()
    assert all(p.grad is not None for p in model.parameters())
