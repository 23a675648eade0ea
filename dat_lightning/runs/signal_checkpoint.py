"""The end of a run by a signal: a checkpoint at a moment from which it goes on bit for bit."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from dat_lightning.runs.lightning_internals import (
    collect_checkpoint,
    logged_step,
    next_slurm_checkpoint,
    validation_follows,
)
from dat_lightning.runs.slurm import is_requeued_by_lightning, remove_older_checkpoints, requeue, time_limit_signal

_Handler = Callable[[int, FrameType | None], Any] | int | None
_AGAIN = b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once, without\n"


class StoppedBySignal(SystemExit):
    """Ends the process with the status that a signal gives; ``str()`` of it says what to go on from.

    Args:
        signum: The signal.
        step: Optimiser steps that have been taken.
        path: The checkpoint.
        requeued: Whether Slurm has the job in its queue again.
        status: Of the process.
    """

    def __init__(self, signum: int, step: int, path: str, requeued: bool, status: int) -> None:
        super().__init__(status)
        self.path = path
        goes_on = "the job is in the queue again and goes on from" if requeued else "to go on: --ckpt_path"
        self.message = f"stopped by {signal.Signals(signum).name} after step {step}, not done; {goes_on} {path}"

    def __str__(self) -> str:
        return self.message


class SignalCheckpoint(Checkpoint):
    """Saves a checkpoint when SIGTERM, SIGINT (Ctrl-C) or Slurm's signal comes, and ends the run with that status.

    The signal waits for the end of the training step, so that the checkpoint is one from which training goes on bit for
    bit: Lightning's own handler for Slurm saves in the middle of whatever is going on. During validation, which changes
    nothing that trains, the checkpoint is written at once, and validation starts over when the run goes on; but where
    weights or optimisers are in shards (FSDP, DeepSpeed, ``ZeroRedundancyOptimizer``) all processes write it together
    when validation ends. All processes of a run agree at the end of each step whether to stop, so it is all the same
    which of them got the signal. A second SIGTERM changes nothing; a second Ctrl-C stops at once.
    With ``fast_dev_run``, which writes no checkpoints, the signals do what they do without this callback.

    Without Slurm the checkpoint is ``interrupted.ckpt`` in the folder of the first ``ModelCheckpoint`` that has one.
    The exit status is 143 after SIGTERM and 130 after Ctrl-C, for the process of rank zero: training is not done.

    Under Slurm it is ``hpc_ckpt_<n>.ckpt`` in ``default_root_dir``, from which Lightning goes on by itself; the one
    before it is kept, older ones are removed. The signal before the time limit (SIGUSR1, or what
    ``SLURMEnvironment`` says) also puts the job back into the queue; if that fails, training goes on. SIGTERM does not:
    Slurm sends it when it takes the job off by itself, and when a user cancels the job. Where ``auto_requeue`` is off,
    or torchrun starts the processes of a job, that signal stops the run as SIGTERM does without Slurm.

    Python hears signals in the main thread alone; where ``fit`` runs in another, a warning says so.

    When a run goes on in the same folder of TensorBoard, what was logged after the checkpoint is not shown twice.

    The command line adds this callback to every run.

    Args:
        dirpath: Another folder for the checkpoint.
    """

    # Lightning asks its first Checkpoint callback for it, which this one is where there is no ModelCheckpoint.
    best_model_path = ""

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._run: Trainer | None = None
        self._pid = 0
        self._signal = 0
        self._previous: dict[int, _Handler] = {}
        self._training = False
        self._validating = False
        self._accumulating = False
        self._last_step = -1
        self._saved_at: str | None = None
        self._saving = False
        self._requeued = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes ready for a run; processes that load data inherit the handler of Ctrl-C and leave it to this one."""
        self._run, self._pid, self._signal = trainer, os.getpid(), 0
        self._training = self._validating = self._accumulating = self._saving = False
        self._last_step, self._saved_at, self._requeued = -1, None, False
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn(
                f"fit runs in the thread {threading.current_thread().name}, but Python hears signals in the main thread"
                " alone: SIGTERM and Ctrl-C write no checkpoint"
            )
        self._listen(signal.SIGINT)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over from Lightning, and marks in TensorBoard's files where a resumed run goes on."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._training = True
        self._last_step = trainer.global_step
        self._listen(signal.SIGTERM)
        before_time_limit = time_limit_signal(trainer)
        if before_time_limit is not None:
            self._listen(before_time_limit)
        if trainer.global_step > 0 and trainer.is_global_zero:
            for each in trainer.loggers:
                if isinstance(each, TensorBoardLogger):
                    _mark_restart(each, logged_step(trainer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Stops here if a signal came, unless gradients are being accumulated, which no checkpoint has."""
        self._accumulating = trainer.global_step == self._last_step
        self._last_step = trainer.global_step
        # After an epoch's last batch come validation and the end of the epoch: the next boundaries.
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._boundary(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops here if a signal came; from now on it need not wait."""
        if self._training and not self._accumulating:
            self._validating = True
            self._boundary(trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the time in which a signal need not wait: averaged weights are about to be swapped out."""
        self._validating = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops here if a signal came during validation."""
        if self._training:
            self._boundary(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops here if a signal came at the end of an epoch."""
        self._boundary(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back: the run is done."""
        self._give_back()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_back()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._give_back()
        self._run = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has a validation that is going on start over from its first batch, and one that is next take place.

        Half of a validation gives no figures. Of a checkpoint from the end of the step before a validation Lightning
        would take it that the validation is done; a run that was killed in it would go on without its figures.
        """
        follows = not self._validating and validation_follows(trainer)
        if not self._validating and not follows:
            return
        loops = checkpoint["loops"]["fit_loop"]
        if follows:
            for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
                counts["completed"] = counts["processed"]
        progress = loops["epoch_loop.val_loop.batch_progress"]
        before = progress["total"]["ready"] - (0 if follows else progress["current"]["ready"])
        for counts, done in ((progress["total"], before), (progress["current"], 0)):
            counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
        progress["is_last_batch"] = False

    def _listen(self, signum: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signum)
        if previous != self._handle:
            self._previous[signum] = previous
            signal.signal(signum, self._handle)

    def _give_back(self) -> None:
        self._training = self._validating = False
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a process that loads data; the one that trains decides
        trainer = self._run
        if not self._training or trainer is None:
            previous = self._previous.get(signum)
            if callable(previous):
                previous(signum, frame)
            elif previous == signal.SIG_DFL:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(self._pid, signum)
            return
        if signum == signal.SIGINT:
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            if trainer.is_global_zero:
                os.write(2, _AGAIN)
        if _urgency(signum) >= _urgency(self._signal):
            self._signal = signum  # a signal to requeue is not undone
        # While a checkpoint is written, here or below, a further signal waits for that one.
        may_save = self._validating and trainer.is_global_zero and _rank_zero_can_save(trainer)
        if may_save and self._saved_at is None and not self._saving:
            path = self._path(trainer)
            self._saving = True
            try:
                # Not through the Trainer, which would wait for the other processes: they are elsewhere in validation.
                trainer.strategy.save_checkpoint(collect_checkpoint(trainer), path)
            finally:
                self._saving = False
            self._saved_at = path
            if trainer.world_size == 1:
                self._stop(trainer, self._signal, path)
            elif _urgency(self._signal) == _REQUEUE and is_requeued_by_lightning(trainer):
                self._requeued = requeue()

    def _boundary(self, trainer: Trainer) -> None:
        """Stops if a process got a signal; all processes are here."""
        if not self._training or self._accumulating:
            return
        urgency = _urgency(self._signal)
        if trainer.world_size > 1:
            # One small sum per step. Lightning waits for the same at the start of the next, but asks rank zero alone.
            own = torch.tensor(float(urgency), device=trainer.strategy.root_device)
            urgency = int(trainer.strategy.reduce(own, reduce_op="max"))
        if urgency == 0:
            return
        signum = _signum(trainer, urgency)
        path = trainer.strategy.broadcast(self._path(trainer))
        self._saving = True
        try:
            trainer.save_checkpoint(path)
        finally:
            self._saving = False
        self._saved_at = path
        self._stop(trainer, signum, path)

    def _path(self, trainer: Trainer) -> str:
        if self._saved_at is not None:
            return self._saved_at
        if is_requeued_by_lightning(trainer):
            return next_slurm_checkpoint(trainer)
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return str(Path(self.dirpath or (folders or [trainer.default_root_dir])[0]) / "interrupted.ckpt")

    def _stop(self, trainer: Trainer, signum: int, path: str) -> None:
        """Raises the end of the run, or lets it go on because the job could not be put back into the queue."""
        requeued = False
        if is_requeued_by_lightning(trainer):
            if trainer.is_global_zero:
                remove_older_checkpoints(Path(path))
            if _urgency(signum) == _REQUEUE:
                here = trainer.is_global_zero and (self._requeued or requeue())
                requeued = bool(trainer.strategy.broadcast(here))
                if not requeued:
                    rank_zero_warn(f"the job could not be put back into Slurm's queue; training goes on after {path}")
                    self._signal, self._saved_at, self._requeued = 0, None, False
                    return
        # A launcher that sees another process end with an error kills the one that has the message.
        status = 128 + signum if trainer.is_global_zero else 0
        raise StoppedBySignal(signum, trainer.global_step, path, requeued, status)


_REQUEUE = 3


def _urgency(signum: int) -> int:
    """Ranks signals, so that processes that got different ones do the same."""
    if signum not in (signal.SIGINT, signal.SIGTERM):
        return _REQUEUE if signum else 0
    return 2 if signum == signal.SIGTERM else 1


def _signum(trainer: Trainer, urgency: int) -> int:
    if urgency == _REQUEUE:
        return time_limit_signal(trainer) or int(signal.SIGUSR1)
    return int(signal.SIGTERM if urgency == 2 else signal.SIGINT)


def _rank_zero_can_save(trainer: Trainer) -> bool:
    """Returns whether a save is rank zero's alone: weights or optimisers in shards need all ranks to take part."""
    if trainer.world_size == 1:
        return True
    sharded = any(hasattr(optimizer, "consolidate_state_dict") for optimizer in trainer.optimizers)
    return type(trainer.strategy) is DDPStrategy and not sharded


def _mark_restart(tensorboard: TensorBoardLogger, step: int) -> None:
    """Tells readers of the event files that what an earlier life of the run logged from this step on does not count."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    files = tensorboard.experiment.file_writer
    files.add_event(Event(step=step, file_version="brain.Event:2"))
    files.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
