"""Calibration of confidences: its error, reliability diagrams, and temperature scaling."""

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from dat_lightning.core.errors import InputError
from dat_lightning.data.batches import require_finite

# The bounds of a temperature, for where none is best.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-3, 1e3


def calibration_error(confidence: Tensor, correct: Tensor, num_bins: int = 15) -> float:
    """Returns the expected calibration error: the mean over images of their bin's |accuracy − mean confidence|.

    Args:
        confidence: Probability of the predicted class, (N,) in (0, 1].
        correct: Whether it is the true one, (N,) bool.
        num_bins: Number M of bins ((m − 1)/M, m/M].

    Source: Guo et al. 2017 (arXiv 1706.04599), Eq. 3.
    """
    # torchmetrics' bins are [lower, upper), and those of 1 − p the source's; a confidence of 1 is in the last one.
    return float(binary_calibration_error(1 - confidence.double(), (~correct).long(), num_bins))


def reliability(confidence: Tensor, correct: Tensor, num_bins: int = 15) -> dict[str, list[float]]:
    """Returns the reliability diagram of the bins of :func:`calibration_error`, zeros where a bin is empty.

    Args:
        confidence: Probability of the predicted class, (N,) in (0, 1].
        correct: Whether it is the true one, (N,).
        num_bins: Number of bins M.

    Returns:
        Mean ``confidence``, ``accuracy`` and number of images (``count``) of each bin.

    Source: Guo et al. 2017 (arXiv 1706.04599), section 2.
    """
    confidence = confidence.double()
    place = torch.bucketize(confidence, torch.arange(1, num_bins, dtype=torch.float64) / num_bins)
    count = torch.bincount(place, minlength=num_bins)
    sums = {"confidence": confidence, "accuracy": correct.double()}
    means = {name: torch.bincount(place, each, num_bins) / count.clamp_min(1) for name, each in sums.items()}
    return {name: value.tolist() for name, value in {**means, "count": count}.items()}


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
