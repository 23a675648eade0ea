"""What is measured of a network, on networks for which the answer is known."""

from typing import cast

import pytest
import torch
from torch import Tensor

from dat_lightning.data.draws import DrawStream
from dat_lightning.demo.evaluation import (
    ATTACK,
    ATTACK_STEPS,
    CHANGE,
    Counterfactuals,
    Evaluation,
    Robustness,
    Samples,
    accuracy,
    first_of_each_class,
    generate,
    robustness,
    turn_into_others,
)
from dat_lightning.demo.galleries import shown_steps
from dat_lightning.demo.judge import Judge, Quality, digits_for_testing
from dat_lightning.demo.plots import smoothed
from dat_lightning.sampling import PGDSampler


def _constant(x: Tensor) -> Tensor:
    """Says 3 whatever it sees, and has a gradient of zero."""
    return torch.nn.functional.one_hot(torch.tensor(3), 10).float() + 0 * x.flatten(1).sum(1, keepdim=True)


def test_a_constant_classifier_has_its_class_right_under_any_attack() -> None:
    x, y = digits_for_testing()
    share = float((y == 3).double().mean())
    assert accuracy(_constant, x, y) == share
    attacked = robustness(_constant, x, y)
    assert attacked.accuracy == attacked.robust_accuracy == share
    assert set(attacked.by_steps.values()) == {share}
    assert set(attacked.by_radius.values()) == {share}


def test_a_linear_classifier_withstands_radii_up_to_its_margin() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(256, generator=generator), dim=0)
    # Grey images at signed distances from the plane; the box [0, 1] is out of reach.
    distances = torch.tensor([-1.7, -0.6, 0.1, 0.3, 0.7, 1.2, 1.6, 1.9])
    x = (0.5 + distances[:, None] * direction / 2).reshape(-1, 1, 16, 16)

    def logits(images: Tensor) -> Tensor:
        score = (images.flatten(1) - 0.5) @ direction * 2
        return torch.stack([-score, score], dim=1)

    y = (distances > 0).long()
    attacked = robustness(logits, x, y, radii=(0.0, 0.25, 0.5, 0.7))
    margins = distances.abs() / 2
    for radius, share in attacked.by_radius.items():
        assert share == float((margins > radius).double().mean())
    # One step moves by step_size, until the radius holds it.
    for steps in ATTACK_STEPS:
        reach = min(ATTACK.eps, ATTACK.step_size * steps)
        assert attacked.by_steps[steps] == float((margins > reach).double().mean())


class _Seeds:
    """Image i is grey of level i/1000."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, index: int) -> tuple[Tensor, None]:
        self.asked.append(index)
        return torch.full((1, 4, 4), index / 1000), None


def test_generation_starts_from_each_seed_once_and_climbs_its_class() -> None:
    weights = torch.zeros(2, 16)
    weights[0, 0], weights[1, 1] = 1, 1
    seeds = _Seeds()
    sampler = PGDSampler(num_samples=7, num_steps=[1, 2], step_size=0.25, batch_size=3)
    samples = generate(lambda x: x.flatten(1) @ weights.T, sampler, cast(DrawStream, seeds), 2, "test")
    assert seeds.asked == list(range(7))
    assert samples.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    torch.testing.assert_close(samples.seeds[:, 0, 0, 0], torch.arange(7) / 1000)
    for steps, images in samples.images.items():
        assert images.dtype == torch.uint8
        flat = images[:, 0].flatten(1)
        for index in range(7):
            expected = torch.full((16,), index / 1000)
            expected[index % 2] += 0.25 * steps
            assert flat[index].tolist() == (expected * 255).round().int().tolist()


def test_counterfactuals_keep_the_original_and_stay_in_the_ball() -> None:
    x, y = digits_for_testing()
    originals = first_of_each_class(x, y)
    for label in range(10):
        assert torch.equal(originals[label], x[y.tolist().index(label)])
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(10, 256, generator=generator)
    result = turn_into_others(lambda images: images.flatten(1) @ weights.T, originals, Judge())
    for label in range(10):
        assert torch.equal(result.images[label, label].float(), (originals[label] * 255).round().expand(3, -1, -1))
    moved = (result.images[:, :, 0].float() / 255 - originals).flatten(2).norm(dim=2)
    assert moved.max() < CHANGE.eps + 0.05  # what rounding to eight bits may add
    assert (moved + torch.eye(10) > 1).all()


def test_success_counts_changed_digits_alone() -> None:
    readings = torch.tensor([[9, 1, 0], [0, 9, 0], [9, 1, 9]])
    assert Counterfactuals(torch.zeros(3, 3, 3, 2, 2), readings).success == pytest.approx(3 / 6)


def test_the_best_step_count_is_that_of_the_smallest_distance() -> None:
    def quality(fid: float) -> Quality:
        return Quality(fid, precision=0, recall=0, label_agreement=0, diversity=0)

    nothing = torch.zeros(0)
    evaluation = Evaluation(
        Robustness(0, 0, {}, {}),
        Samples(nothing, nothing, {}),
        {5: quality(3.0), 10: quality(1.0), 20: quality(2.0)},
        Counterfactuals(nothing, nothing),
    )
    assert evaluation.best_steps == 10
    assert evaluation.best.fid == 1.0


def test_a_picture_shows_all_steps_or_some_with_the_best() -> None:
    assert shown_steps([20, 5, 10], best=10) == [5, 10, 20]
    steps = list(range(5, 105, 5))
    shown = shown_steps(steps, best=35)
    assert shown == sorted(set(shown))
    assert {5, 35, 100} <= set(shown) <= set(steps)
    assert len(shown) in (8, 9)


def test_smoothing_averages_neighbours() -> None:
    assert smoothed([0, 3, 6, 9, 0], 3) == [1.5, 3, 6, 5, 4.5]
    assert smoothed([1, 2], 1) == [1, 2]
    assert smoothed([], 5) == []
