"""Runs that survive: which checkpoint a run goes on from, and the Trainer's parts that see to it that there is one."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from dat_lightning.core.errors import InputError, printable
from dat_lightning.modules import EnergyModule
from dat_lightning.modules.checks import check_restored
from dat_lightning.runs import (
    AtomicCheckpointIO,
    DamagedCheckpointError,
    Requirements,
    can_resume,
    checkpoints_in,
    name_another,
    newest_whole,
    read_run_checkpoint,
    read_without_tensors,
    shapes_of,
    step_of,
)
from dat_lightning.runs.lightning_internals import name_what_is_not_restored, use_checkpoint_io
from dat_lightning.runs.signal_checkpoint import SignalCheckpoint
from dat_lightning.weights import changed_settings
from dat_lightning.weights.files import require_regular
from dat_lightning.weights.shipped import is_exported, located

_LAST = "last"
_HINT = "; for its weights alone use --model.init_from"
_WEIGHTS_ALONE = f"has weights alone, and training goes on from an optimiser's state{_HINT}"
# What the savers of FSDP and DeepSpeed have in the folder that is a checkpoint.
_SHARDED = (".metadata", "latest")


class SameCheckpoint(Callback):
    """Refuses to train from different checkpoints in the processes of a run: each of them looks for its own."""

    def __init__(self) -> None:
        self._step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes ready for a run."""
        self._step = 0

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes the step of the checkpoint."""
        self._step = step_of(checkpoint)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the file's name and its step over all processes.

        Raises:
            InputError: If they differ.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        name = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).name
        chosen: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(chosen, (name, self._step))
        for rank, other in enumerate(chosen):
            if other != chosen[0]:
                raise InputError(
                    f"rank {rank} goes on from {_described(*other)}, rank 0 from {_described(*chosen[0])}:"
                    " all processes must share the folder of the checkpoints"
                )


def _described(name: str | None, step: int) -> str:
    return "no checkpoint" if name is None else f"{name} (step {step})"


def protect(trainer: Trainer) -> None:
    """Gives a Trainer what a run needs to survive, where it has none of the kind.

    That is :class:`AtomicCheckpointIO`, :class:`SignalCheckpoint` and :class:`SameCheckpoint`; and an error in place of
    a traceback where a checkpoint holds what this run cannot take back. A plug-in for
    checkpoints that the user chose stays; one that wraps another, such as ``AsyncCheckpointIO``, writes through ours.
    """
    use_checkpoint_io(trainer, AtomicCheckpointIO())
    name_what_is_not_restored(trainer)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for kind in (SignalCheckpoint, SameCheckpoint):
        if not any(isinstance(callback, kind) for callback in callbacks):
            callbacks.append(kind())


def begin_with_exported(given: str | None, model: EnergyModule, to_train: bool) -> bool:
    """Has a module begin with the weights of a model that ships, or of a folder that ``export`` wrote.

    Lightning takes no such weights as a checkpoint. A folder with checkpoints in it is one of checkpoints.

    Args:
        given: What ``--ckpt_path`` says.
        model: Of the run; its ``init_from`` and ``new_head`` are replaced.
        to_train: Whether training is to go on from there.

    Returns:
        Whether it was such weights.

    Raises:
        InputError: If training is to go on from them, or a file here has the name of the model.
    """
    folder = None if given is None else located(given)
    if folder is None or not is_exported(folder) or checkpoints_in(folder):
        return False
    if to_train:
        raise InputError(f"--ckpt_path {given} {_WEIGHTS_ALONE}")
    model.init_from, model.new_head = given, False
    return True


def find_checkpoint(given: str | None, trainer: Trainer, model: LightningModule, to_train: bool) -> str | None:
    """Returns the checkpoint that ``--ckpt_path`` means, checked; ``None`` to start anew.

    A path is itself, and so is a folder that is one sharded checkpoint. Any other folder means the newest whole
    checkpoint in it, and ``last`` the newest whole one of this run: in the folders of its ``ModelCheckpoint``
    callbacks, where Lightning puts those that have none, or one that a signal left in ``default_root_dir``. Where there
    is none yet, training from ``last`` starts anew, so that one command serves all lives of a job. A job that Slurm has
    put into its queue again goes on from ``last`` without being told.

    Where training goes on, a warning says which of the module's settings have changed, and that it is done already.

    Args:
        given: The argument.
        trainer: Of the run.
        model: Of the run; checkpoints of another kind of module or network are not considered.
        to_train: Whether training goes on, which needs the optimiser's state.

    Raises:
        InputError: If it is ``best``, which only the process that trains knows; if the checkpoint is damaged, foreign,
            of another kind of module or of a newer version; if there are some, but none is whole; or if there is none
            to evaluate.
    """
    if given == "best":
        raise InputError(_no_best(trainer))
    if given == "hpc":
        if not any(path.name.startswith("hpc_ckpt_") for path in _in_root(trainer)):
            raise InputError(f"--ckpt_path hpc: there is no hpc_ckpt_<n>.ckpt in {trainer.default_root_dir}")
        return given
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    required = Requirements(kind, shapes_of(model.state_dict()), dict(model.hparams), to_train)
    if isinstance(model, EnergyModule):
        required = replace(required, check=partial(check_restored, model, to_train=to_train))
    if given is None:
        if not (to_train and SLURMEnvironment.detect() and _in_root(trainer)):
            return None
        given = _LAST
    if given != _LAST and Path(given).exists() and not Path(given).is_dir():
        require_regular(Path(given))
    if given != _LAST and (not Path(given).is_dir() or any((Path(given) / name).exists() for name in _SHARDED)):
        if Path(given).is_file():
            _check(Path(given), type(model).__name__, required)
            _warn_before_training(given, Path(given), trainer, required)
        return given
    found = _newest(given, trainer, required, type(model).__name__)
    if found is None:
        return None
    rank_zero_info(f"--ckpt_path {given} is {found}")
    _warn_before_training(given, found, trainer, required)
    return str(found)


def _no_best(trainer: Trainer) -> str:
    """Returns why ``best`` names no checkpoint here, and which files it may have meant."""
    files = [path for folder in _folders(trainer) for path in checkpoints_in(folder)]
    named = f", such as {', '.join(map(str, files[:5]))}" if files else ""
    return (
        f"--ckpt_path best: only the process that trains knows its best checkpoint; name the file{named}, or use last"
    )


def _newest(given: str, trainer: Trainer, required: Requirements, kind: str) -> Path | None:
    """Returns the checkpoint that a folder or ``last`` means."""
    candidates = _of_run(trainer) if given == _LAST else checkpoints_in(Path(given))
    passed_over: list[str] = []
    found = newest_whole(candidates, required, passed_over.append)
    if found is None and (candidates or given != _LAST):
        folders = ", ".join(sorted({str(path.parent) for path in candidates})) or given
        raise InputError(
            f"--ckpt_path {given}: none of the {len(candidates)} checkpoints in {folders} is a whole one of a"
            f" {kind} with this network{''.join(f'; {sentence}' for sentence in passed_over[:3])}"
        )
    for sentence in passed_over:
        rank_zero_warn(printable(f"--ckpt_path {given}: passed over: {sentence}"))
    if found is None:
        if not required.to_train:
            folders = ", ".join(map(str, [*_folders(trainer), trainer.default_root_dir]))
            raise InputError(f"--ckpt_path last: there is no checkpoint of this run in {folders}; name a file")
        rank_zero_info("--ckpt_path last: there is no checkpoint of this run yet; it starts anew")
        return None
    latest = max(candidates, key=lambda path: path.stat().st_mtime_ns)
    told = any(str(latest) in sentence for sentence in passed_over)
    if latest.stat().st_mtime_ns > found.stat().st_mtime_ns and not told:
        why = _why_not_taken(latest, required)
        rank_zero_warn(f"--ckpt_path {given}: {latest} is newer, but {why}; the run goes on from {found}")
    return found


def _why_not_taken(path: Path, required: Requirements) -> str:
    """Returns why a checkpoint that was written later, and could be read, is not the one to go on from."""
    contents = read_without_tensors(path)
    if required.unmet(contents) is not None or not (can_resume(contents) or not required.to_train):
        return "cannot be used"
    if changed_settings(contents, required.settings):
        return "has other settings of the module than this run"
    return f"has fewer steps ({step_of(contents)})"


def _warn_before_training(given: str, path: Path, trainer: Trainer, required: Requirements) -> None:
    """Warns of what a user who goes on from a checkpoint may not expect."""
    if not required.to_train:
        return
    contents = read_without_tensors(path)
    changed = changed_settings(contents, required.settings)
    if changed:
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        rank_zero_warn(
            printable(
                f"--ckpt_path {given}: {path} was trained with other settings, and the run goes on with the new ones:"
                f" {'; '.join(changed[:8])}{more}"
            )
        )
    limit = _limit_reached(contents, trainer)
    if limit is not None:
        rank_zero_warn(
            f"--ckpt_path {given}: training is done, there is nothing to do: {path} is at {limit}; raise that to go on,"
            " or leave --ckpt_path out and choose another dirpath to start anew"
        )


def _limit_reached(contents: Mapping[str, Any], trainer: Trainer) -> str | None:
    """Returns which of the Trainer's limits a checkpoint has reached, as Lightning decides it."""
    if 0 <= trainer.max_steps <= step_of(contents):
        return f"step {step_of(contents)} of trainer.max_steps={trainer.max_steps}"
    epochs: Any = contents["loops"]
    for name in ("fit_loop", "epoch_progress", "current", "processed"):
        epochs = epochs.get(name) if isinstance(epochs, Mapping) else None
    if not isinstance(epochs, int):
        return None  # of another version of Lightning
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        return f"epoch {epochs} of trainer.max_epochs={trainer.max_epochs}"
    return None


def _of_run(trainer: Trainer) -> list[Path]:
    return [path for folder in _folders(trainer) for path in checkpoints_in(folder)] + _in_root(trainer)


def _folders(trainer: Trainer) -> list[Path]:
    """Returns the folders in which the ModelCheckpoint callbacks save, or saved in earlier lives."""
    savers = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    folders = {Path(dirpath) for dirpath in savers if dirpath}
    if not all(savers):
        # Lightning's choice, with a new folder for each life.
        folders.add(Path(trainer.default_root_dir) / "checkpoints")
        for each in trainer.loggers:
            folders.update(Path(each.save_dir or trainer.default_root_dir, str(each.name)).glob("*/checkpoints"))
    return sorted(folders)


def _in_root(trainer: Trainer) -> list[Path]:
    root = Path(trainer.default_root_dir)
    return [path for name in ("hpc_ckpt_*.ckpt", "interrupted.ckpt") for path in checkpoints_in(root, name)]


def _check(path: Path, kind: str, required: Requirements) -> None:
    """Raises an error if a checkpoint is not one of this kind of run."""
    try:
        contents = read_run_checkpoint(path, mmap=True)
    except DamagedCheckpointError as error:
        raise InputError(f"--ckpt_path: {error}{name_another(path, required)}") from error
    if "pytorch-lightning_version" not in contents:
        raise InputError(f"--ckpt_path {path} is no checkpoint of a run of this program{_HINT}")
    # Evaluation takes weights alone, from whatever module they are.
    unmet = (required if required.to_train else replace(required, kind=None)).unmet(contents)
    if unmet is not None:
        raise InputError(
            f"--ckpt_path {path} is a checkpoint of another kind of module or network than {kind}: {unmet}{_HINT}"
        )
    if required.to_train and not can_resume(contents):
        raise InputError(f"--ckpt_path {path} {_WEIGHTS_ALONE}")
    try:
        required.check(contents)
    except InputError as error:
        raise InputError(f"--ckpt_path {path}: {error}{_HINT}") from error
