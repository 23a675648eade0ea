"""Attacks and losses written once more, one image at a time, to compare modules with; nothing of the package's core."""

import math

import torch
from torch import Tensor, nn

from dat_lightning import ThreatModel


def walk(net: nn.Module, x: Tensor, threat: ThreatModel, height: str, y: Tensor | None = None) -> Tensor:
    """L2 steps along the normalised gradient of a height of the logits, back into the ball and the box."""
    rows = []
    for k, image in enumerate(x.split(1)):
        state = image.clone()
        for _ in range(threat.num_steps):
            state = state.detach().requires_grad_()
            logits = net(state)[0]
            log_p = logits - logits.exp().sum().log()
            label = 0 if y is None else int(y[k])
            value = {
                "cross-entropy": -log_p[label],
                "uniform": (-log_p - math.log(len(log_p))).sum() / len(log_p),
                "energy": logits.exp().sum().log(),
                "logit": logits[label],
            }[height]
            (gradient,) = torch.autograd.grad(value, state)
            delta = state.detach() + threat.step_size * gradient / (gradient.norm() + 1e-10) - image
            state = (image + delta * min(1.0, threat.eps / max(float(delta.norm()), 1e-10))).clamp(0, 1)
        rows.append(state.detach())
    return torch.cat(rows)


def divergence_of_uniform(logits: Tensor) -> Tensor:
    """Σ_k 1/K (log 1/K − log p_k) of each row."""
    p, share = logits.softmax(1), 1 / logits.shape[1]
    return (share * (math.log(share) - p.log())).sum(1)


def negative_log_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """The mean of −log p(y)."""
    return -logits.softmax(1)[torch.arange(len(y)), y].log().mean()


def batch(n: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random images and labels of all streams."""
    generator = torch.Generator().manual_seed(0)
    images = {
        name: torch.rand(n, 1, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        for name in ("x_gen", "x_clf", "x_ood")
    }
    labels = {name: torch.randint(10, (n,), generator=generator) for name in ("y_gen", "y_clf")}
    return {**images, **labels, "draw": torch.arange(n) + 40}
