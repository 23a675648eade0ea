"""The same network, weights and batches for the plain implementation and for the package's."""

import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dat_lightning.backbones import WideResNet
from dat_lightning.callbacks import ExponentialMovingAverage
from dat_lightning.core import AUCCurriculum, EnergyModel, ThreatModel
from dat_lightning.modules import DualAdversarialModule

from .plain_dat import PlainDAT, PlainStep

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def random_images(count: int, size: int, coarse: int, generator: torch.Generator) -> Tensor:
    """Returns smooth images (count, 3, size, size) in [0, 1]."""
    noise = torch.rand(count, 3, coarse, coarse, generator=generator)
    return F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False).contiguous()


def random_batch(batch_size: int, size: int, seed: int) -> dict[str, Tensor]:
    """Returns a batch of Stage 2; images of class k share their brightness, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Tensor] = {}
    for name in ("gen", "clf"):
        y = torch.randint(10, (batch_size,), generator=generator)
        shade = (y / 9).view(-1, 1, 1, 1)
        batch[f"x_{name}"] = 0.5 * shade + 0.5 * random_images(batch_size, size, 4, generator)
        batch[f"y_{name}"] = y
    return batch | {"x_ood": random_images(batch_size, size, 8, generator)}


def calibrated_backbone(
    depth: int, widen_factor: int, size: int, activation: Literal["relu", "silu"], seed: int = 0
) -> nn.Module:
    """Returns a WideResNet in which batch norm has the statistics of data, as it has after Stage 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = WideResNet(depth, widen_factor, activation=activation)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
    batch = random_batch(64, size, seed + 1000)
    with torch.no_grad():
        for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None  # cumulative: the first pass sets the statistics
        backbone((torch.cat([batch["x_gen"], batch["x_ood"]]) - mean) / std)
        for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 0.1
    return backbone


class _UnattachedModule(DualAdversarialModule):
    """Keeps what it logs, since there is no Trainer to give it to."""

    logged: dict[str, Tensor]

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = value


class PackageDAT:
    """The package's Stage 2 without a Trainer: training step, backward pass, optimiser step, moving average.

    Args:
        backbone: The network, with the weights of Stage 1; copied.
        contrastive_steps: T, which stays.
        attack_steps: K.
        dtype: Of weights and images.
        **module_arguments: Further arguments of the module.
    """

    def __init__(
        self,
        backbone: nn.Module,
        contrastive_steps: int,
        attack_steps: int,
        dtype: torch.dtype = torch.float32,
        **module_arguments: Any,
    ) -> None:
        self.module = _UnattachedModule(
            EnergyModel(copy.deepcopy(backbone), MEAN, STD).to(dtype),
            AUCCurriculum(max_steps=contrastive_steps, initial_steps=contrastive_steps),
            optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4),
            threat_model=ThreatModel("L2", eps=0.5, step_size=0.1, num_steps=attack_steps),
            **module_arguments,
        )
        self.module.logged = {}
        self.module.train()
        self.optimizer = cast(torch.optim.Optimizer, self.module.configure_optimizers())
        self.average = ExponentialMovingAverage()
        self._trainer = SimpleNamespace(global_step=0)
        self.average.setup(cast(Trainer, self._trainer), self.module, "fit")

    def compile(self) -> None:
        """Compiles the network as the module's ``setup`` does."""
        self.module.energy_model.compile(dynamic=False)

    def step(self, batch: dict[str, Tensor]) -> PlainStep:
        """Takes one optimiser step, in the order of Lightning's loop."""
        loss = self.module.training_step(batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._trainer.global_step += 1
        self.average.on_train_batch_end(cast(Trainer, self._trainer), self.module, None, batch, 0)
        logged = self.module.logged
        return PlainStep(logged["train/energy_loss"], logged["train/classification_loss"], logged["train/auc"])

    def averaged_energy_model(self) -> EnergyModel:
        """Returns the moving average of the network."""
        if self.average._average_model is None:
            raise RuntimeError("the average is made by setup")
        return cast(DualAdversarialModule, self.average._average_model.module).energy_model


@dataclass(frozen=True)
class Agreement:
    """Largest absolute differences between the plain implementation and the package after the same steps."""

    energy_loss: float
    classification_loss: float
    parameters: float
    average: float

    def largest(self) -> float:
        """Returns the largest of them."""
        return max(self.energy_loss, self.classification_loss, self.parameters, self.average)


def compare(plain: PlainDAT, package: PackageDAT, expected: PlainStep, found: PlainStep) -> Agreement:
    """Returns how the last steps, and the weights after them, differ."""
    return Agreement(
        energy_loss=(expected.energy_loss - found.energy_loss).abs().item(),
        classification_loss=(expected.classification_loss - found.classification_loss).abs().item(),
        parameters=largest_difference(plain.model, package.module.energy_model),
        average=largest_difference(plain.average, package.averaged_energy_model()),
    )


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Returns the largest absolute difference between the parameters of two networks with the same layers."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
