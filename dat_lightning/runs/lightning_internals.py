"""All that this package takes from Lightning beyond its public interface, each with the reason.

What is inherited is listed beside these in tests/runs/test_lightning_internals.py, which fails with a sentence when
Lightning has moved something, and when another file of the package reaches into a Trainer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override

from dat_lightning.core.errors import InputError


class NamedRestore(_CheckpointConnector):
    """Restores a checkpoint as Lightning does, and says of what cannot be restored whose state it is.

    What each part of a run has saved goes back to that part unseen: the loops, optimisers, schedules, callbacks and
    data of this program, of Lightning and of users. In a file from elsewhere it may be anything.
    """

    @override
    def restore_model(self) -> None:
        """Restores the weights."""
        with self._named("weights"):
            super().restore_model()

    @override
    def restore_datamodule(self) -> None:
        """Restores the position in the data."""
        with self._named("state of the data"):
            super().restore_datamodule()

    @override
    def restore_callbacks(self) -> None:
        """Restores the states of callbacks."""
        with self._named("state of a callback"):
            super().restore_callbacks()

    @override
    def restore_training_state(self) -> None:
        """Restores loops, optimisers and schedules."""
        with self._named("state of loops, optimisers or schedules"):
            super().restore_training_state()

    @contextmanager
    def _named(self, part: str) -> Iterator[None]:
        try:
            yield
        except (InputError, MisconfigurationException) as error:
            raise InputError(f"{self.trainer.ckpt_path}: {error}") from error
        except Warning:  # of whoever has made errors of them
            raise
        except Exception as error:
            raise InputError(
                f"the {part} in {self.trainer.ckpt_path} cannot be restored: {type(error).__name__}: {str(error)[:300]}"
            ) from error


def name_what_is_not_restored(trainer: Trainer) -> None:
    """Has a Trainer restore checkpoints by :class:`NamedRestore`; before it has restored any."""
    if type(trainer._checkpoint_connector) is _CheckpointConnector:
        trainer._checkpoint_connector = NamedRestore(trainer)


def collect_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Returns the contents of a checkpoint: ``Trainer.save_checkpoint`` also waits for all ranks."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def next_slurm_checkpoint(trainer: Trainer) -> str:
    """Returns where Lightning, which goes on from there by itself, would save when Slurm's signal comes."""
    return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """Returns the environment that the Trainer runs in: the strategy of a single device does not show it."""
    return trainer._accelerator_connector.cluster_environment


def logged_step(trainer: Trainer) -> int:
    """Returns the step that loggers are given, which with several optimisers is not ``global_step``."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def validation_follows(trainer: Trainer) -> bool:
    """Returns whether a training step is at its end, in its last hooks, and validation comes before the next step.

    A validation that comes because of the time, or because training is to stop, does not count: whether it comes is not
    known from the progress of the loops, by which a resumed run decides.
    """
    loop = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress.total
    if not batches.ready == batches.processed == batches.completed + 1:  # type: ignore[attr-defined]
        return False
    if trainer.should_stop or trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
        return False
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher)


def replaces_files(saver: ModelCheckpoint) -> bool:
    """Returns whether a callback writes over files of the same name, which it keeps to itself."""
    return not saver._enable_version_counter


def use_checkpoint_io(trainer: Trainer, checkpoint_io: CheckpointIO) -> None:
    """Has a Trainer write checkpoints by a plug-in where its user chose none.

    One that wraps another, such as ``AsyncCheckpointIO``, is given this one if it has none yet; the public property
    would give it Lightning's first.
    """
    chosen = trainer.strategy._checkpoint_io
    if isinstance(chosen, _WrappingCheckpointIO):
        chosen.checkpoint_io = checkpoint_io  # does nothing where it has one already
    elif type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = checkpoint_io
