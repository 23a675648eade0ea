"""Where the figures of a test come from: checkpoint, weights, seeds, versions, device."""

import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from dat_lightning.results.digests import file_digest, network_digest

_PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "torch-fidelity",
    "timm",
    "pyautoattack",
    "numpy",
    "scipy",
    "scikit-learn",
)


def provenance(trainer: Trainer, pl_module: LightningModule, seconds: float) -> dict[str, Any]:
    """Returns what says where the figures of a test come from."""
    device = pl_module.device
    data = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "checkpoint": _checkpoint(trainer, pl_module),
        "weights_sha256": network_digest(getattr(pl_module, "energy_model", pl_module)),
        "seeds": _seeds(trainer, pl_module),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_processes": trainer.world_size,
        "precision": str(trainer.precision),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "versions": versions(),
        "module": _class_and_hyperparameters(pl_module),
        "data": None if data is None else _class_and_hyperparameters(data),
    }


def checkpoint_path(trainer: Trainer, pl_module: LightningModule) -> Path | None:
    """Returns the checkpoint that the weights come from; ``None`` if they were in memory, or are random."""
    # What was trained since is no longer what the module began with.
    began_with = getattr(pl_module, "init_from", None) if trainer.global_step == 0 else None
    path = trainer.ckpt_path or began_with
    return None if path is None else Path(path)


def run_folder(trainer: Trainer, pl_module: LightningModule) -> Path | None:
    """Returns the folder of the run that a checkpoint belongs to: the one that has it in ``checkpoints``."""
    path = checkpoint_path(trainer, pl_module)
    return path.absolute().parent.parent if path is not None and path.absolute().parent.name == "checkpoints" else None


def versions() -> dict[str, str]:
    """Returns the versions of the packages that figures depend on, as far as they are installed."""
    found = {package: _version(package) for package in _PACKAGES}
    return {package: known for package, known in found.items() if known is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _checkpoint(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
    """The file that the weights come from, and its hash; a folder has none."""
    path = checkpoint_path(trainer, pl_module)
    if path is None:
        return None
    return {"path": str(path), "sha256": file_digest(path) if path.is_file() else None}


def _seeds(trainer: Trainer, pl_module: LightningModule) -> dict[str, int]:
    """The seed of the process, of the module and of the data, as far as they have one."""
    everything = os.environ.get("PL_GLOBAL_SEED", "")
    seeds: Mapping[str, Any] = {
        "seed_everything": int(everything) if everything.isdecimal() else None,
        "module": getattr(pl_module, "seed", None),
        "data": getattr(trainer.datamodule, "seed", None),  # type: ignore[attr-defined]
    }
    return {name: seed for name, seed in seeds.items() if isinstance(seed, int)}


def _class_and_hyperparameters(part: Any) -> dict[str, Any]:
    """The class of a module or DataModule, and what it saved as hyperparameters."""
    name = f"{type(part).__module__}.{type(part).__qualname__}"
    return {"class": name, "hyperparameters": dict(getattr(part, "hparams", {}))}
