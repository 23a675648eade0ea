"""Out-of-distribution detection by a score of the logits: the scores, and how well one tells two sets apart."""

import math
from typing import Literal

import torch
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.core.objectives import Objective, negative_marginal_energy

Score = Literal["logsumexp", "max_logit", "max_softmax"]

# Share of test images that the threshold of FPR@95 accepts.
_ACCEPTED = 0.95


def max_logit(logits: Tensor, y: Tensor) -> Tensor:
    """Returns max f(x), (N,), whatever the label."""
    return logits.amax(1)


def max_log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Returns log p/(1 − p) for p = max softmax f(x), (N,), whatever the label.

    It orders images as p does, but its gradient does not vanish where p comes close to 1. With one class, where p is
    always 1, it is 0.
    """
    top, place = logits.max(1, keepdim=True)
    if logits.shape[1] == 1:
        return 0 * top.squeeze(1)
    others = logits.scatter(1, place, -torch.inf)
    return top.squeeze(1) - others.logsumexp(1)


OBJECTIVES: dict[Score, Objective] = {
    "logsumexp": negative_marginal_energy,
    "max_logit": max_logit,
    "max_softmax": max_log_odds,
}
"""Score → what an attack climbs to raise it."""


def detection_scores(logits: Tensor) -> dict[Score, Tensor]:
    """Returns all scores, (N,) in float64 on the CPU, of logits (N, K); high means in-distribution."""
    logits = logits.detach().cpu().double()
    return {
        "logsumexp": logits.logsumexp(1),
        "max_logit": logits.amax(1),
        "max_softmax": logits.softmax(1).amax(1),
    }


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Returns the area under the ROC curve: P(positive > negative) + ½ P(equal).

    Pairs are counted in integers, so the result is exact.

    Args:
        positive: Scores of in-distribution images, (N,).
        negative: Scores of others, (M,).

    Raises:
        InputError: If there are no scores of one kind, or one is NaN.
    """
    _require_scores(positive, negative)
    negative = negative.sort().values
    below = torch.searchsorted(negative, positive.contiguous()).sum()
    not_above = torch.searchsorted(negative, positive.contiguous(), right=True).sum()
    return int(below + not_above) / (2 * len(positive) * len(negative))


def false_positive_rate(positive: Tensor, negative: Tensor, accepted: float = _ACCEPTED) -> tuple[float, float]:
    """Returns the share of negatives at or above a threshold, and that threshold.

    The threshold is the highest score at or above which at least the share ``accepted`` of the positives lies; with
    0.95 this is FPR@95.

    Args:
        positive: Scores of in-distribution images, (N,).
        negative: Scores of others, (M,).
        accepted: Share of positives, in (0, 1].

    Raises:
        InputError: If there are no scores of one kind, one is NaN, or the share is outside its range.
    """
    _require_scores(positive, negative)
    if not 0 < accepted <= 1:
        raise InputError(f"accepted must lie in (0, 1], got {accepted}")
    # Rounded first: 0.95 · 20 is 19, whatever its last bits say.
    count = math.ceil(round(accepted * len(positive), 6))
    threshold = positive.sort(descending=True).values[count - 1]
    return float((negative >= threshold).double().mean()), float(threshold)


def _require_scores(positive: Tensor, negative: Tensor) -> None:
    for name, scores in (("positive", positive), ("negative", negative)):
        if len(scores) == 0 or bool(scores.isnan().any()):
            raise InputError(
                f"{name} scores must be at least one and no NaN, got {len(scores)}, {int(scores.isnan().sum())} NaN"
            )
