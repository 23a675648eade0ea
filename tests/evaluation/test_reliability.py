import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_lightning.evaluation import calibration_error, fit_temperature, reliability


def random_logits(seed: int, size: int = 400, classes: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    y = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)
    return logits, y


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_and_diagram_are_those_of_a_plain_loop(num_bins: int, seed: int) -> None:
    logits, y = random_logits(seed)
    confidence, prediction = logits.softmax(1).max(1)
    pairs = [(p, bool(k)) for p, k in zip(confidence.tolist(), prediction == y, strict=True)]
    expected = 0.0
    diagram = reliability(confidence, prediction == y, num_bins)
    for m in range(num_bins):
        chosen = [(p, right) for p, right in pairs if m / num_bins < p <= (m + 1) / num_bins]
        assert diagram["count"][m] == len(chosen)
        sure, accuracy = np.mean(chosen, axis=0) if chosen else (0.0, 0.0)
        assert (diagram["confidence"][m], diagram["accuracy"][m]) == pytest.approx((sure, accuracy), rel=1e-12)
        expected += len(chosen) / len(pairs) * abs(accuracy - sure)
    assert calibration_error(confidence, prediction == y, num_bins) == pytest.approx(expected, rel=1e-12)


def test_bins_contain_their_upper_edge_and_the_last_one_confidences_of_1() -> None:
    confidence, correct = torch.tensor([0.125, 0.25, 0.375, 0.5, 0.875, 1.0]), torch.tensor([0, 1, 0, 1, 1, 0]).bool()
    diagram = reliability(confidence, correct, 4)
    assert diagram["count"] == [2, 2, 0, 2]
    assert diagram["accuracy"] == [0.5, 0.5, 0.0, 0.5]
    assert diagram["confidence"] == [0.1875, 0.4375, 0.0, 0.9375]
    assert calibration_error(confidence, correct, 4) == (2 * 0.3125 + 2 * 0.0625 + 2 * 0.4375) / 6


def test_confidences_on_an_edge_fall_below_it() -> None:
    edges = torch.arange(1, 16, dtype=torch.float64) / 15
    assert reliability(edges, torch.ones(15), 15)["count"] == [1] * 15


@pytest.mark.parametrize(("seed", "scale"), [(0, 3.0), (1, 0.2), (2, 40.0)])
def test_the_temperature_minimises_the_likelihood_as_a_plain_search_finds_it(seed: int, scale: float) -> None:
    logits, y = random_logits(seed, scale=scale)
    z, labels = logits.numpy(), y.numpy()

    def nll(log_t: float) -> float:
        scaled = z / np.exp(log_t)
        return float((np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(z)), labels]).mean())

    low, high = -7.0, 7.0
    for _ in range(80):  # thirds: the likelihood has one valley
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if nll(left) < nll(right) else (left, high)
    t = fit_temperature(logits, y)
    assert math.log(t) == pytest.approx(low, abs=1e-5)
    # The slope of the likelihood in log T vanishes.
    assert abs(nll(math.log(t) + 1e-4) - nll(math.log(t) - 1e-4)) < 1e-8


@pytest.mark.parametrize(("gap", "share"), [(2.0, 0.75), (30.0, 0.9), (0.01, 0.6)])
def test_two_classes_have_a_closed_form(gap: float, share: float) -> None:
    """With logits (gap, 0), the best 1/T makes sigmoid(gap / T) the share that is right."""
    logits = torch.tensor([[gap, 0.0]]).expand(100, 2)
    y = (torch.arange(100) >= round(100 * share)).long()
    assert fit_temperature(logits.float(), y) == pytest.approx(gap / math.log(share / (1 - share)), rel=1e-6)


def test_temperature_undoes_a_scaling() -> None:
    logits, y = random_logits(4)
    assert fit_temperature(logits * 7 + 1000, y) == pytest.approx(7 * fit_temperature(logits, y), rel=1e-8)


def test_the_temperature_stays_finite_without_an_optimum() -> None:
    right = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert fit_temperature(right, torch.tensor([0, 1])) == 1e-3
    assert fit_temperature(right, torch.tensor([1, 0])) == 1e3
    # One that is there, but beyond the bounds: T = gap / log 3.
    logits, y = torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits * 1e-5, y) == pytest.approx(1e-3, rel=1e-6)
    assert fit_temperature(logits * 1e5, y) == pytest.approx(1e3, rel=1e-6)


def test_logits_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="needs finite logits, got NaN or infinite ones for 1 of 2 images"):
        fit_temperature(torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="at least one held-out image, got none"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
