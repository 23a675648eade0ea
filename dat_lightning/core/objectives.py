"""What a gradient ascent climbs: functions of the logits and the labels that give one value per example.

Every objective has the signature :data:`Objective`; an ascent maximises the sum over the batch, whose gradient with
respect to an image is the gradient of that image's own value. Those that need no label ignore it.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]
"""Maps logits (N, K) and labels (N,) to the values (N,) that the ascent maximises."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns −log p(y|x), (N,): the untargeted attack climbs it.

    Source: Madry et al. 2018 (arXiv 1706.06083), Eq. 2.1.
    """
    return F.cross_entropy(logits, y, reduction="none")


def targeted_logit(logits: Tensor, y: Tensor) -> Tensor:
    """Returns f(x)[y] = −E(x, y), (N,): contrastive samples, generation and counterfactuals climb it.

    Source: DAT (arXiv 2510.13872).
    """
    return logits.gather(1, y.unsqueeze(1)).squeeze(1)


def negative_marginal_energy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns logsumexp f(x) = −E(x), (N,), whatever the label: unconditional sampling and attacks on OOD scores.

    In float32 at least: in bfloat16 E has two or three digits, and the weights of its gradient do not sum to 1.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(1)


def distance_to_uniform(logits: Tensor, y: Tensor) -> Tensor:
    """Returns KL(uniform ‖ p(·|x)), (N,), whatever the label: the attack that raises confidence on OOD images.

    Source: Augustin et al. 2020, RATIO (arXiv 2003.09461).
    """
    return -F.log_softmax(logits, dim=1).mean(1) - math.log(logits.shape[1])
