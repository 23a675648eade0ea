"""Calibration of confidences: reliability diagrams, their error, and temperature scaling."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dat_lightning.core.errors import InputError

# The bounds of a temperature, for where none is best.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-3, 1e3


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: one entry per bin of confidence, zeros where a bin is empty.

    Attributes:
        confidence: Mean confidence.
        accuracy: Share of images that are right.
        count: Number of images.
    """

    confidence: list[float]
    accuracy: list[float]
    count: list[int]

    @property
    def error(self) -> float:
        """The expected calibration error: the gap between the two, averaged over images.

        Source: Guo et al. 2017 (arXiv 1706.04599), Eq. 3.
        """
        gaps = zip(self.confidence, self.accuracy, self.count, strict=True)
        return sum(count * abs(right - sure) for sure, right, count in gaps) / sum(self.count)


def reliability(
    confidence: Tensor,
    correct: Tensor,
    num_bins: int = 15,
    binning: Literal["equal_width", "equal_mass"] = "equal_width",
) -> Reliability:
    """Returns the reliability diagram of confidences (N,) in [0, 1] that were right or not (N,).

    Args:
        confidence: Probability of the predicted class.
        correct: Whether it is the true one.
        num_bins: Number of bins M.
        binning: ``equal_width`` for the bins ((m − 1)/M, m/M]; ``equal_mass`` for M runs of the sorted confidences
            whose lengths differ by one at most.

    Source: Guo et al. 2017 (arXiv 1706.04599), section 2; Nguyen & O'Connor 2015 (arXiv 1508.05154) for equal mass.
    """
    confidence, correct = confidence.double(), correct.double()
    if binning == "equal_width":
        place = torch.bucketize(confidence, torch.arange(1, num_bins, dtype=torch.float64) / num_bins)
    else:
        rank = confidence.argsort(stable=True).argsort()
        place = rank * num_bins // max(1, len(confidence))
    count = torch.bincount(place, minlength=num_bins)
    mean = count.clamp_min(1)
    sure = torch.bincount(place, confidence, num_bins) / mean
    right = torch.bincount(place, correct, num_bins) / mean
    return Reliability(sure.tolist(), right.tolist(), count.tolist())


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """Returns the T > 0 at which softmax(logits / T) has the least negative log-likelihood.

    The negative log-likelihood is convex in 1/T, and Newton's method between brackets finds T to a relative 1e-10. T
    lies in 0.001 … 1000: the first where every image is right and T cannot be too small, the last where it cannot be
    too large, because the network is no better than chance.

    Args:
        logits: Shape (N, K).
        y: True classes, (N,).

    Raises:
        InputError: If there are no images, or a logit is not finite.

    Source: Guo et al. 2017 (arXiv 1706.04599), section 4.2.
    """
    require_finite(logits, "temperature scaling")
    if len(logits) == 0:
        raise InputError("temperature scaling needs at least one held-out image, got none")
    logits = logits.double()
    margins = logits - logits.gather(1, y.unsqueeze(1))
    # The likelihood's slope in 1/T is the mean margin: at most 0 for any T, or at least 0 at T = ∞ already.
    if margins.max() <= 0 or margins.mean() >= 0:
        return LOWEST_TEMPERATURE if margins.max() <= 0 else HIGHEST_TEMPERATURE
    low, high, inverse = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE, 1.0
    for _ in range(200):
        p = (inverse * margins).softmax(1)
        mean = (p * margins).sum(1, keepdim=True)
        slope, curvature = float(mean.mean()), float((p * (margins - mean).square()).sum(1).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        # Outside the bracket, Newton's step is replaced by the middle on a logarithmic scale.
        step = step if low < step < high else math.sqrt(low * high)
        if abs(step / inverse - 1) < 1e-10:
            break
        inverse = step
    return 1 / inverse


def require_finite(logits: Tensor, who: str) -> None:
    """Raises an InputError if a logit of (N, K) is NaN or infinite."""
    wrong = int((~logits.isfinite()).any(1).sum())
    if wrong:
        raise InputError(f"{who} needs finite logits, got NaN or infinite ones for {wrong} of {len(logits)} images")
