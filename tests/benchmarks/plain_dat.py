"""Plain stages of DAT, written from the method's wording: the benchmark's baseline, and an independent oracle.

Nothing here is clever and nothing is slow on purpose. Each loss term has its own forward pass, parameters need
gradients throughout, the AUC has forward passes of its own, weights keep the layout that they come in, the average is a
loop over tensors. Of the package it shares only the network's layers.

Source: DAT (arXiv 2510.13872), Algorithm 1 and Eq. 8–10.
"""

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttackGradient = Literal["input", "all"]
"""What a backward pass of an attack computes: the image's gradient, or also those of all parameters."""


class PlainClassifier(nn.Module):
    """Normalises images in [0, 1] and classifies them.

    Args:
        backbone: Maps normalised images (N, C, H, W) to logits (N, K).
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.backbone((x - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class PlainStep:
    """What one step gives: its loss terms and its AUC, scalars without a graph."""

    energy_loss: Tensor
    classification_loss: Tensor
    auc: Tensor


def ascent_direction(model: nn.Module, x: Tensor, y: Tensor, climb: str, gradient: AttackGradient) -> Tensor:
    """Returns the gradient of "logit" or "cross_entropy" with respect to ``x``, each image scaled to length one."""
    x = x.clone().requires_grad_(True)
    logits = model(x)
    if climb == "logit":
        value = logits[torch.arange(len(y), device=y.device), y].sum()
    else:
        value = F.cross_entropy(logits, y, reduction="sum")
    if gradient == "all":
        value.backward()
        g = x.grad
        assert g is not None
        model.zero_grad()
    else:
        (g,) = torch.autograd.grad(value, x)
    length = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    direction: Tensor = g / (length + 1e-10)
    return direction


def generate(
    model: nn.Module, x: Tensor, y: Tensor, step_size: float, num_steps: int, gradient: AttackGradient = "input"
) -> Tensor:
    """Returns ``x`` after normalised ascent steps on f(x)[y], clipped to [0, 1] after each."""
    for _ in range(num_steps):
        x = torch.clamp(x + step_size * ascent_direction(model, x, y, "logit", gradient), 0, 1)
    return x


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    step_size: float,
    num_steps: int,
    gradient: AttackGradient = "input",
) -> Tensor:
    """Returns ``x`` after ascent steps on the cross-entropy, projected onto the L2 ball and [0, 1] after each."""
    x_adv = x
    for _ in range(num_steps):
        delta = x_adv + step_size * ascent_direction(model, x_adv, y, "cross_entropy", gradient) - x
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = torch.where(length > eps, delta * eps / (length + 1e-10), delta)
        x_adv = torch.clamp(x + delta, 0, 1)
    return x_adv


class PlainDAT:
    """Trains a classifier by the steps of DAT's Stage 2.

    Args:
        model: The classifier, with the weights of Stage 1.
        initial_steps: T at the start.
        max_steps: Largest T.
        attack_steps: K.
        gradient: What the backward passes of the two attacks compute.
        auc_threshold: Mean AUC at which T grows.
        window_samples: Number of images that the mean spans.
        contrastive_step_size: η.
        eps: Radius of the attack's ball.
        attack_step_size: Length of one step of the attack.
        lr: Learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        initial_steps: int = 0,
        max_steps: int = 50,
        attack_steps: int = 10,
        gradient: AttackGradient = "input",
        auc_threshold: float = 0.8,
        window_samples: int = 1000,
        contrastive_step_size: float = 0.1,
        eps: float = 0.5,
        attack_step_size: float = 0.1,
        lr: float = 1e-3,
    ) -> None:
        self.model = model
        self.contrastive_steps = initial_steps
        self.max_steps = max_steps
        self.attack_steps = attack_steps
        self.gradient: AttackGradient = gradient
        self.auc_threshold = auc_threshold
        self.window_samples = window_samples
        self.contrastive_step_size = contrastive_step_size
        self.eps = eps
        self.attack_step_size = attack_step_size
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.average = copy.deepcopy(model)
        self.num_updates = 0
        self.recent: deque[float] = deque()

    def step(self, batch: dict[str, Tensor]) -> PlainStep:
        """Takes one optimiser step on ``x_gen, y_gen, x_clf, y_clf, x_ood``."""
        x_gen, y_gen, x_clf, y_clf = batch["x_gen"], batch["y_gen"], batch["x_clf"], batch["y_clf"]
        self.model.eval()
        x_contrast = generate(
            self.model, batch["x_ood"], y_gen, self.contrastive_step_size, self.contrastive_steps, self.gradient
        )
        x_adv = attack(self.model, x_clf, y_clf, self.eps, self.attack_step_size, self.attack_steps, self.gradient)
        auc = self.separation(x_gen, x_contrast, y_gen)

        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        score_real = torch.logsumexp(self.model(x_gen), 1)
        score_contrast = torch.logsumexp(self.model(x_contrast), 1)
        energy_loss = F.binary_cross_entropy_with_logits(
            torch.cat([score_real, score_contrast]),
            torch.cat([torch.ones_like(score_real), torch.zeros_like(score_contrast)]),
        )
        classification_loss = F.cross_entropy(self.model(x_adv), y_clf)
        self.optimizer.zero_grad()
        (energy_loss + classification_loss).backward()
        self.optimizer.step()
        self.update_average()
        self.update_curriculum(auc, len(x_gen))
        return PlainStep(energy_loss.detach(), classification_loss.detach(), auc)

    def stage1_step(self, batch: dict[str, Tensor]) -> PlainStep:
        """Takes one optimiser step of adversarial training on ``x_clf, y_clf``; the attack sees eval mode."""
        x, y = batch["x_clf"], batch["y_clf"]
        self.model.eval()
        x_adv = attack(self.model, x, y, self.eps, self.attack_step_size, self.attack_steps, self.gradient)
        self.model.train()
        loss = F.cross_entropy(self.model(x_adv), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.update_average()
        return PlainStep(torch.zeros_like(loss), loss.detach(), torch.zeros_like(loss))

    @torch.no_grad()
    def separation(self, x_gen: Tensor, x_contrast: Tensor, y_gen: Tensor) -> Tensor:
        """Returns the share of pairs in which the real image has the larger f(x)[y]; ties count one half."""
        rows = torch.arange(len(y_gen), device=y_gen.device)
        real = self.model(x_gen)[rows, y_gen].unsqueeze(1)
        contrast = self.model(x_contrast)[rows, y_gen].unsqueeze(0)
        share: Tensor = (real > contrast).double().mean() + 0.5 * (real == contrast).double().mean()
        return share

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the average towards the weights; the first update copies them."""
        n = self.num_updates
        decay = min(0.999, (1 + n) / (10 + n)) if n > 0 else 0.0
        for average, current in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.mul_(decay).add_(current, alpha=1 - decay)
            else:
                average.copy_(current)
        self.num_updates = n + 1

    def update_curriculum(self, auc: Tensor, batch_size: int) -> None:
        """Makes T one larger when the mean of a full window reaches the threshold, and empties the window."""
        self.recent.append(float(auc))
        length = math.ceil(self.window_samples / batch_size)
        if len(self.recent) > length:
            self.recent.popleft()
        full = len(self.recent) == length
        if full and sum(self.recent) / length >= self.auc_threshold and self.contrastive_steps < self.max_steps:
            self.contrastive_steps += 1
            self.recent.clear()
