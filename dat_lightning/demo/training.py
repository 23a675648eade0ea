"""Trains the two stages through the command line, and reads what training leaves: checkpoints and curves."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dat_lightning import cli
from dat_lightning.core.errors import InputError
from dat_lightning.modules import DualAdversarialModule, EnergyModule, RobustClassifierModule
from dat_lightning.sampling import PGDSampler

Stage = Literal["stage1", "stage2"]
STAGES: tuple[Stage, ...] = ("stage1", "stage2")

# Where the shipped configurations write.
_PREFIX = "runs/digits"
# About our calling the command line from a program, a repeated run, and names that Lightning's dependencies changed.
_EXPECTED_WARNINGS = (
    "LightningCLI's args parameter",
    "Checkpoint directory .* exists and is not empty",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"\s*By default only one JsonargparseDeprecationWarning",
)
_QUICK_EPOCHS = 2
_QUICK_STEPS = (5, 10, 20)
_QUICK_SAMPLES = 100


@dataclass(frozen=True)
class Curve:
    """One logged scalar.

    Attributes:
        steps: Training steps.
        values: What was logged there.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class History:
    """What one training run logged.

    Attributes:
        curves: Name of a scalar → its curve.
        seconds: Time between the first and the last entry of the log.
    """

    curves: Mapping[str, Curve]
    seconds: float


def checkpoint_path(out: Path, stage: Stage) -> Path:
    """Returns where a stage's last checkpoint lies."""
    return out / stage / "checkpoints" / "last.ckpt"


def read_config(configs: Path, stage: Stage, out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Returns a stage's configuration with all its outputs below ``out``.

    Args:
        configs: Folder with ``stage1.yaml`` and ``stage2.yaml``.
        stage: Which of the two.
        out: Takes the place of the shipped ``runs/digits``.
        quick: Whether to cut training and samples down to what a test needs.

    Raises:
        FileNotFoundError: If there is no such configuration.
        InputError: If it is no YAML mapping.
    """
    path = configs / f"{stage}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"no configuration at {path}: run from the repository's root, or name the folder that has it as --configs"
        )
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} is no mapping of settings")
    config: dict[str, Any] = _relocated(loaded, out.as_posix())
    for callback in callbacks(config, "ModelCheckpoint"):
        # A second run into the same folder would write last-v1.ckpt and leave the old last.ckpt in place.
        callback["enable_version_counter"] = False
    if quick:
        _shorten(config)
    return config


def callbacks(config: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the ``init_args`` of the callbacks of class ``name``, as they stand in the configuration."""
    entries = config.get("trainer", {}).get("callbacks") or []
    return [entry.setdefault("init_args", {}) for entry in entries if entry["class_path"].rpartition(".")[2] == name]


def sampler(config: Mapping[str, Any]) -> PGDSampler:
    """Returns the sampler that a configuration describes.

    Raises:
        InputError: If it describes none.
    """
    found = callbacks(config, "PGDSampler")
    if not found:
        raise InputError("the configuration has no PGDSampler among trainer.callbacks, so there is nothing to generate")
    return PGDSampler(**found[0])


def write_config(config: Mapping[str, Any], out: Path, stage: Stage) -> Path:
    """Writes a stage's configuration below ``out``, and returns where."""
    path = out / stage / "config-input.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    return path


def train(config: Path, out: Path, stage: Stage) -> None:
    """Trains a stage as ``dat-lightning fit`` does; Stage 2 starts from Stage 1's checkpoint.

    Raises:
        SystemExit: If the command line refuses the configuration; it has said why.
    """
    arguments = ["fit", "--config", str(config)]
    if stage == "stage2":
        arguments += ["--model.init_from", str(checkpoint_path(out, "stage1"))]
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        cli.main(arguments)


def load(out: Path, stage: Stage) -> EnergyModule:
    """Returns a trained stage with its averaged weights, in eval mode on the CPU.

    Raises:
        FileNotFoundError: If it has not been trained.
    """
    path = checkpoint_path(out, stage)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train first, without --skip-training")
    module_class = RobustClassifierModule if stage == "stage1" else DualAdversarialModule
    # The state dict of a checkpoint is the average; the weights that training goes on from have an entry of their own.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _EXPECTED_WARNINGS[-1])
        module: EnergyModule = module_class.load_from_checkpoint(path, map_location=torch.device("cpu"))
    return module.eval().requires_grad_(False)


def read_history(out: Path, stage: Stage) -> History:
    """Returns what the latest training run of a stage logged for TensorBoard; empty if there is nothing."""
    folders = sorted((out / stage / "logs").glob("version_*"), key=lambda f: int(f.name.rpartition("_")[2]))
    for folder in reversed(folders):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        names = events.Tags()["scalars"]
        # Evaluations log into folders of their own.
        if not any(name.startswith("train/") for name in names):
            continue
        scalars = {name: events.Scalars(name) for name in names}
        curves = {n: Curve(tuple(e.step for e in s), tuple(e.value for e in s)) for n, s in scalars.items()}
        times = [e.wall_time for s in scalars.values() for e in s]
        return History(curves, max(times) - min(times))
    return History({}, 0.0)


def _relocated(value: Any, out: str) -> Any:
    """The same structure with the shipped folder replaced in every path."""
    if isinstance(value, dict):
        return {key: _relocated(entry, out) for key, entry in value.items()}
    if isinstance(value, list):
        return [_relocated(entry, out) for entry in value]
    if isinstance(value, str) and (value == _PREFIX or value.startswith(f"{_PREFIX}/")):
        return out + value[len(_PREFIX) :]
    return value


def _shorten(config: dict[str, Any]) -> None:
    """Cuts epochs, the schedule that has to fit them, and samples."""
    trainer = config["trainer"]
    schedule = (config["model"]["init_args"].get("lr_scheduler") or {}).get("init_args", {})
    if "total_steps" in schedule:
        schedule["total_steps"] = max(1, schedule["total_steps"] * _QUICK_EPOCHS // trainer["max_epochs"])
    trainer["max_epochs"] = _QUICK_EPOCHS
    trainer["check_val_every_n_epoch"] = 1
    for callback in callbacks(config, "ModelCheckpoint"):
        callback["every_n_epochs"] = 1
    for callback in callbacks(config, "PGDSampler"):
        callback["num_samples"] = _QUICK_SAMPLES
        callback["num_steps"] = list(_QUICK_STEPS)
    for callback in callbacks(config, "SampleWriter"):
        callback["num_steps"] = _QUICK_STEPS[-1]
