"""Noise-contrastive estimation: a proposal whose density is known, and the constant that is best for a batch."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TiedGaussians:
    """A mixture of Gaussians with one covariance, whose log q has a closed form.

    Samples and log q are computed in the precision of the arguments, whatever autocast says: in bfloat16 samples would
    not be those of q. ``means`` and ``factor`` are converted to it in every call where they are not, see :meth:`to`.

    Attributes:
        weights: Of the components, (K,), which sum to 1.
        means: Their means, (K, D).
        factor: Lower triangular L with the covariance L Lᵀ, (D, D).
    """

    weights: Tensor
    means: Tensor
    factor: Tensor

    @classmethod
    def fitted(cls, images: Tensor, labels: Tensor, noise: float) -> "TiedGaussians":
        """Returns a component for each class of images (N, C, H, W) with labels (N,), in float64.

        The covariance is the mean one within the classes, plus ``noise``² on its diagonal.
        """
        x, classes = images.flatten(1).double(), labels.unique()
        means = torch.stack([x[labels == label].mean(0) for label in classes])
        spread = x - means[torch.searchsorted(classes, labels)]
        covariance = spread.T @ spread / len(x) + noise**2 * torch.eye(x.shape[1], dtype=torch.float64)
        shares = torch.stack([(labels == label).double().mean() for label in classes])
        return cls(shares, means, torch.linalg.cholesky(covariance))

    def to(self, like: Tensor) -> "TiedGaussians":
        """Returns it with means and factor in the precision and on the device of a tensor; the few weights stay."""
        return replace(self, means=self.means.to(like), factor=self.factor.to(like))

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log q, (N,), of images (N, C, H, W)."""
        q = self.to(x)
        with torch.autocast(x.device.type, enabled=False):
            apart = x.flatten(1).unsqueeze(1) - q.means
            white = torch.linalg.solve_triangular(q.factor, apart.flatten(0, 1).T, upper=False).T.view_as(apart)
            constant = q.factor.diagonal().log().sum() + 0.5 * apart.shape[2] * math.log(2 * math.pi)
            log_q: Tensor = (self.weights.to(x).log() - 0.5 * white.square().sum(2)).logsumexp(1) - constant
        return log_q

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Returns samples of the shape of standard normal noise (N, C, H, W); uniform (N,) choose components."""
        q = self.to(normal)
        ends = self.weights.cumsum(0).to(uniform)[:-1]
        component = (uniform.unsqueeze(1) >= ends).sum(1)
        with torch.autocast(normal.device.type, enabled=False):
            moved = normal.flatten(1) @ q.factor.T
        return (q.means[component] + moved).view_as(normal)


def best_offset(logits_data: Tensor, logits_noise: Tensor) -> Tensor:
    """Returns the c of the least BCE of logits + c, a scalar: where as much is taken for data as there are data.

    Found by bisection. Of logits that separate the two without error c is the middle of the gap.

    Args:
        logits_data: Of the data, (N,).
        logits_noise: Of as much noise, (N,).

    Source: Gutmann & Hyvärinen 2010, Eq. 3.
    """
    both = torch.cat([logits_data, logits_noise]).detach().double()
    low, high = -both.max() - 40, -both.min() + 40
    # The mean probability of "data" rises with c; equally many of both make it one half.
    for _ in range(60):
        middle = (low + high) / 2
        too_low = (both + middle).sigmoid().mean() < 0.5
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return ((low + high) / 2).to(logits_data)
