"""Points of a plane, a small network for them, and what the tests of two evaluators read of data."""

from typing import Any

import torch
from torch import Tensor

from dat_lightning import ATEBMModule, EnergyModel, Perceptron, PlaneDataModule
from tests import tiny


def points(density: Any = "pinwheel") -> PlaneDataModule:
    return PlaneDataModule(density, num_train=64, num_test=400, num_ood=50, num_held_out=50)


def plane_module(num_classes: int = 5) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = EnergyModel(Perceptron(num_classes, widths=(16,)), mean=[0.5, 0.5], std=[0.1, 0.1])
    return tiny.stage1(energy_model=network) if num_classes > 1 else ATEBMModule(network)


def examples_of(data: Any) -> tuple[Tensor, Tensor]:
    """The test images and their labels."""
    entries = data.in_distribution("test")
    x, y = zip(*(entries[k] for k in range(len(entries))), strict=True)
    return torch.stack(x), torch.stack(y)
