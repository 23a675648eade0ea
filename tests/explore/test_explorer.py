import itertools
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dat_lightning import EnergyModel, RandomLength, SmallResNet
from dat_lightning.core import harmonic, normal_noise
from dat_lightning.explore import Explorer
from dat_lightning.explore.explorer import MAX_IMAGES
from tests import tiny
from tests.explore.conftest import climb

SHAPE = (1, 16, 16)
NOISE = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def explorer() -> Explorer:
    return Explorer(tiny.energy_model(), SHAPE)


def seeds(draw: int) -> tuple[Tensor, None]:
    return torch.full(SHAPE, (draw % 1000) / 1000), None


def test_a_reading_has_posterior_and_both_energies(explorer: Explorer) -> None:
    reading = explorer.classify(NOISE[0])
    with torch.no_grad():
        logits = explorer.model(NOISE[:1])[0]
    exponentials = logits.double().exp()
    torch.testing.assert_close(reading.probabilities.double(), exponentials / exponentials.sum())
    torch.testing.assert_close(reading.joint_energies, -logits)
    assert reading.energy == pytest.approx(-float(exponentials.sum().log()), abs=1e-5)
    assert reading.prediction == int(logits.argmax())


@pytest.mark.parametrize("eps", [0.7, 3.0])
def test_a_walk_is_the_projected_ascent_with_every_state(explorer: Explorer, eps: float) -> None:
    walk = explorer.counterfactual(NOISE[0], 4, eps, num_steps=6, step_size=0.3)
    expected = climb(explorer.model, NOISE[0], 4, 6, 0.3, eps)
    assert len(walk) == 6
    assert torch.equal(walk.images[0], NOISE[0])
    torch.testing.assert_close(walk.images, torch.stack(expected), atol=1e-4, rtol=0)
    assert float(walk.logits[-1, 4]) > float(walk.logits[0, 4])
    with torch.no_grad():
        torch.testing.assert_close(walk.logits, explorer.model(torch.stack(expected)), atol=1e-3, rtol=1e-3)
    l2, linf = walk.distances(6)
    delta = (expected[-1] - NOISE[0]).abs()
    assert l2 == pytest.approx(float(delta.square().sum().sqrt()), abs=1e-4)
    assert l2 <= eps + 1e-5
    assert linf == pytest.approx(float(delta.max()), abs=1e-4)
    assert walk.distances(0) == (0, 0)


def test_by_default_a_walk_could_go_two_and_a_half_radii(explorer: Explorer) -> None:
    walk = explorer.counterfactual(NOISE[0], 4, 2.0, num_steps=8)
    assert walk.threat_model.step_size == 0.625
    first = (walk.images[1] - walk.images[0]).norm()
    # Clipping to [0, 1] may shorten a step.
    assert 0.4 < float(first) <= 0.626


def test_a_walk_of_no_radius_stays(explorer: Explorer) -> None:
    walk = explorer.counterfactual(NOISE[0], 4, 0.0, num_steps=3)
    assert torch.equal(walk.images, NOISE[0].expand(4, -1, -1, -1))


@pytest.mark.parametrize("target", [4, None])
def test_a_filling_is_the_ascent_of_the_hidden_rows_alone(explorer: Explorer, target: int | None) -> None:
    """The network as a function of these rows, the others fixed, climbed by the formula."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[5:9] = True
    walk = explorer.fill(NOISE[0], mask, target, num_steps=6, step_size=0.3)
    start = harmonic(NOISE[:1], mask)[0]
    assert torch.equal(walk.images[0], start)

    class OfRows(torch.nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            logits: Tensor = explorer.model(torch.cat([NOISE[:1, :, :5], rows, NOISE[:1, :, 9:]], 2))
            return logits if target is not None else logits.logsumexp(1, keepdim=True)

    expected = climb(OfRows(), start[:, 5:9], target or 0, 6, 0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(walk.images[:, :, 5:9], torch.stack(expected), atol=1e-4, rtol=0)
    assert torch.equal(walk.images[..., :5, :], NOISE[:1, :, :5].expand(7, -1, -1, -1))
    assert torch.equal(walk.images[..., 9:, :], NOISE[:1, :, 9:].expand(7, -1, -1, -1))
    assert walk.target == (walk.reading(6).prediction if target is None else target)
    assert float((walk.images[6] - start).abs().max()) > 0.05


def test_samples_are_the_unbounded_ascent_from_the_seeds() -> None:
    explorer = Explorer(tiny.energy_model(), SHAPE, seeds=seeds)
    samples = explorer.generate(2, num_images=3, num_steps=5, step_size=0.4, seed=1)
    starts = torch.stack([seeds(MAX_IMAGES + k)[0] for k in range(3)])
    assert torch.equal(samples.starts, starts)
    expected = torch.stack([climb(explorer.model, start, 2, 5, 0.4)[-1] for start in starts])
    torch.testing.assert_close(samples.images, expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(samples.logits, explorer.model(expected), atol=1e-3, rtol=1e-3)


def test_samples_climb_by_the_rule_whose_noise_is_each_image_s_own() -> None:
    """Against one image after another; more than a batch, so that places in a batch repeat."""
    explorer = Explorer(tiny.energy_model(), SHAPE, seeds=seeds)
    samples = explorer.generate(2, num_images=18, num_steps=4, step_size=0.4, seed=1, rule=RandomLength(0.5))
    lengths = []
    for k in range(18):
        draw = MAX_IMAGES + k
        u = 1 + 0.5 * (2 * torch.special.ndtr(normal_noise(0, "noise of step 0", [draw], SHAPE)[0, 0, 0, 0]) - 1)
        lengths.append(float(u))
        expected = climb(explorer.model, samples.starts[k], 2, 4, 0.4 * float(u))[-1]
        torch.testing.assert_close(samples.images[k], expected, atol=1e-3, rtol=0)
    assert len(set(lengths)) == 18


@pytest.mark.parametrize("stream", [None, seeds])
def test_a_sample_depends_on_class_seed_and_place_alone(stream: Any) -> None:
    explorer = Explorer(tiny.energy_model(), SHAPE, seeds=stream)
    many = explorer.generate(2, num_images=20, num_steps=3, seed=5)
    torch.manual_seed(99)
    few = explorer.generate(2, num_images=3, num_steps=3, seed=5)
    assert torch.equal(many.starts[:3], few.starts)
    torch.testing.assert_close(many.images[:3], few.images, atol=1e-5, rtol=0)
    again = explorer.generate(2, num_images=20, num_steps=3, seed=5)
    assert torch.equal(again.images, many.images)
    other = explorer.generate(2, num_images=20, num_steps=3, seed=6)
    assert not {tuple(x.flatten().tolist()) for x in other.starts} & {tuple(x.flatten().tolist()) for x in many.starts}


def test_whoever_watches_sees_every_step_once_and_the_end(explorer: Explorer) -> None:
    told: list[tuple[int, int]] = []
    explorer.counterfactual(NOISE[0], 1, 1.0, 4, watch=lambda done, total: told.append((done, total)))
    assert told == [(k, 4) for k in range(5)]
    told.clear()
    explorer.generate(1, 20, 3, watch=lambda done, total: told.append((done, total)))
    assert told[-1] == (6, 6)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_network_is_left_as_it_was(explorer: Explorer) -> None:
    before = {name: value.clone() for name, value in explorer.model.state_dict().items()}
    explorer.counterfactual(NOISE[0], 1, 1.0, 2)
    explorer.generate(1, 2, 2)
    assert all(torch.equal(value, before[name]) for name, value in explorer.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in explorer.model.parameters())


def test_several_visitors_get_what_one_gets(explorer: Explorer) -> None:
    expected = [explorer.counterfactual(image, 3, 1.0, 10).images for image in NOISE]
    found: dict[int, Tensor] = {}
    order: list[int] = []

    def visit(k: int) -> None:
        def watch(done: int, total: int) -> None:
            order.append(k)
            time.sleep(0.002)  # lets the others in, if they can

        found[k] = explorer.counterfactual(NOISE[k], 3, 1.0, 10, watch=watch).images

    threads = [threading.Thread(target=visit, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], expected[k]) for k in range(3))
    # One at a time: an ascent sets what parameters need, and sets it back. The last word of each comes after that,
    # and may fall into another one's walk.
    walks = [k for k, _ in itertools.groupby(order)]
    assert len(order) == 33
    assert len(walks) <= 9


def test_colour_images_and_other_sizes_work() -> None:
    model = EnergyModel(SmallResNet(num_classes=3, in_channels=3, widths=(4, 8)))
    explorer = Explorer(model, (3, 20, 12), ["cat", "dog", "owl"])
    assert explorer.num_classes == 3
    assert explorer.generate(2, 2, 2).images.shape == (2, 3, 20, 12)
    assert explorer.counterfactual(torch.rand(3, 20, 12), 0, 1.0, 2).images.shape == (3, 3, 20, 12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda e: e.classify(torch.rand(3, 16, 16)), r"image must have the shape \(1, 16, 16\), got \(3, 16, 16\)"),
        (lambda e: e.classify(NOISE[0] * 2), r"image must lie in \[0, 1\], got"),
        (lambda e: e.classify(NOISE[0] * float("nan")), r"image must lie in \[0, 1\], got nan"),
        (lambda e: e.counterfactual(NOISE[0], 10, 1.0), r"target must be a class in 0 … 9, got 10"),
        (lambda e: e.counterfactual(NOISE[0], 1, -1.0), r"eps must be a finite radius of at least 0, got -1"),
        (lambda e: e.counterfactual(NOISE[0], 1, float("inf")), r"eps must be a finite radius of at least 0, got inf"),
        (lambda e: e.counterfactual(NOISE[0], 1, 1.0, 0), r"num_steps must lie in 1 … 500, got 0"),
        (lambda e: e.counterfactual(NOISE[0], 1, 1.0, step_size=-1.0), r"step_size must be .* got -1"),
        (lambda e: e.fill(NOISE[0], torch.ones(16, 15) > 0), r"mask must be of 16×16 pixels, .* got \(16, 15\)"),
        (lambda e: e.fill(NOISE[0], torch.zeros(16, 16) > 0), r"some of them true"),
        (lambda e: e.fill(NOISE[0], torch.ones(16, 16)), r"mask must be of type bool"),
        (lambda e: e.fill(NOISE[0], torch.ones(16, 16) > 0, 10), r"target must be a class in 0 … 9, got 10"),
        (lambda e: e.fill(NOISE[0] * 2, torch.ones(16, 16) > 0), r"image must lie in \[0, 1\], got"),
        (lambda e: e.fill(NOISE[0], torch.ones(16, 16) > 0, 1, 0), r"num_steps must lie in 1 … 500, got 0"),
        (lambda e: e.generate(-1), r"target must be a class in 0 … 9, got -1"),
        (lambda e: e.generate(1, 65), r"num_images must lie in 1 … 64, got 65"),
        (lambda e: e.generate(1, seed=-1), r"seed must be at least 0, got -1"),
    ],
)
def test_arguments_outside_their_range_are_named(call: Any, said: str, explorer: Explorer) -> None:
    with pytest.raises(ValueError, match=said):
        call(explorer)


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes images of 1 channel\(s\), got the shape \(1, 3, 16, 16\)"):
        Explorer(tiny.energy_model(), (3, 16, 16))
    with pytest.raises(ValueError, match="class_names must name the network's 10 classes, got 2 names"):
        Explorer(tiny.energy_model(), SHAPE, ["a", "b"])
    with pytest.raises(ValueError, match="image_shape must be channels, height and width"):
        Explorer(tiny.energy_model(), (16, 16))
    diverged = tiny.energy_model()
    torch.nn.init.constant_(diverged.backbone.fc.bias, float("nan"))  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        Explorer(diverged, SHAPE)
