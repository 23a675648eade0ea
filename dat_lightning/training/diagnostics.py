"""Watches a run for the known ways in which it fails, and says what the cause is and what helps."""

import math
import time
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.curriculum import AUCCurriculum
from dat_lightning.core.errors import InputError, TrainingFailureError, require_choice, require_counts
from dat_lightning.core.jacobian import jacobian_norm
from dat_lightning.core.losses import energy_gradient_norm
from dat_lightning.training.divergence import step_was_skipped
from dat_lightning.training.pace import Pace, Step
from dat_lightning.training.signatures import classifies, curriculum_of, remedy_by_r1, thawed_batch_norm

_GRADIENT = "the energy's gradient at real images, E‖∇ₓE‖²,"


class Diagnostics(Callback):
    """Looks for the failure signatures of joint training every few steps.

    | signature | when |
    |---|---|
    | a loss or an energy is NaN or infinite | stops the run |
    | batch norm in train mode where the module freezes it | stops the run |
    | mean energy beyond ``max_energy`` | stops or warns, see ``action`` |
    | ‖∇ₓE(x)‖² beyond ``max_gradient`` | stops or warns, see ``action`` |
    | T still 0 after ``patience`` steps | warns once |
    | …, and OOD seeds cannot be told from training images | warns once that they may be the same data |
    | steps take several times what the first did, at equal work | warns once, with the likely reason |

    :class:`~dat_lightning.DivergenceGuard` looks at loss and gradients of every step; one that it has skipped
    is not looked at here, nor what it logged. Identical ID and OOD data sets are refused by PairedDataModule before
    training, as far as it looks; the row on OOD seeds is for the rest, and for data of others.
    Logged: ``train/r1``, the mean of ‖∇ₓE(x_gen)‖², in modules that train an energy (``trains_energy``); there
    ``train/jacobian_norm`` too, if it is asked for: the mean of ‖∂f/∂x‖₂ by :func:`~dat_lightning.core.jacobian_norm`.

    Args:
        every_n_steps: Training steps between looks; each costs a host synchronisation and one input gradient.
        patience: Steps that T may stay at 0.
        max_energy: Largest absolute mean energy.
        max_gradient: Largest mean of ‖∇ₓE(x)‖².
        action: What to do about an explosion that is still finite.
        jacobian_images: Of how many images of ``x_gen`` the Jacobian's norm is logged, the first of each rank's batch;
            0 for none. A look at one costs as much as about thirty training passes of it.

    Raises:
        InputError: If a count is no whole number or too small, a limit is not positive, or ``action`` is unknown.
        TrainingFailureError: In training, as said above.

    Source: DAT (arXiv 2510.13872), on the roles of batch norm, of the classification attack and of the OOD data.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        patience: int = 1000,
        max_energy: float = 1e4,
        max_gradient: float = 1e8,
        action: Literal["stop", "warn"] = "stop",
        jacobian_images: int = 0,
    ) -> None:
        require_counts(1, every_n_steps=every_n_steps, patience=patience)
        require_counts(0, jacobian_images=jacobian_images)
        for name, value in {"max_energy": max_energy, "max_gradient": max_gradient}.items():
            if not value > 0:
                raise InputError(f"{name} must be positive, got {value}")
        require_choice(("stop", "warn"), action=action)
        self.every_n_steps = every_n_steps
        self.patience = patience
        self.max_energy = max_energy
        self.max_gradient = max_gradient
        self.action = action
        self.jacobian_images = jacobian_images
        self._warned_stuck = False
        self._last_look = 0
        self._stale: dict[str, Tensor] = {}
        self._skipped_in_epoch = False
        self._pace = Pace()
        self._started = (0.0, 0)
        self._ended: float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run: what it logged, and what it was warned of."""
        self._stale, self._skipped_in_epoch = {}, False
        if stage == "fit":
            self._warned_stuck, self._last_look = False, 0
            self._pace, self._ended = Pace(), None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves aside an epoch's means if one of its steps was skipped."""
        self._ended = None
        if self._skipped_in_epoch:
            self._stale, self._skipped_in_epoch = dict(trainer.callback_metrics), False

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes its time for no step's."""
        self._ended = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes when a step begins."""
        self._started = (time.monotonic(), getattr(pl_module, "network_evaluations", 0))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Looks, if it is time."""
        self._check_pace(pl_module)
        step = trainer.global_step
        if step_was_skipped(trainer):
            # What is NaN there has been dealt with. It stands until the module logs it again, which may be later.
            self._stale, self._skipped_in_epoch = dict(trainer.callback_metrics), True
            return
        # With accumulated gradients several batches belong to a step.
        if step == 0 or step == self._last_look or step % self.every_n_steps:
            return
        self._last_look = step
        curriculum = curriculum_of(pl_module)
        self._check_batch_norm(pl_module)
        self._check_values(self._largest_values(trainer, pl_module, batch), pl_module)
        if curriculum is not None:
            self._check_curriculum(trainer, curriculum)

    def _check_pace(self, pl_module: LightningModule) -> None:
        # By the host's clock: no step waits for a device.
        (started, evaluations), now = self._started, time.monotonic()
        wait = started - (started if self._ended is None else self._ended)
        work = getattr(pl_module, "network_evaluations", evaluations + 1) - evaluations
        self._ended = now
        warning = self._pace.add(Step(wait, now - started + wait, work))
        if warning is not None:
            rank_zero_warn(warning)

    def _largest_values(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
        """Absolute losses, energies and gradient, the largest over ranks, which have to come to one decision."""
        scalars = [(n, v) for n, v in trainer.callback_metrics.items() if not self._is_stale(n, v)]
        values = {n: v for n, v in scalars if n.startswith("train/") and ("loss" in n or "energy" in n)}
        if isinstance(batch, dict) and getattr(pl_module, "trains_energy", False) and "x_gen" in batch:
            with torch.enable_grad(), no_trace(pl_module):
                values[_GRADIENT] = energy_gradient_norm(pl_module, batch["x_gen"]).mean()
                pl_module.log("train/r1", values[_GRADIENT], sync_dist=False)
                if self.jacobian_images:
                    # Not the module, which may run a compiled graph: that has no second derivatives.
                    network, x = getattr(pl_module, "energy_model", pl_module), batch["x_gen"][: self.jacobian_images]
                    pl_module.log("train/jacobian_norm", jacobian_norm(network, x).mean(), sync_dist=False)
        if not values:
            return {}
        # NaN has no place in an order.
        numbers = torch.stack([v.detach().float().abs().to(pl_module.device) for v in values.values()])
        largest = trainer.strategy.reduce(numbers.nan_to_num(nan=math.inf, posinf=math.inf), reduce_op="max")
        return dict(zip(values, largest.tolist(), strict=True))

    def _is_stale(self, name: str, value: Tensor) -> bool:
        # The Trainer gives a new alias at each look, and new memory at each log; ours keeps the old one from reuse.
        return name in self._stale and self._stale[name].data_ptr() == value.data_ptr()

    def _check_batch_norm(self, pl_module: LightningModule) -> None:
        thawed = thawed_batch_norm(pl_module)
        if thawed:
            raise TrainingFailureError(
                f"{thawed} batch norm layers are in train mode, which this module freezes. Real, contrastive and"
                " adversarial images have different statistics, so the energy drifts without bound. Call"
                " energy_model.freeze_batch_norm(), as DualAdversarialModule does, and do not override train()."
            )

    def _check_values(self, values: dict[str, float], pl_module: LightningModule) -> None:
        curriculum, by_r1 = curriculum_of(pl_module), remedy_by_r1(pl_module)
        for name, value in values.items():
            if not math.isfinite(value):
                step = "" if curriculum is None else " or contrastive step"
                raise TrainingFailureError(
                    f"{name} is NaN or infinite in {type(pl_module).__name__}. Mostly the cause is a learning rate"
                    f"{step} too large; lower it and resume from an earlier checkpoint."
                )
            if name.startswith("train/energy_") and "loss" not in name and value > self.max_energy:
                self._act(
                    f"{name} has reached {value:.3g}, beyond {self.max_energy:g}: the energy drifts. Check that batch"
                    f" norm is frozen, lower the learning rate{'' if by_r1 is None else f', or {by_r1}'}."
                )
            if name == _GRADIENT and value > self.max_gradient:
                clean = "This happens where the classification term sees clean images:"
                if by_r1 is None:
                    remedy = f"{clean} lower the learning rate"
                elif classifies(pl_module):
                    remedy = (
                        f"{clean} keep its attack (threat_model.eps > 0), which regularises the gradient, or {by_r1}"
                    )
                else:
                    remedy = f"R1 alone holds it down here: {by_r1}, or lower the learning rate"
                self._act(f"{_GRADIENT} has reached {value:.3g}, beyond {self.max_gradient:g}. {remedy}.")

    def _check_curriculum(self, trainer: Trainer, curriculum: AUCCurriculum) -> None:
        stuck = trainer.global_step >= self.patience and int(curriculum.num_steps) == 0 and curriculum.max_steps > 0
        if not stuck or self._warned_stuck:
            return
        self._warned_stuck = True
        separation = float(trainer.callback_metrics.get("train/auc", torch.tensor(math.nan)))
        message = (
            f"the number of contrastive steps T is still 0 after {trainer.global_step} steps: the AUC"
            f" ({separation:.2f}) does not reach its threshold {curriculum.auc_threshold}, so samples will be poor."
            " Lower auc_threshold or raise the learning rate."
        )
        if 0.4 <= separation <= 0.6:
            message += (
                " OOD seeds cannot be told from training images at all: is the OOD set the training set itself? Use"
                " other images as OOD data."
            )
        rank_zero_warn(message)

    def _act(self, message: str) -> None:
        if self.action == "stop":
            raise TrainingFailureError(message)
        rank_zero_warn(message)
