"""Exponential moving average of the weights, which validation, test, sampling and exports use."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from dat_lightning.core.errors import InputError, require_counts
from dat_lightning.training.divergence import step_was_skipped


class ExponentialMovingAverage(WeightAveraging):
    """Averages parameters and the statistics of norm layers with a decay that warms up.

    The first update copies the weights; update n = 1, 2, … is average ← d·average + (1−d)·weights with
    d = min(``decay``, (1+n)/(10+n)), without warm-up d = ``decay``. Other buffers, such as the curriculum's, are
    copied.

    Lightning's callback, on which this one builds, swaps the average in between ``on_validation_epoch_start`` and
    ``…_end``, also before there is one, and keeps it after training. Here the whole of validation sees the average,
    whatever the order of the callbacks; nothing is averaged, swapped or saved before the first update; an exception
    in validation restores the weights; a checkpoint saved during validation is right; a file of weights alone
    (``save_weights_only``) of this package's modules has the average; and a Trainer that has fitted tests the
    checkpoint that it is given (Lightning issue 21724 and its neighbours).

    Args:
        decay: Largest decay, in [0, 1].
        warm_up: Whether the decay starts low, so that the average forgets the initial weights at once.
        device: Where the average lives; by default with the model.

    Raises:
        InputError: If ``decay`` is outside [0, 1].

    Source: DAT (arXiv 2510.13872), its reference implementation; the warm-up is tf.train.ExponentialMovingAverage's.
    """

    def __init__(self, decay: float = 0.999, warm_up: bool = True, device: str | None = None) -> None:
        if not 0 <= decay <= 1:
            raise InputError(f"decay must lie in [0, 1], got {decay}")
        super().__init__(device=device, use_buffers=True)
        self.decay = decay
        self.warm_up = warm_up
        self._num_updates = 0
        self._swapped = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts anew, also after a run that was interrupted: without an average, or with one of no updates."""
        self._average_model = None
        self._num_updates = 0
        self._swapped = False
        self._latest_update_step = trainer.global_step
        super().setup(trainer, pl_module, stage)

    def decay_of_update(self, n: int) -> float:
        """Returns the decay of update n ≥ 1."""
        return min(self.decay, (1 + n) / (10 + n)) if self.warm_up else self.decay

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average after an optimiser step, but for one that DivergenceGuard has skipped."""
        is_new_step = trainer.global_step > self._latest_update_step and not step_was_skipped(trainer)
        if is_new_step and self.should_update(step_idx=trainer.global_step - 1):
            self._update(pl_module)
            self._latest_update_step = trainer.global_step

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the average in."""
        self._swap(pl_module, swapped=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the weights back in."""
        self._swap(pl_module, swapped=False)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the weights alone: they were swapped at the start of validation."""

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the weights alone: they are swapped back at the end of validation."""

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Swaps the weights back in if validation failed, before anybody saves them."""
        self._swap(pl_module, swapped=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the weights alone: the last checkpoint is saved after this."""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the module."""
        if self._num_updates > 0:
            self._copy_average_to_current(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drops the average after training: what is evaluated next has weights of its own."""
        if stage == "fit":
            self._average_model = None
            self._num_updates = 0

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the average as ``state_dict`` and the weights as ``current_model_state``."""
        if self._average_model is None or self._num_updates == 0:
            return
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            swapped = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = swapped

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the step of the last update.

        Raises:
            InputError: If it is none.
        """
        require_counts(0, latest_update_step=state_dict.get("latest_update_step"))
        super().load_state_dict(state_dict)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the weights and the average when training resumes; evaluation keeps the average it has loaded."""
        if self._average_model is not None:
            if "averaging_state" in checkpoint:
                require_counts(0, n_averaged=int(checkpoint["averaging_state"]["n_averaged"]))
                super().on_load_checkpoint(trainer, pl_module, checkpoint)
            self._num_updates = int(self._average_model.n_averaged)

    def save_average(self, checkpoint: dict[str, Any]) -> None:
        """Puts the average into a file of weights alone; modules call it, as Lightning tells no callback of these."""
        if self._average_model is not None and self._num_updates > 0 and not self._swapped:
            checkpoint["state_dict"] = self._average_model.module.state_dict()

    def _swap(self, pl_module: LightningModule, *, swapped: bool) -> None:
        if self._average_model is not None and self._num_updates > 0 and swapped != self._swapped:
            self._swap_models(pl_module)
            self._swapped = swapped

    @torch.no_grad()
    def _update(self, pl_module: LightningModule) -> None:
        if self._average_model is None:
            raise RuntimeError("there is no average to update: on_train_batch_end was called outside fit")
        average, n = self._average_model.module, self._num_updates
        averaged, copied = self._pairs(average, pl_module)
        if n == 0:
            copied, averaged = copied + averaged, []
        for target, source in copied:
            target.copy_(source)
        if averaged:
            targets, sources = (list(tensors) for tensors in zip(*averaged, strict=True))
            sources = [s.to(t.device, t.dtype) for s, t in zip(sources, targets, strict=True)]
            torch._foreach_lerp_(targets, sources, 1 - self.decay_of_update(n))
        self._num_updates = n + 1
        self._average_model.n_averaged.fill_(self._num_updates)

    @staticmethod
    def _pairs(
        average: nn.Module, current: nn.Module
    ) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """(average, current) of the tensors to average and of those to copy."""
        averaged: list[tuple[Tensor, Tensor]] = list(zip(average.parameters(), current.parameters(), strict=True))
        copied: list[tuple[Tensor, Tensor]] = []
        for target, source in zip(average.modules(), current.modules(), strict=True):
            pairs = list(zip(target.buffers(recurse=False), source.buffers(recurse=False), strict=True))
            is_norm = isinstance(target, nn.modules.batchnorm._NormBase)
            averaged += [pair for pair in pairs if is_norm and pair[0].is_floating_point()]
            copied += [pair for pair in pairs if not (is_norm and pair[0].is_floating_point())]
        return averaged, copied
