"""A checkpoint of a short run with averaging, and its averaged network put together by hand."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dat_lightning import EnergyModel, ExponentialMovingAverage
from dat_lightning.cli import main
from dat_lightning.core import energy
from tests import tiny
from tests.test_cli import STAGE2, TINY

_PREFIX = "energy_model."


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run through the command line, whose hyperparameters say which network it is."""
    folder = tmp_path_factory.mktemp("explored")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Whether it warns depends on the arguments that pytest itself was given.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            main(["fit", "--config", STAGE2, "--config", TINY])
    (path,) = folder.rglob("last.ckpt")
    return path


@pytest.fixture(scope="package")
def bare_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run in Python, which does not say which network it is."""
    folder = tmp_path_factory.mktemp("bare")
    callbacks = [ExponentialMovingAverage(), ModelCheckpoint(folder, save_last=True, save_top_k=0)]
    trainer = tiny.trainer(folder, callbacks, limit_train_batches=2, enable_checkpointing=True)
    trainer.fit(tiny.stage2(), tiny.digits())
    return folder / "last.ckpt"


def network(checkpoint: Path, entry: str = "state_dict") -> EnergyModel:
    """The network with one of the two sets of weights, loaded without the package's readers."""
    saved = torch.load(checkpoint, weights_only=True)
    model = tiny.energy_model(7).eval()
    model.load_state_dict({k.removeprefix(_PREFIX): v for k, v in saved[entry].items() if k.startswith(_PREFIX)})
    return model


def climb(
    model: energy.EnergyModel, start: torch.Tensor, target: int, steps: int, step_size: float, eps: float = float("inf")
) -> list[torch.Tensor]:
    """The states of the ascent on f(x)[target] of one image (C, H, W), written as the formula has it."""
    states = [start]
    for _ in range(steps):
        x = states[-1].clone().requires_grad_(True)
        (g,) = torch.autograd.grad(model(x.unsqueeze(0))[0, target], x)
        moved = x.detach() + step_size * g / (g.square().sum().sqrt() + 1e-10)
        delta = moved - start
        length = delta.square().sum().sqrt()
        if length > eps:
            delta = delta * eps / length
        states.append((start + delta).clamp(0, 1))
    return states
