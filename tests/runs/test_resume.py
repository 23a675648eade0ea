"""Training that stopped and resumed is, bit for bit, training that never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dat_lightning import EnergyModule, ExponentialMovingAverage
from dat_lightning.runs import SignalCheckpoint
from tests import tiny


def fit(module: EnergyModule, path: Path, ckpt: str | None = None, workers: int = 0, **kwargs: Any) -> dict[str, Any]:
    """Fits and returns the last checkpoint."""
    saver = ModelCheckpoint(dirpath=path, every_n_train_steps=1, save_top_k=-1, save_last=True, filename="{step}")
    trainer = tiny.trainer(path, [ExponentialMovingAverage(), saver], enable_checkpointing=True, **kwargs)
    trainer.fit(module, datamodule=tiny.digits(num_workers=workers), ckpt_path=ckpt, weights_only=True)
    contents: dict[str, Any] = torch.load(saver.last_model_path, weights_only=True)
    return contents


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{k}")
    else:
        assert a == b, where


# 6 batches an epoch: step 4 is in the middle of the first, step 6 at its end, step 9 in the second.
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [4, 6, 9])
@pytest.mark.parametrize("stage", [tiny.stage1, tiny.stage2])
def test_resume_is_bitwise(stage: Any, stop: int, workers: int, tmp_path: Path) -> None:
    whole = fit(stage(), tmp_path / "whole", max_epochs=2)
    fit(stage(), tmp_path / "first", max_epochs=2, max_steps=stop, workers=workers)
    torch.manual_seed(99)  # what global randomness did in between must not matter
    resumed = fit(
        stage(energy_model=tiny.energy_model(seed=1)),
        tmp_path / "first",
        ckpt=str(tmp_path / "first" / f"step={stop}.ckpt"),
        max_epochs=2,
        workers=workers,
    )
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "global_step"):
        assert_same(whole[part], resumed[part], part)
    assert whole["DigitsDataModule"]["draws_consumed"] == resumed["DigitsDataModule"]["draws_consumed"] == 12 * 32
    if stage is tiny.stage2:
        assert int(resumed["state_dict"]["curriculum.num_steps"]) == 3  # T moved, so its resumption was tested


def test_other_data_order_is_noticed(tmp_path: Path) -> None:
    """The comparison above can fail: another seed of the data gives other weights."""
    a = fit(tiny.stage1(), tmp_path / "a")
    trainer = tiny.trainer(tmp_path)
    module = tiny.stage1()
    trainer.fit(module, datamodule=tiny.digits(seed=1))
    weight = module.energy_model.backbone.get_parameter("fc.weight")
    assert not torch.equal(a["current_model_state"]["energy_model.backbone.fc.weight"], weight)


def test_another_seed_cannot_continue(tmp_path: Path) -> None:
    fit(tiny.stage1(), tmp_path / "a", max_steps=2)
    with pytest.raises(ValueError, match=r"data\.seed is 7, but the checkpoint was trained with 0"):
        tiny.trainer(tmp_path).fit(
            tiny.stage1(), datamodule=tiny.digits(seed=7), ckpt_path=str(tmp_path / "a/last.ckpt")
        )


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
def test_another_seed_can_evaluate(tmp_path: Path) -> None:
    fit(tiny.stage1(), tmp_path / "a", max_steps=2)
    found = [
        tiny.trainer(tmp_path).test(
            tiny.stage1(), datamodule=tiny.digits(seed=seed), ckpt_path=str(tmp_path / "a/last.ckpt"), verbose=False
        )
        for seed in (0, 7)
    ]
    assert found[0] == found[1]  # the test images are those of every seed


class Validations(Callback):
    """Notes the step of each validation and what it found."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.global_step not in self.found
        self.found[trainer.global_step] = float(trainer.callback_metrics["val/accuracy"])


# Lightning alone takes a validation for done whose step has a checkpoint.
@pytest.mark.parametrize("every", [{}, {"val_check_interval": 3}, {"check_val_every_n_epoch": 2}])
@pytest.mark.parametrize("stop", [3, 4, 6, 12])
def test_a_validation_that_a_kill_left_out_is_made(every: dict[str, int], stop: int, tmp_path: Path) -> None:
    def validations(ckpt: Path | None) -> dict[int, float]:
        notes = Validations()
        saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callbacks = [notes, SignalCheckpoint(), saver]
        trainer = tiny.trainer(
            tmp_path,
            callbacks,
            enable_checkpointing=True,
            limit_val_batches=2,
            max_epochs=3,
            log_every_n_steps=1,
            **every,
        )
        trainer.fit(tiny.stage1(), datamodule=tiny.digits(), ckpt_path=ckpt, weights_only=True)
        assert trainer.global_step == 18
        return notes.found

    whole = validations(None)
    # Saved at the end of the step, so before its validation, as by a run that is killed there.
    resumed = validations(tmp_path / f"step={stop}.ckpt")
    assert resumed == {step: value for step, value in whole.items() if step >= stop}
