"""Keeps a loss or gradient that is not finite from reaching the weights, and keeps its batch for a post-mortem."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from dat_lightning.callbacks.post_mortem import (
    PostMortem,
    bad_gradients,
    named_images,
    named_tensors,
    save_post_mortem,
)
from dat_lightning.callbacks.signatures import (
    TrainingFailureError,
    batch_energies,
    curriculum_auc,
    curriculum_of,
    failure_signatures,
)


class DivergenceGuard(Callback):
    """Stops or skips a step whose loss or gradient is NaN or infinite, before the optimiser sees it.

    A step that is skipped leaves weights, the optimiser's moments, the average of
    :class:`~dat_lightning.ExponentialMovingAverage` and all buffers as they were: the curriculum's T and window, and
    the statistics of batch norm. What counts steps goes on: ``global_step``, a schedule by steps, the position in the
    data.
    A run that stops is left in that state too, so that a checkpoint saved on the way out is sound. With accumulated
    gradients the whole step is skipped; over several processes all decide alike.

    Works with any LightningModule that trains by gradients; T, energies and some causes are known of this package's
    alone. With a gradient scaler (``16-mixed``) gradients that overflow are the scaler's affair, which skips such steps
    itself, until its scale has fallen to 1; a loss that is not finite is a failure at once. LBFGS, which calls a step
    several times, and strategies that step by themselves (DeepSpeed) are not supported.

    The first failures are kept in ``step<n>-rank<r>.safetensors``, see :func:`load_post_mortem`; of several processes
    those write whose own loss failed, or all if none did. Logged: ``train/skipped_steps``, from the first one on.

    Args:
        action: What to do about such a step.
        max_skipped: Steps skipped in a row after which the run stops.
        dirpath: Folder of the files; by default ``post_mortem`` in the Trainer's ``default_root_dir``.
        max_saved: Failures of a run, including those before it was resumed, that are kept.
        max_megabytes: Size of a file; of a larger batch the first examples are kept.

    Raises:
        ValueError: If a number is negative, or ``max_skipped`` is not positive.
        TrainingFailureError: In training, as said above. The message names what the failure looks like.
    """

    def __init__(
        self,
        action: Literal["stop", "skip"] = "stop",
        max_skipped: int = 10,
        dirpath: str | None = None,
        max_saved: int = 3,
        max_megabytes: int = 1024,
    ) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"action must be 'stop' or 'skip', got {action!r}")
        if max_skipped < 1:
            raise ValueError(f"max_skipped must be at least 1, got {max_skipped}")
        for name, value in (("max_saved", max_saved), ("max_megabytes", max_megabytes)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.action = action
        self.max_skipped = max_skipped
        self.dirpath = dirpath
        self.max_saved = max_saved
        self.max_megabytes = max_megabytes
        self.num_skipped = 0
        self._in_a_row = 0
        self._num_saved = 0
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Forgets what belongs to one step."""
        self.skipped_step: int | None = None
        self._buffers: list[tuple[Tensor, Tensor]] | None = None
        self._batch: Any = None
        self._batch_idx = 0
        self._loss: Tensor | None = None
        # The first batch of the step that failed, its number, its loss, and whether it is the loss that failed.
        self._failure: tuple[Any, int, Tensor, bool] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets a step that an earlier run did not end."""
        self._start_afresh()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the counts, which go on when a run resumes."""
        return {"num_skipped": self.num_skipped, "in_a_row": self._in_a_row, "num_saved": self._num_saved}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts."""
        self.num_skipped = state_dict["num_skipped"]
        self._in_a_row = state_dict["in_a_row"]
        self._num_saved = state_dict["num_saved"]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the batch, and at the start of a step the buffers that it may change."""
        self._batch, self._batch_idx = batch, batch_idx
        if self._buffers is None:
            self._buffers = [(b, b.detach().clone()) for b in pl_module.buffers()]

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remembers the loss."""
        self._loss = loss.detach()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at loss and gradients: the one host synchronisation of a batch."""
        if self._failure is not None or self._loss is None:
            return
        # Through a norm every NaN shows, at the price of one look at each number. If it is not finite only because
        # squares overflow, as they soon do in float16, that is found out the slow way.
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = get_total_norm(gradients) if gradients else self._loss
        values = torch.stack([self._loss.float().reshape(()), norm.detach().float().to(self._loss.device)])
        is_sound, has_sound_gradients = values.isfinite().tolist()
        has_sound_gradients = has_sound_gradients or not bad_gradients(pl_module.named_parameters())
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if not has_sound_gradients and is_sound and scaler is not None and scaler.get_scale() > 1:
            return
        if not (is_sound and has_sound_gradients):
            self._failure = (self._batch, self._batch_idx, self._loss, not is_sound)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Takes the gradients from the optimiser if the step has failed on any rank."""
        failure, buffers = self._failure, self._buffers
        self._failure, self._buffers = None, None
        loss_failed, failed = self._on_any_rank(trainer, pl_module, failure)
        if not failed:
            self._in_a_row = 0
            return
        names = bad_gradients(pl_module.named_parameters())
        self._withhold(trainer, optimizer)
        for buffer, value in buffers or ():
            buffer.data.copy_(value)
        self.num_skipped += 1
        self._in_a_row += 1
        self.skipped_step = trainer.global_step + 1
        batch, batch_idx, loss, own = failure or (self._batch, self._batch_idx, self._loss, False)
        what = "the loss" if loss_failed else "a gradient"
        place = f"step {trainer.global_step + 1} (epoch {trainer.current_epoch}, batch {batch_idx})"
        signatures = failure_signatures(trainer, pl_module, named_images(batch))
        saved = ""
        if own or not loss_failed:
            circumstances = {"what": what, "batch_idx": batch_idx, "loss": _unscaled(trainer, loss)}
            circumstances |= {"bad_gradients": {"count": len(names), "names": names[:20]}, "signatures": signatures}
            saved = self._save(trainer, pl_module, batch, circumstances)
        message = f"{what} is NaN or infinite in {place}: {signatures[0]}{saved}"
        if self.action == "stop":
            raise TrainingFailureError(message)
        if self._in_a_row >= self.max_skipped:
            raise TrainingFailureError(f"{self._in_a_row} steps in a row were skipped, the last because {message}")
        rank_zero_warn(f"{message}; the step is skipped")

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Lets go of the batch, and logs how many steps were skipped."""
        self._batch, self._loss = None, None
        if self.num_skipped > 0:
            pl_module.log("train/skipped_steps", float(self.num_skipped), sync_dist=False, batch_size=1)

    # Parts.

    @staticmethod
    def _on_any_rank(
        trainer: Trainer, pl_module: LightningModule, failure: tuple[Any, int, Tensor, bool] | None
    ) -> tuple[bool, bool]:
        """Whether a loss failed, and whether anything did."""
        own = failure is not None and failure[3], failure is not None
        if trainer.world_size == 1:
            return own
        flags = torch.tensor([float(flag) for flag in own], device=pl_module.device)
        loss_failed, failed = trainer.strategy.reduce(flags, reduce_op="max").tolist()
        return loss_failed > 0, failed > 0

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

    def _save(self, trainer: Trainer, pl_module: LightningModule, batch: Any, circumstances: dict[str, Any]) -> str:
        """Keeps the step and returns where, to go on with the sentence."""
        if self._num_saved >= self.max_saved:
            return ""
        self._num_saved += 1
        curriculum, images = curriculum_of(pl_module), named_images(batch)
        report = {
            "step": trainer.global_step + 1,
            "epoch": trainer.current_epoch,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "contrastive_steps": None if curriculum is None else int(curriculum.num_steps),
            "window_auc": None if curriculum is None else curriculum_auc(curriculum),
            "learning_rates": [group.get("lr") for o in trainer.optimizers for group in o.param_groups],
            "metrics": {name: v for name, v in trainer.callback_metrics.items() if name.startswith("train/")},
            **circumstances,
        }
        folder = Path(trainer.default_root_dir) / "post_mortem" if self.dirpath is None else Path(self.dirpath)
        path = folder / f"step{trainer.global_step + 1:08d}-rank{trainer.global_rank}.safetensors"
        energies = batch_energies(trainer, pl_module, images)
        try:
            save_post_mortem(path, PostMortem(report, dict(named_tensors(batch)), energies), self.max_megabytes * 2**20)
        except OSError as error:
            return f"; its batch could not be saved to {path}: {error.strerror or error}"
        return f"; its batch is in {path}"


def step_was_skipped(trainer: Trainer) -> bool:
    """Returns whether a :class:`DivergenceGuard` has kept the last step from the weights."""
    guards = [c for c in trainer.callbacks if isinstance(c, DivergenceGuard)]  # type: ignore[attr-defined]
    return any(guard.skipped_step == trainer.global_step for guard in guards)


def _unscaled(trainer: Trainer, loss: Tensor | None) -> float | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if loss is None:
        return None
    return float(loss) / (1.0 if scaler is None else float(scaler.get_scale()))
