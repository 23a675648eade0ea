"""Signs that an attack failed where a network seems firm, and the confidence interval of a share."""

import math
from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor

from dat_lightning.core.threat_model import ThreatModel

# From where on a sign counts. Square: the package's own share, and a share of what the other attacks break, so that one
# odd image of many says nothing, and one where gradients find none does.
_SQUARE_ALONE, _OF_OTHERS = 0.002, 0.1
# What is left over: a share, and a number among which a stronger attack would surely find one more.
_LEFT_OVER, _TOO_FEW = 0.05, 50


def attack_name(threat_model: ThreatModel) -> str:
    """Returns the name of a figure, such as ``robust_accuracy_L2_0.5_10x0.1`` for ten steps of 0.1."""
    t = threat_model
    start = "_random" if t.random_start else ""
    return f"robust_accuracy_{t.norm}_{t.eps:g}_{t.num_steps}x{t.step_size:g}{start}"


def masking_signs(
    correct: Tensor, robust: Mapping[ThreatModel, Tensor], vanished: Tensor, dimensions: int
) -> dict[ThreatModel, list[str]]:
    """Returns for each threat model what speaks against its figure, as sentences.

    A threat model is *stronger* than another of the same norm if neither ε, number of steps nor reach is smaller,
    and ε or the number of steps is larger; the reach is how far the walk can get. The signs:

    - a weaker attack, of fewer steps or smaller ε, breaks more images than it, beyond two standard errors;
    - twice the reach of a weaker one breaks not one of more than 50 images, or twice the steps where that broke none;
    - it can get from any image to plain grey, where all images are alike, and leaves more than 5 % correct;
    - the gradient vanishes at more than 5 % of the correct images.

    Args:
        correct: Whether images are classified correctly, (N,).
        robust: Whether they are after each attack, (N,).
        vanished: Whether the gradient vanishes at the image, (N,), see :func:`~dat_lightning.core.vanishes`.
        dimensions: Number of values in an image.

    Source: Athalye et al. 2018 (arXiv 1802.00420), Section 3.1.
    """
    total = len(correct)
    signs: dict[ThreatModel, list[str]] = {threat_model: [] for threat_model in robust}
    for strong, weak in permutations(robust, 2):
        if not _is_stronger(strong, weak):
            continue
        only_weak = int((robust[strong] & ~robust[weak]).sum())
        only_strong = int((robust[weak] & ~robust[strong]).sum())
        left = int(robust[strong].sum())
        grown = _reach(strong) >= 2 * _reach(weak) > 0
        longer = strong.num_steps >= 2 * weak.num_steps > 0 and bool((robust[weak] == correct).all())
        if only_weak - only_strong > 2 * math.sqrt(only_weak + only_strong):
            signs[strong].append(
                f"leaves {left / total:.1%} correct, the weaker {attack_name(weak)} only {share_of(robust[weak]):.1%}."
            )
        elif (grown or longer) and only_strong == 0 and left > max(_LEFT_OVER * total, _TOO_FEW):
            signs[strong].append(f"breaks no image that the weaker {attack_name(weak)} does not break.")
    for threat_model, survived in robust.items():
        to_grey = math.sqrt(dimensions) / 2 if threat_model.norm == "L2" else 0.5
        if _reach(threat_model) >= to_grey and share_of(survived) > _LEFT_OVER:
            signs[threat_model].append(
                f"can turn any image into any other, and leaves {share_of(survived):.1%} correct."
            )
        signs[threat_model] += vanished_signs(correct, vanished)
    return signs


def vanished_signs(correct: Tensor, vanished: Tensor) -> list[str]:
    """Returns a sentence if the gradient vanishes at more than 5 % of the correct images.

    Args:
        correct: Whether images are classified correctly, (N,).
        vanished: Whether the gradient vanishes at the image, (N,), see :func:`~dat_lightning.core.vanishes`.
    """
    lost = share_of(vanished[correct]) if correct.any() else 0.0
    if lost <= _LEFT_OVER:
        return []
    return [f"the gradient vanishes (its length is below 1e-10) at {lost:.1%} of the correct images."]


def square_signs(hits: Mapping[str, Tensor]) -> list[str]:
    """Returns a sentence if Square alone breaks more than 0.2 % of the images, and a tenth of what the others break.

    Args:
        hits: Attack → whether it broke each image, (N,).
    """
    others = [hit for attack, hit in hits.items() if attack != "square"]
    if "square" not in hits or not others:
        return []
    by_others = torch.stack(others).any(0)
    alone = hits["square"] & ~by_others
    if int(alone.sum()) <= max(_SQUARE_ALONE * len(alone), _OF_OTHERS * int(by_others.sum())):
        return []
    return [f"Square, which needs no gradient, breaks {share_of(alone):.1%} of the images that no other attack breaks."]


def wilson_interval(successes: int, trials: int) -> list[float]:
    """Returns the lower and upper end of the 95 % confidence interval of a share.

    Source: Wilson 1927, Journal of the American Statistical Association 22 (158).
    """
    z = 1.959964
    share, spread = successes / trials, z * z / trials
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return [max(0.0, center - half), min(1.0, center + half)]


def _is_stronger(a: ThreatModel, b: ThreatModel) -> bool:
    no_less = a.eps >= b.eps and a.num_steps >= b.num_steps and _reach(a) >= _reach(b) * (1 - 1e-6)
    return a.norm == b.norm and no_less and (a.eps > b.eps or a.num_steps > b.num_steps)


def _reach(threat_model: ThreatModel) -> float:
    """How far from the image a walk can get."""
    t = threat_model
    return t.eps if t.random_start else min(t.eps, t.num_steps * t.step_size)


def share_of(flags: Tensor) -> float:
    """Returns the share of examples for which something holds."""
    return float(flags.double().mean())
