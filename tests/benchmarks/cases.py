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
from dat_lightning.core import AUCCurriculum, ThreatModel, batch_norm_layers
from dat_lightning.modules import DualAdversarialModule, RobustClassifierModule
from dat_lightning.training import ExponentialMovingAverage
from dat_lightning.weights import EnergyModel

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


def calibrated(backbone: nn.Module, size: int, seed: int = 0, count: int = 64) -> nn.Module:
    """Gives a network's batch norm layers the statistics of data, as they have after Stage 1, and returns it."""
    layers = batch_norm_layers(backbone)
    momenta = [layer.momentum for layer in layers]
    batch = random_batch(count, size, seed + 1000)
    for layer in layers:
        layer.momentum = None  # type: ignore[assignment]  # cumulative: the first pass sets the statistics
    if layers:
        with torch.no_grad():
            backbone.train()((torch.cat([batch["x_gen"], batch["x_ood"]]) - _channels(MEAN)) / _channels(STD))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return backbone


def calibrated_backbone(
    depth: int, widen_factor: int, size: int, activation: Literal["relu", "silu"], seed: int = 0
) -> nn.Module:
    """Returns a WideResNet in which batch norm has the statistics of data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = WideResNet(depth, widen_factor, activation=activation)
    return calibrated(backbone, size, seed)


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


class _Unattached:
    """Keeps what a module logs, since there is no Trainer to give it to."""

    logged: dict[str, Tensor]

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = value


class _UnattachedDAT(_Unattached, DualAdversarialModule):
    pass


class _UnattachedAT(_Unattached, RobustClassifierModule):
    pass


class PackageDAT:
    """The package's stages without a Trainer: training step, backward pass, optimiser step, moving average.

    Args:
        backbone: The network, with the weights to start from; copied.
        contrastive_steps: T, which stays.
        attack_steps: K.
        dtype: Of weights and images.
        stage: Which of the two stages.
        autocast: Precision of everything but the weights, ``None`` for theirs.
        **module_arguments: Further arguments of the module.
    """

    def __init__(
        self,
        backbone: nn.Module,
        contrastive_steps: int,
        attack_steps: int,
        dtype: torch.dtype = torch.float32,
        stage: Literal["stage1", "stage2"] = "stage2",
        autocast: torch.dtype | None = None,
        **module_arguments: Any,
    ) -> None:
        model = EnergyModel(copy.deepcopy(backbone), MEAN, STD).to(dtype)
        device = next(model.parameters()).device
        common: dict[str, Any] = {
            "optimizer": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4),
            "threat_model": ThreatModel("L2", eps=0.5, step_size=0.1, num_steps=attack_steps),
            **module_arguments,
        }
        self.module: _UnattachedDAT | _UnattachedAT
        if stage == "stage1":
            self.module = _UnattachedAT(model, **common)
        else:
            curriculum = AUCCurriculum(max_steps=contrastive_steps, initial_steps=contrastive_steps)
            self.module = _UnattachedDAT(model, curriculum, **common)
        self.module.to(device)
        self.module.logged = {}
        self.module.train()
        # There is no Trainer whose data could be compared with the network.
        self.module._training_checked = True
        self.autocast = autocast
        self.optimizer = cast(torch.optim.Optimizer, self.module.configure_optimizers())
        self.average = ExponentialMovingAverage()
        self._trainer = SimpleNamespace(global_step=0, callbacks=[])
        self.average.setup(cast(Trainer, self._trainer), self.module, "fit")

    def step(self, batch: dict[str, Tensor]) -> PlainStep:
        """Takes one optimiser step, in the order of Lightning's loop."""
        device = batch["x_clf"].device.type
        self.module.on_train_batch_start(batch, 0)
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            loss = self.module.training_step(batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._trainer.global_step += 1
        self.average.on_train_batch_end(cast(Trainer, self._trainer), self.module, None, batch, 0)
        logged, nothing = self.module.logged, torch.zeros_like(loss.detach())
        if isinstance(self.module, _UnattachedAT):
            return PlainStep(nothing, logged["train/loss"].detach(), nothing)
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
