"""What the handler of signals does in this process: one save at a time, Slurm without requeue, other threads."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils._python_dispatch import TorchDispatchMode

from dat_lightning.runs import AtomicCheckpointIO, read_run_checkpoint
from dat_lightning.runs.resume import protect
from dat_lightning.runs.signal_checkpoint import SignalCheckpoint, StoppedBySignal
from tests import tiny


class SendSignal(Callback):
    """Sends this process a signal after a batch of training or validation."""

    def __init__(self, signum: int, where: str) -> None:
        self.signum, self.where = signum, where

    def on_train_batch_end(self, *_: Any) -> None:
        if self.where == "training":
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.where == "validation":
            os.kill(os.getpid(), self.signum)


def stop(folder: Path, signum: int, where: str, **kwargs: Any) -> StoppedBySignal:
    """Trains until a signal ends it, and returns the end."""
    saver = ModelCheckpoint(dirpath=folder / "saved")
    callbacks = [SendSignal(signum, where), saver]
    trainer = tiny.trainer(folder, callbacks, enable_checkpointing=True, limit_val_batches=2, **kwargs)
    protect(trainer)
    with pytest.raises(StoppedBySignal) as end:
        trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    return end.value


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["validation", "training"])
def test_a_second_signal_during_the_save_starts_no_other(
    where: str, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []
    depth: list[int] = []
    save = AtomicCheckpointIO.save_checkpoint

    def interrupted(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
        depth.append(len(depth))
        os.kill(os.getpid(), second)
        save(self, *args, **kwargs)
        saves.append(depth.pop())

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", interrupted)
    end = stop(tmp_path, signal.SIGTERM, where)
    assert saves == [0]
    assert end.code == 128 + signal.SIGTERM
    assert end.path == str(tmp_path / "saved" / "interrupted.ckpt")
    read_run_checkpoint(Path(end.path))


def slurm_alone() -> dict[str, Any]:
    return {"plugins": [SLURMEnvironment(auto_requeue=False)]}


def slurm_with_another_signal() -> dict[str, Any]:
    return {"plugins": [SLURMEnvironment(auto_requeue=False, requeue_signal=signal.SIGUSR2)]}


def torchrun() -> dict[str, Any]:
    """Another launcher inside a job of Slurm."""
    return {"plugins": [LightningEnvironment()]}


@pytest.mark.parametrize("where", ["validation", "training"])
@pytest.mark.parametrize(
    ("how", "signum"),
    [(slurm_alone, signal.SIGUSR1), (slurm_with_another_signal, signal.SIGUSR2), (torchrun, signal.SIGUSR1)],
)
def test_slurms_signal_stops_a_run_that_is_not_put_back_into_the_queue(
    how: Callable[[], dict[str, Any]],
    signum: signal.Signals,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = {"JOB_ID": "7", "NTASKS": "1", "JOB_NAME": "x", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**job, "NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = signal.signal(signum, signal.SIG_IGN)  # so that a process that does not listen lives to fail the test
    try:
        end = stop(tmp_path, signum, where, **how())
    finally:
        signal.signal(signum, before)
    path = tmp_path / "saved" / "interrupted.ckpt"
    assert end.code == 128 + signum
    assert str(end).startswith(f"stopped by {signum.name} after step ")
    assert str(end).endswith(f"not done; to go on: --ckpt_path {path}")
    assert torch.load(path, weights_only=True)["global_step"] > 0


def test_training_in_another_thread_says_that_it_hears_no_signals(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    protect(trainer)
    before = signal.getsignal(signal.SIGINT)
    failed: list[BaseException] = []

    def train() -> None:
        try:
            trainer.fit(tiny.stage1(), datamodule=tiny.digits())
        except BaseException as error:
            failed.append(error)

    def train_elsewhere() -> None:
        thread = threading.Thread(target=train, name="training")
        thread.start()
        thread.join()

    said = "fit runs in the thread training, but Python hears signals in the main thread alone"
    with pytest.warns(UserWarning, match=said):
        train_elsewhere()
    assert failed == []
    assert trainer.global_step == 6
    assert signal.getsignal(signal.SIGINT) is before


def test_without_modelcheckpoint_lightning_says_that_there_is_no_best_model(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    protect(trainer)
    trainer.fit(tiny.stage1(), tiny.digits())
    with pytest.raises(ValueError, match="is not configured to save the best model"):
        trainer.test(datamodule=tiny.digits(), ckpt_path="best", verbose=False)


def test_a_trial_run_leaves_the_checkpoint_of_an_earlier_signal(tmp_path: Path) -> None:
    before = tmp_path / "saved" / "interrupted.ckpt"
    before.parent.mkdir()
    before.write_bytes(b"of a run that goes on")
    saver = ModelCheckpoint(dirpath=tmp_path / "saved")
    sender = SendSignal(signal.SIGTERM, "training")
    trainer = tiny.trainer(tmp_path, [sender, saver], enable_checkpointing=True, fast_dev_run=2)
    protect(trainer)
    with pytest.raises(SIGTERMException):
        trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    assert before.read_bytes() == b"of a run that goes on"


class Counting(TorchDispatchMode):
    """Counts what reads a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_one_process_reads_no_tensor_to_learn_of_a_signal(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    callback = SignalCheckpoint()
    callback.setup(trainer, tiny.stage1(), "fit")
    callback.on_train_start(trainer, tiny.stage1())
    try:
        with Counting() as counting:
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False
            for step in range(3):
                trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = step + 1
                callback.on_train_batch_end(trainer, tiny.stage1(), None, None, step)
    finally:
        callback.teardown(trainer, tiny.stage1(), "fit")
    assert counting.reads == 0
