"""Out-of-distribution detection by a score of the logits: the scores, and how well one tells two sets apart."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_roc

from dat_lightning.core.errors import InputError
from dat_lightning.core.objectives import Objective, negative_marginal_energy

Score = Literal["logsumexp", "max_logit", "max_softmax"]


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

    Args:
        positive: Scores of in-distribution images, (N,).
        negative: Scores of others, (M,).

    Raises:
        InputError: If there are no scores of one kind, or one is NaN.
    """
    above, reached, _ = _curve(positive, negative)
    return float(torch.trapezoid(reached, above)) / (len(positive) * len(negative))


def false_positive_rates(positive: Tensor, negative: Tensor, accepted: Sequence[float]) -> list[tuple[float, float]]:
    """Returns for several shares the share of negatives at or above a threshold, and that threshold.

    The threshold is the highest score at or above which at least the share ``accepted`` of the positives lies; with
    0.95 this is FPR@95.

    Args:
        positive: Scores of in-distribution images, (N,).
        negative: Scores of others, (M,).
        accepted: Shares of positives, in (0, 1].

    Raises:
        InputError: If there are no scores of one kind, one is NaN, or a share is outside its range.
    """
    wrong = [share for share in accepted if not 0 < share <= 1]
    if wrong:
        raise InputError(f"accepted must lie in (0, 1], got {wrong[0]}")
    above, reached, thresholds = _curve(positive, negative)
    found = []
    for share in accepted:
        # Rounded first: 0.95 · 20 is 19, whatever its last bits say.
        count = math.ceil(round(share * len(positive), 6))
        first = int((reached >= count).int().argmax())
        found.append((float(above[first]) / len(negative), float(thresholds[first])))
    return found


def _curve(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many negatives and how many positives lie at or above each threshold, in float64, and the thresholds.

    torchmetrics takes scores outside [0, 1] for logits, and a sigmoid makes large ones equal: it gets ranks, which have
    the same order. Its rates are in float32, counts are exact.
    """
    for name, scores in (("positive", positive), ("negative", negative)):
        if len(scores) == 0 or bool(scores.isnan().any()):
            raise InputError(
                f"{name} scores must be at least one and no NaN, got {len(scores)}, {int(scores.isnan().sum())} NaN"
            )
    different, place = torch.cat([positive, negative]).unique(return_inverse=True)
    largest = max(1, len(different) - 1)
    target = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long()
    fpr, tpr, ranks = binary_roc(place.double() / largest, target)
    above, reached = (fpr.double() * len(negative)).round(), (tpr.double() * len(positive)).round()
    # The first threshold is above all scores, and nothing reaches it.
    places = (ranks.double() * largest).round().long().clamp_max(len(different) - 1)
    return above, reached, different[places]
