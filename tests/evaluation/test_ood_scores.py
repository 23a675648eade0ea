import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from dat_lightning.core import input_gradient
from dat_lightning.evaluation import auroc, detection_scores, false_positive_rates
from dat_lightning.evaluation.ood_scores import OBJECTIVES

levels = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30)
numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(st.one_of(st.tuples(levels, levels), st.tuples(numbers, numbers)))
def test_auroc_is_that_of_scikit_learn_and_of_all_pairs(scores: tuple[list[float], list[float]]) -> None:
    positive, negative = scores
    found = auroc(tensor(positive), tensor(negative))
    truth = [1] * len(positive) + [0] * len(negative)
    assert found == pytest.approx(roc_auc_score(truth, positive + negative), abs=1e-12)
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert found == sum(pairs) / len(pairs)


def test_auroc_of_many_scores_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(5000, generator=generator, dtype=torch.float64) + 1
    negative = torch.randn(3000, generator=generator, dtype=torch.float64).round(decimals=1)
    truth = np.r_[np.ones(5000), np.zeros(3000)]
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(truth, torch.cat([positive, negative])), abs=1e-12)


@given(st.one_of(st.tuples(levels, levels), st.tuples(numbers, numbers)), st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_the_false_positive_rate_is_that_of_the_highest_threshold(
    scores: tuple[list[float], list[float]], accepted: float
) -> None:
    positive, negative = scores
    ((rate, threshold),) = false_positive_rates(tensor(positive), tensor(negative), [accepted])
    enough = [t for t in positive if sum(p >= t for p in positive) >= accepted * len(positive) - 1e-9]
    assert threshold == max(enough)
    assert rate == pytest.approx(sum(n >= threshold for n in negative) / len(negative))


def test_fpr95_is_a_point_of_the_roc_curve_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(1)
    positive, negative = torch.randn(2, 700, generator=generator, dtype=torch.float64)
    fpr, tpr, _ = roc_curve([1] * 700 + [0] * 700, torch.cat([positive + 1, negative]), drop_intermediate=False)
    assert false_positive_rates(positive + 1, negative, [0.95])[0][0] == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_percentage_of_a_round_number_is_exact(percent: int) -> None:
    """0.07 · 100 is 7.000000000000001 in floating point, and yet seven scores are enough."""
    for size in (100, 1000):
        scores = torch.arange(size, dtype=torch.float64)
        assert false_positive_rates(scores, scores, [percent / 100])[0][1] == size - size * percent // 100


def test_scores_are_those_of_the_logits() -> None:
    scores = detection_scores(torch.tensor([[math.log(1.0), math.log(3.0)], [500.0, 0.0]]))
    assert scores["logsumexp"].tolist() == pytest.approx([math.log(4), 500.0])
    assert scores["max_logit"].tolist() == pytest.approx([math.log(3), 500.0])
    assert scores["max_softmax"].tolist() == pytest.approx([0.75, 1.0])
    assert all(values.dtype == torch.float64 for values in scores.values())


@pytest.mark.parametrize("score", ["logsumexp", "max_logit", "max_softmax"])
def test_what_an_attack_climbs_orders_images_as_the_score_does(score: str) -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    climbed = OBJECTIVES[score](logits, torch.zeros(50, dtype=torch.long))  # type: ignore[index]
    assert torch.equal(climbed.argsort(), detection_scores(logits)[score].argsort())  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_attack_on_a_saturated_softmax_has_a_gradient(dtype: torch.dtype) -> None:
    logits = torch.tensor([[600.0, 0.0, 0.0]], dtype=dtype)
    gradient = input_gradient(lambda x: x, logits, torch.tensor([0]), OBJECTIVES["max_softmax"])
    assert gradient[0].tolist() == pytest.approx([1.0, -0.5, -0.5])


def test_a_single_class_leaves_the_attack_on_the_softmax_where_it_is() -> None:
    gradient = input_gradient(lambda x: x, torch.tensor([[3.0]]), torch.tensor([0]), OBJECTIVES["max_softmax"])
    assert gradient.tolist() == [[0.0]]


def test_scores_that_are_none_are_refused() -> None:
    some, none = torch.zeros(3), torch.zeros(0)
    with pytest.raises(ValueError, match="negative scores must be at least one and no NaN, got 0, 0 NaN"):
        auroc(some, none)
    with pytest.raises(ValueError, match=r"positive scores .* got 2, 1 NaN"):
        false_positive_rates(torch.tensor([1.0, math.nan]), some, [0.5])
    with pytest.raises(ValueError, match=r"accepted must lie in \(0, 1\], got 0"):
        false_positive_rates(some, some, [0.5, 0])
