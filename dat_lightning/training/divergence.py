"""Keeps a loss or gradient that is not finite from reaching the weights, and keeps its batch for a post-mortem."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from dat_lightning.core.errors import InputError, TrainingFailureError, require_at_least, require_counts
from dat_lightning.training.post_mortem import PostMortem, bad_gradients, named_images, named_tensors, save_post_mortem
from dat_lightning.training.signatures import (
    batch_energies,
    circumstances_of,
    curriculum_of,
    failure_signatures,
)

# Steps over which the share of skipped ones is taken.
_WINDOW = 100


@dataclass(frozen=True)
class _Failure:
    """The first batch of a step that failed on some rank, as this rank saw it."""

    batch: Any
    batch_idx: int
    loss: Tensor
    # Whether it is the loss that failed: here, and on any rank.
    own_loss: bool
    any_loss: bool


class DivergenceGuard(Callback):
    """Stops or skips a step whose loss or gradient is NaN or infinite, before the optimiser sees it.

    A step that is skipped leaves weights, the optimiser's moments, the average of
    :class:`~dat_lightning.ExponentialMovingAverage` and all buffers as they were: the curriculum's T and window, and
    the statistics of batch norm. What counts steps goes on: ``global_step``, a schedule by steps, the position in the
    data; and chains of a replay buffer and warm attacks have moved.
    A run that stops is left in that state too, so that a checkpoint saved on the way out is sound. With accumulated
    gradients the whole step is skipped, and the buffers are as before the step from the batch on that failed; over
    several processes all decide alike. In manual optimisation a step is a batch, or the batches up to one in which an
    optimiser steps: after a failure no optimiser moves until it ends; one that has stepped before keeps its step.

    Works with any LightningModule that trains by gradients; T, energies and some causes are known of this package's
    alone. With a gradient scaler (``16-mixed``) gradients that overflow are the scaler's affair, which skips such steps
    itself, until its scale has fallen to 1; a loss that is not finite is a failure at once. LBFGS, which calls a step
    several times, and strategies that step by themselves (DeepSpeed) are not supported.

    The first failures are kept in ``step<n>-rank<r>.safetensors``, see :func:`load_post_mortem`; of several processes
    those write whose own loss failed, or all if none did. Logged: ``train/skipped_steps``, from the first one on; a
    warning at the end of training says how many there were.

    Args:
        action: What to do about such a step.
        max_skipped_share: Share of the last 100 steps, in [0, 1], beyond which the run stops; steps that are not yet
            taken count as sound.
        dirpath: Folder of the files; by default ``post_mortem`` in the Trainer's ``default_root_dir``.
        max_saved: Failures of a run, including those before it was resumed, that are kept.
        max_megabytes: Size of a file; of a larger batch the first examples are kept.

    Raises:
        InputError: If a number is outside its range.
        TrainingFailureError: In training, as said above. The message names what the failure looks like.
    """

    def __init__(
        self,
        action: Literal["stop", "skip"] = "stop",
        max_skipped_share: float = 0.1,
        dirpath: str | None = None,
        max_saved: int = 3,
        max_megabytes: int = 1024,
    ) -> None:
        if action not in ("stop", "skip"):
            raise InputError(f"action must be 'stop' or 'skip', got {action!r}")
        if not 0 <= max_skipped_share <= 1:
            raise InputError(f"max_skipped_share must lie in [0, 1], got {max_skipped_share}")
        require_at_least(0, max_saved=max_saved, max_megabytes=max_megabytes)
        self.action = action
        self.max_skipped_share = max_skipped_share
        self.dirpath = dirpath
        self.max_saved = max_saved
        self.max_megabytes = max_megabytes
        self.num_skipped = 0
        self.skipped_step: int | None = None
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._num_saved = 0
        self._has_run = False
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Forgets what belongs to one step."""
        # By module and name: the tensor there and its value at the start of the step.
        self._buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] | None = None
        self._batch: Any = None
        self._batch_idx = 0
        self._loss: Tensor | None = None
        self._failure: _Failure | None = None
        self._has_stepped = False
        self._is_withheld = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run: its counts, and a step that it did not end."""
        if stage == "fit" and self._has_run:
            self.num_skipped = self._num_saved = 0
            self._recent.clear()
            self._has_run = False
        self.skipped_step = None
        self._start_afresh()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the counts, which go on when a run resumes, and the last step that was skipped."""
        return {
            "num_skipped": self.num_skipped,
            "num_saved": self._num_saved,
            "skipped_step": self.skipped_step,
            "recent": list(self._recent),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts.

        Raises:
            InputError: If they are none.
        """
        require_counts(0, **{name: state_dict.get(name) for name in ("num_skipped", "num_saved")})
        self._has_run = False
        self.num_skipped = state_dict["num_skipped"]
        self._num_saved = state_dict["num_saved"]
        self.skipped_step = state_dict["skipped_step"]
        self._recent = deque(state_dict["recent"], maxlen=_WINDOW)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the batch, and at the start of a step the buffers that it may change."""
        self._batch, self._batch_idx, self._has_run = batch, batch_idx, True
        if self._buffers is None:
            named = [(m, name, b) for m in pl_module.modules() for name, b in m._buffers.items()]
            self._buffers = [(m, name, b, None if b is None else b.detach().clone()) for m, name, b in named]

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remembers the loss."""
        self._loss = loss.detach()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at loss and gradients, the one host synchronisation of a batch, and mends the buffers on a failure."""
        if self._loss is None:
            return
        if self._failure is None:
            loss_failed, failed = self._look(trainer, pl_module, self._loss)
            any_loss_failed, any_failed = self._on_any_rank(trainer, pl_module, loss_failed, failed)
            if any_failed:
                self._failure = _Failure(self._batch, self._batch_idx, self._loss, loss_failed, any_loss_failed)
        if self._failure is not None:
            self._restore_buffers(pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Takes the gradients from the optimiser if the step has failed on any rank."""
        self._has_stepped = True
        if self._failure is None:
            return
        names = bad_gradients(pl_module.named_parameters())
        self._withhold(trainer, optimizer)
        self.skipped_step = trainer.global_step + 1
        if not self._is_withheld:
            self._is_withheld = True
            self.num_skipped += 1
            self._recent.append(True)
            self._report(trainer, pl_module, self._failure, names)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Ends the step if an optimiser has had its turn, and logs how many steps were skipped."""
        self._batch, self._loss = None, None
        if self._failure is not None:
            # What changed after the last backward pass.
            self._restore_buffers(pl_module)
        elif self._has_stepped:
            self._recent.append(False)
        if self._is_withheld:
            # Those of other optimisers, and of parameters that no optimiser clears.
            pl_module.zero_grad()
        # Gradients that failed and that nobody has stepped with are still there.
        if self._is_withheld or (self._has_stepped and self._failure is None):
            self._start_afresh()
        if self.num_skipped > 0:
            pl_module.log("train/skipped_steps", float(self.num_skipped), sync_dist=False, batch_size=1)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says how many steps were skipped."""
        if self.num_skipped > 0:
            kept = f"; see {self._folder(trainer)}" if self._num_saved > 0 else ""
            rank_zero_warn(
                f"steps of this run that were skipped: {self.num_skipped}, by step {trainer.global_step}. Whenever a"
                f" loss or gradient is NaN or infinite, the step is skipped{kept}"
            )

    # Parts.

    @staticmethod
    def _look(trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> tuple[bool, bool]:
        """Whether this rank's loss has failed, and whether anything has."""
        # Through a norm every NaN shows, at the price of one look at each number. If it is not finite only because
        # squares overflow, as they soon do in float16, that is found out the slow way.
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = get_total_norm(gradients) if gradients else loss
        sound = torch.stack([loss.float().reshape(()), norm.detach().float().to(loss.device)]).isfinite()
        # The next step's chain needs T on the host: one transfer for both.
        curriculum = curriculum_of(pl_module)
        more = [] if curriculum is None else [curriculum.num_steps.to(sound.device)]
        is_sound, has_sound_gradients, *steps = torch.stack([*sound.long(), *more]).tolist()
        if curriculum is not None:
            curriculum.note_steps(*steps)
        has_sound_gradients = has_sound_gradients or not bad_gradients(pl_module.named_parameters())
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if not has_sound_gradients and is_sound and scaler is not None and scaler.get_scale() > 1:
            return False, False
        return not is_sound, not (is_sound and has_sound_gradients)

    @staticmethod
    def _on_any_rank(trainer: Trainer, pl_module: LightningModule, *own: bool) -> tuple[bool, ...]:
        """Each flag, whether it is set on any rank."""
        if trainer.world_size == 1:
            return own
        flags = torch.tensor([float(flag) for flag in own], device=pl_module.device)
        return tuple(flag > 0 for flag in trainer.strategy.reduce(flags, reduce_op="max").tolist())

    def _restore_buffers(self, pl_module: LightningModule) -> None:
        """Puts the tensors of the start of the step back with their values, also where others have their names now."""
        for module, name, buffer, value in self._buffers or ():
            if buffer is not None and value is not None:
                buffer.data.copy_(value)
            module._buffers[name] = buffer
        curriculum = curriculum_of(pl_module)
        if curriculum is not None:
            curriculum.note_steps(None)

    @staticmethod
    def _withhold(trainer: Trainer, optimizer: Optimizer) -> None:
        """An optimiser leaves parameters without gradient alone, with their moments and without weight decay."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # A fused optimiser meets the scaler in its step only, where there have to be gradients.
        is_fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if not is_fused:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.fill_(torch.inf)

    def _report(self, trainer: Trainer, pl_module: LightningModule, failure: _Failure, names: list[str]) -> None:
        """Keeps the step, and stops or warns."""
        what = "the loss" if failure.any_loss else "a gradient"
        place = f"step {trainer.global_step + 1} (epoch {trainer.current_epoch}, batch {failure.batch_idx})"
        signatures = failure_signatures(trainer, pl_module, named_images(failure.batch))
        saved = ""
        if failure.own_loss or not failure.any_loss:
            circumstances = {"what": what, "batch_idx": failure.batch_idx, "loss": _unscaled(trainer, failure.loss)}
            circumstances |= {"bad_gradients": {"count": len(names), "names": names[:20]}, "signatures": signatures}
            saved = self._save(trainer, pl_module, failure.batch, circumstances)
        message = f"{what} is NaN or infinite in {place}: {signatures[0]}{saved}"
        if self.action == "stop":
            raise TrainingFailureError(message)
        if sum(self._recent) / _WINDOW > self.max_skipped_share:
            raise TrainingFailureError(
                f"{sum(self._recent)} of the last {_WINDOW} steps were skipped, more than max_skipped_share"
                f" {self.max_skipped_share:g} allows, the last because {message}"
            )
        rank_zero_warn(f"{message}; the step is skipped")

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "post_mortem" if self.dirpath is None else Path(self.dirpath)

    def _save(self, trainer: Trainer, pl_module: LightningModule, batch: Any, circumstances: dict[str, Any]) -> str:
        """Keeps the step and returns where, to go on with the sentence."""
        if self._num_saved >= self.max_saved:
            return ""
        self._num_saved += 1
        report = {**circumstances_of(trainer, pl_module), **circumstances}
        path = self._folder(trainer) / f"step{trainer.global_step + 1:08d}-rank{trainer.global_rank}.safetensors"
        energies = batch_energies(trainer, pl_module, named_images(batch))
        try:
            save_post_mortem(path, PostMortem(report, dict(named_tensors(batch)), energies), self.max_megabytes * 2**20)
        except OSError as error:
            return f"; its batch could not be saved to {path}: {error.strerror or error}"
        return f"; its batch is in {path}"


def step_was_skipped(trainer: Trainer) -> bool:
    """Returns whether a :class:`DivergenceGuard` has kept the last step from the weights."""
    guards = [c for c in trainer.callbacks if isinstance(c, DivergenceGuard)]  # type: ignore[attr-defined]
    return any(guard.skipped_step == trainer.global_step for guard in guards)


def _unscaled(trainer: Trainer, loss: Tensor) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(loss) / (1.0 if scaler is None else float(scaler.get_scale()))
