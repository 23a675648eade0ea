"""The averaged weights: their decay, and who sees them when."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from dat_lightning import ExponentialMovingAverage, RobustClassifierModule
from tests import tiny

WEIGHT = "energy_model.backbone.fc.weight"
STATISTIC = "energy_model.backbone.norm.running_mean"


class Recorder(Callback):
    """Keeps the module's state after every step, and what validation sees."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.seen: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights.append({name: value.clone().double() for name, value in pl_module.state_dict().items()})

    def _see(self, hook: str, pl_module: LightningModule) -> None:
        self.seen[hook] = pl_module.state_dict()[WEIGHT].clone()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._see("epoch_start", pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._see("batch_end", pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._see("epoch_end", pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._see("train", pl_module)


def average(history: list[torch.Tensor], largest: float) -> torch.Tensor:
    """The definition, in float64: the first update copies, update n decays by min(largest, (1+n)/(10+n))."""
    mean = history[0]
    for n, value in enumerate(history[1:], 1):
        decay = min(largest, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * value
    return mean


@pytest.mark.parametrize("largest", [0.999, 0.25])
def test_the_average_is_the_recursion(largest: float, tmp_path: Path) -> None:
    recorder, module = Recorder(), tiny.stage1()
    trainer = tiny.trainer(tmp_path, [recorder, ExponentialMovingAverage(decay=largest)])
    trainer.fit(module, datamodule=tiny.digits(streams=["clf"]))
    assert len(recorder.weights) == 6
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            assert torch.equal(value.double(), recorder.weights[-1][name])
            continue
        expected = average([w[name] for w in recorder.weights], largest)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(module.state_dict()[WEIGHT].double(), recorder.weights[-1][WEIGHT])


def test_decay_without_warm_up() -> None:
    ema = ExponentialMovingAverage(decay=0.9, warm_up=False)
    assert [ema.decay_of_update(n) for n in (1, 100)] == [0.9, 0.9]
    warm = ExponentialMovingAverage(decay=0.9)
    assert [warm.decay_of_update(n) for n in (1, 8, 1000)] == [2 / 11, 0.5, 0.9]


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_decay_outside_the_unit_interval(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\]"):
        ExponentialMovingAverage(decay=decay)


@pytest.mark.parametrize("first", [True, False])
def test_all_of_validation_sees_the_average_in_any_order(first: bool, tmp_path: Path) -> None:
    recorder, ema = Recorder(), ExponentialMovingAverage()
    callbacks = [ema, recorder] if first else [recorder, ema]
    trainer = tiny.trainer(tmp_path, callbacks, limit_val_batches=1)
    trainer.fit(tiny.stage1(), datamodule=tiny.digits(streams=["clf"]))
    expected = average([w[WEIGHT] for w in recorder.weights], 0.999).float()
    for hook in ("epoch_start", "batch_end", "epoch_end"):
        torch.testing.assert_close(recorder.seen[hook], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(recorder.seen["train"].double(), recorder.weights[-1][WEIGHT])


def test_before_the_first_update_nothing_is_swapped(tmp_path: Path) -> None:
    """Initial weights loaded in setup() come after the average was made; the sanity check must see them."""
    torch.save(tiny.energy_model(seed=5).state_dict(), tmp_path / "weights.pt")
    recorder = Recorder()
    trainer = tiny.trainer(
        tmp_path, [ExponentialMovingAverage(), recorder], num_sanity_val_steps=1, limit_val_batches=1, max_steps=0
    )
    trainer.fit(tiny.stage1(init_from=str(tmp_path / "weights.pt")), datamodule=tiny.digits(streams=["clf"]))
    assert torch.equal(recorder.seen["batch_end"], tiny.energy_model(seed=5).state_dict()["backbone.fc.weight"])


class Failure(Callback):
    """Fails in the middle of validation."""

    def on_validation_batch_end(self, *args: Any) -> None:
        raise RuntimeError("a bad image")


def test_an_exception_in_validation_restores_the_weights(tmp_path: Path) -> None:
    recorder, module = Recorder(), tiny.stage1()
    saver = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, filename="failed", monitor=None)
    callbacks = [ExponentialMovingAverage(), recorder, Failure(), saver]
    trainer = tiny.trainer(tmp_path, callbacks, limit_val_batches=1, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="a bad image"):
        trainer.fit(module, datamodule=tiny.digits(streams=["clf"]))
    torch.testing.assert_close(module.state_dict()[WEIGHT].double(), recorder.weights[-1][WEIGHT])
    (path,) = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    torch.testing.assert_close(saved["current_model_state"][WEIGHT].double(), recorder.weights[-1][WEIGHT])
    expected = average([w[WEIGHT] for w in recorder.weights], 0.999).float()
    torch.testing.assert_close(saved["state_dict"][WEIGHT], expected, rtol=1e-5, atol=1e-6)


class SaveInValidation(Callback):
    """Saves a checkpoint while the average is in the module."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_saved_in_validation_is_right(tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "middle.ckpt"
    callbacks = [ExponentialMovingAverage(), recorder, SaveInValidation(path)]
    trainer = tiny.trainer(tmp_path, callbacks, limit_val_batches=1)
    trainer.fit(tiny.stage1(), datamodule=tiny.digits(streams=["clf"]))
    saved = torch.load(path, weights_only=True)
    torch.testing.assert_close(saved["current_model_state"][WEIGHT].double(), recorder.weights[-1][WEIGHT])
    expected = average([w[WEIGHT] for w in recorder.weights], 0.999).float()
    torch.testing.assert_close(saved["state_dict"][WEIGHT], expected, rtol=1e-5, atol=1e-6)


def test_a_trainer_that_has_fitted_tests_the_average_in_the_checkpoint(tmp_path: Path) -> None:
    module = tiny.stage1()
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = tiny.trainer(tmp_path, [ExponentialMovingAverage(), saver], enable_checkpointing=True)
    trainer.fit(module, datamodule=tiny.digits(streams=["clf"]))
    averaged = {name: value.clone() for name, value in module.state_dict().items()}
    torch.nn.init.zeros_(module.energy_model.backbone.get_parameter("fc.weight"))
    trainer.test(module, datamodule=tiny.digits(), ckpt_path=saver.last_model_path, verbose=False)
    assert torch.equal(module.state_dict()[WEIGHT], averaged[WEIGHT])


def test_the_last_checkpoint_has_both(tmp_path: Path) -> None:
    recorder, module = Recorder(), tiny.stage1()
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = tiny.trainer(tmp_path, [ExponentialMovingAverage(), recorder, saver], enable_checkpointing=True)
    trainer.fit(module, datamodule=tiny.digits(streams=["clf"]))
    saved = torch.load(saver.last_model_path, weights_only=True)
    torch.testing.assert_close(saved["current_model_state"][WEIGHT].double(), recorder.weights[-1][WEIGHT])
    assert torch.equal(saved["state_dict"][WEIGHT], module.state_dict()[WEIGHT])
    assert int(saved["averaging_state"]["n_averaged"]) == 6


def test_curriculum_state_is_copied_not_averaged(tmp_path: Path) -> None:
    recorder, module = Recorder(), tiny.stage2()
    trainer = tiny.trainer(tmp_path, [recorder, ExponentialMovingAverage()])
    trainer.fit(module, datamodule=tiny.digits())
    for name in ("num_steps", "values", "count"):
        assert torch.equal(
            module.state_dict()[f"curriculum.{name}"].double(), recorder.weights[-1][f"curriculum.{name}"]
        )


def test_a_callback_that_serves_two_runs_averages_in_both(tmp_path: Path) -> None:
    """A notebook that gives Stage 1's callbacks to Stage 2."""
    ema, recorder = ExponentialMovingAverage(), Recorder()
    tiny.trainer(tmp_path, [ema]).fit(tiny.stage1(), datamodule=tiny.digits())
    module = tiny.stage1(energy_model=tiny.energy_model(seed=4))
    tiny.trainer(tmp_path, [recorder, ema]).fit(module, datamodule=tiny.digits())
    expected = average([w[WEIGHT] for w in recorder.weights], 0.999)
    torch.testing.assert_close(module.state_dict()[WEIGHT].double(), expected, rtol=1e-5, atol=1e-6)


class FailsInTraining(Callback):
    """Fails at the third batch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise RuntimeError("interrupted")


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = tiny.trainer(
        tmp_path, [ExponentialMovingAverage(), recorder, FailsInTraining()], limit_val_batches=1, inference_mode=False
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    other = tiny.stage1(energy_model=tiny.energy_model(seed=6))
    trainer.validate(other, datamodule=tiny.digits(), verbose=False)
    assert torch.equal(recorder.seen["batch_end"], tiny.energy_model(seed=6).state_dict()["backbone.fc.weight"])


class Labelled(RobustClassifierModule):
    """Has a say of its own in what is saved."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["label"] = float(checkpoint["state_dict"][WEIGHT].sum())


def test_a_file_of_weights_alone_has_the_average(tmp_path: Path) -> None:
    """Saved in validation, after it and after training; full checkpoints of the same moments have both."""
    recorder, module = Recorder(), Labelled(tiny.energy_model(), optimizer=tiny.SGD, threat_model=tiny.ATTACK)

    class Saves(Checkpoint):
        def save(self, trainer: Trainer, name: str) -> None:
            trainer.save_checkpoint(tmp_path / f"{name}.weights", weights_only=True)
            trainer.save_checkpoint(tmp_path / f"{name}.full", weights_only=False)

        def on_train_start(self, trainer: Trainer, *args: Any) -> None:
            # As weights that are loaded after the average was made.
            module.energy_model.backbone.get_parameter("fc.weight").data.add_(1)
            self.save(trainer, "start")

        def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.save(trainer, "in")

        def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
            self.save(trainer, "after")

        def on_train_end(self, trainer: Trainer, *args: Any) -> None:
            self.save(trainer, "end")

        def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["another callback's"] = torch.ones(1)

    best = ModelCheckpoint(tmp_path, "best", monitor="val/loss", save_weights_only=True)
    callbacks = [ExponentialMovingAverage(), recorder, Saves(), best]
    trainer = tiny.trainer(tmp_path, callbacks, limit_val_batches=1, enable_checkpointing=True)
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.fit(module, datamodule=tiny.digits(streams=["clf"]))
    expected = {name: average([w[name] for w in recorder.weights], 0.999) for name in (WEIGHT, STATISTIC)}
    files = [Path(best.best_model_path), *(tmp_path / f"{name}.weights" for name in ("in", "after", "end"))]
    for path in files:
        saved = torch.load(path, weights_only=True)
        assert saved["state_dict"].keys() == initial.keys()
        for name, value in expected.items():
            torch.testing.assert_close(saved["state_dict"][name].double(), value, rtol=1e-5, atol=1e-6)
        assert saved["label"] == float(saved["state_dict"][WEIGHT].sum())
        assert "current_model_state" not in saved
    started = torch.load(tmp_path / "start.weights", weights_only=True)["state_dict"]
    assert torch.equal(started[WEIGHT], initial[WEIGHT] + 1)
    full = torch.load(tmp_path / "after.full", weights_only=True)
    torch.testing.assert_close(full["state_dict"][WEIGHT].double(), expected[WEIGHT], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full["current_model_state"][WEIGHT].double(), recorder.weights[-1][WEIGHT])
    assert full["state_dict"].keys() == {*initial, "another callback's"}


def test_after_an_interrupted_run_another_trainer_saves_its_own_weights(tmp_path: Path) -> None:
    module, ema = tiny.stage1(), ExponentialMovingAverage()
    with pytest.raises(RuntimeError, match="interrupted"):
        tiny.trainer(tmp_path, [ema, FailsInTraining()]).fit(module, datamodule=tiny.digits())
    saver = ModelCheckpoint(tmp_path, "other", save_weights_only=True)
    trainer = tiny.trainer(tmp_path, [saver], enable_checkpointing=True)
    trainer.fit(module, datamodule=tiny.digits())
    saved = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(saved[WEIGHT], module.state_dict()[WEIGHT])
