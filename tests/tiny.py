"""Small real parts that tests put together: a network, both modules and the digits, in seconds on one core."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from dat_lightning import (
    AUCCurriculum,
    DigitsDataModule,
    DualAdversarialModule,
    EnergyModel,
    JEMModule,
    RobustClassifierModule,
    SmallResNet,
    ThreatModel,
)

ATTACK = ThreatModel(norm="L2", eps=1.0, step_size=0.5, num_steps=2)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def energy_model(seed: int = 0) -> EnergyModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EnergyModel(SmallResNet(widths=(4, 8)), mean=[0.3], std=[0.35])


def stage1(**kwargs: Any) -> RobustClassifierModule:
    kwargs = {"energy_model": energy_model(), "optimizer": SGD, "threat_model": ATTACK, **kwargs}
    return RobustClassifierModule(**kwargs)


def stage2(**kwargs: Any) -> DualAdversarialModule:
    curriculum = AUCCurriculum(max_steps=3, auc_threshold=0.3, window_samples=64)
    defaults = {"energy_model": energy_model(), "optimizer": SGD, "threat_model": ATTACK, "curriculum": curriculum}
    return DualAdversarialModule(**{**defaults, "contrastive_step_size": 0.4, **kwargs})


def jem(**kwargs: Any) -> JEMModule:
    small: dict[str, Any] = {"threat_model": ATTACK, "num_steps": 3, "buffer_size": 64}
    return JEMModule(
        **{"energy_model": energy_model(), "optimizer": partial(torch.optim.Adam, lr=1e-3), **small, **kwargs}
    )


def digits(**kwargs: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"batch_size": 32, "validation_size": 20, "num_ood": 200, "num_held_out": 50, **kwargs})


def trainer(path: Path, callbacks: Sequence[Callback] = (), **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "limit_train_batches": 6,
        "limit_val_batches": 0,
        "deterministic": True,
        "inference_mode": False,
    }
    return Trainer(**{**defaults, "default_root_dir": path, "callbacks": list(callbacks), **kwargs})
