"""Runs that survive: which checkpoint a run goes on from, and the Trainer's parts that see to it that there is one."""

from collections.abc import Collection
from pathlib import Path

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from dat_lightning.callbacks.signal_checkpoint import SignalCheckpoint
from dat_lightning.checkpoints import (
    AtomicCheckpointIO,
    DamagedCheckpointError,
    can_resume,
    checkpoints_in,
    newest_whole,
    offer,
    read_run,
)

# Words that Lightning understands; it resolves the second and third.
_LAST, _PASSED_ON = "last", ("best", "hpc")
_HINT = "; for its weights alone use --model.init_from"


def protect(trainer: Trainer) -> None:
    """Gives a Trainer :class:`AtomicCheckpointIO` and :class:`SignalCheckpoint` where it has none of the kind.

    A plug-in for checkpoints that the user chose stays; one that wraps another, such as ``AsyncCheckpointIO``, writes
    through ours.
    """
    chosen = trainer.strategy._checkpoint_io
    if isinstance(chosen, _WrappingCheckpointIO):
        chosen.checkpoint_io = AtomicCheckpointIO()  # does nothing where it has one already
    elif type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, SignalCheckpoint) for callback in callbacks):
        callbacks.append(SignalCheckpoint())


def find_checkpoint(given: str | None, trainer: Trainer, model: LightningModule, to_train: bool) -> str | None:
    """Returns the checkpoint that ``--ckpt_path`` means, checked; ``None`` to start anew.

    A path is itself. A folder means the newest whole checkpoint in it, and ``last`` the newest whole one of this run:
    in the folders of its ``ModelCheckpoint`` callbacks, or one that a signal left in ``default_root_dir``. Where there
    is none yet, ``last`` starts anew, so that one command serves all lives of a job. A job that Slurm has put into its
    queue again goes on from ``last`` without being told.

    Args:
        given: The argument.
        trainer: Of the run.
        model: Of the run; checkpoints of another kind of module are not considered.
        to_train: Whether training goes on, which needs the optimiser's state.

    Raises:
        ValueError: If the checkpoint is damaged, foreign, of another kind of module or of a newer version; or if there
            are some, but none is whole.
    """
    if given in _PASSED_ON:
        return given
    names = set(model.state_dict())
    if given is None:
        if not (to_train and SLURMEnvironment.detect() and _in_root(trainer)):
            return None
        given = _LAST
    if given != _LAST and not Path(given).is_dir():
        if Path(given).is_file():
            _check(Path(given), type(model).__name__, names, to_train)
        return given
    candidates = _of_run(trainer) if given == _LAST else checkpoints_in(Path(given))
    found = newest_whole(candidates, names, to_train)
    if found is None and (candidates or given != _LAST):
        folders = ", ".join(sorted({str(path.parent) for path in candidates})) or given
        raise ValueError(
            f"--ckpt_path {given}: none of the {len(candidates)} checkpoints in {folders} is a whole one of a"
            f" {type(model).__name__} with this network"
        )
    if found is None:
        rank_zero_info("--ckpt_path last: there is no checkpoint of this run yet; it starts anew")
        return None
    newer = sorted({path for path in candidates if path.stat().st_mtime_ns > found.stat().st_mtime_ns})
    if newer:
        rank_zero_warn(f"--ckpt_path {given}: {newer[-1]} is newer, but cannot be used; the run goes on from {found}")
    rank_zero_info(f"--ckpt_path {given} is {found}")
    return str(found)


def _of_run(trainer: Trainer) -> list[Path]:
    folders = {Path(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath}
    return [path for folder in sorted(folders) for path in checkpoints_in(folder)] + _in_root(trainer)


def _in_root(trainer: Trainer) -> list[Path]:
    root = Path(trainer.default_root_dir)
    return [path for name in ("hpc_ckpt_*.ckpt", "interrupted.ckpt") for path in checkpoints_in(root, name)]


def _check(path: Path, kind: str, own: Collection[str], to_train: bool) -> None:
    """Raises an error if a checkpoint is not one of this kind of run."""
    try:
        contents = read_run(path, mmap=True)
    except DamagedCheckpointError as error:
        raise ValueError(f"--ckpt_path: {error}{offer(path, own)}") from error
    if "pytorch-lightning_version" not in contents:
        raise ValueError(f"--ckpt_path {path} is no checkpoint of a run of this program{_HINT}")
    found = set(contents.get("state_dict", {}))
    if set(own) != found:
        raise ValueError(
            f"--ckpt_path {path} is a checkpoint of another kind of module or network than {kind}:"
            f" {len(set(own) - found)} names missing, {len(found - set(own))} unexpected, such as"
            f" {min(set(own) ^ found)}{_HINT}"
        )
    if to_train and not can_resume(contents):
        raise ValueError(f"--ckpt_path {path} has weights alone, and training goes on from an optimiser's state{_HINT}")
