"""What every module does around its equations: optimiser, checks, evaluation, counts, logs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, cast
from uuid import uuid4

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dat_lightning.core.curriculum import AUCCurriculum
from dat_lightning.core.energy import EnergyModel as AnyEnergyModel
from dat_lightning.core.energy import batch_norm_layers, marginal_energy
from dat_lightning.core.errors import InputError, require_kind
from dat_lightning.data.batches import EvaluationEntry, batch_part, only_loader
from dat_lightning.modules.checkpointed import CheckpointedModule
from dat_lightning.modules.checks import (
    check_callbacks,
    check_finite,
    check_first_batch,
    check_layout,
    check_schedules,
)
from dat_lightning.modules.ranks import number_of_ranks
from dat_lightning.speed import Execution, NetworkForms, emulation_warning
from dat_lightning.weights.hub import EnergyModel

Batch = Mapping[str, Tensor]


class TrainedModule(CheckpointedModule):
    """Holds an :class:`~dat_lightning.weights.EnergyModel`, and makes it ready to be trained and evaluated.

    Logged: ``train/network_evaluations``, see :attr:`network_evaluations`.

    Args:
        energy_model: The network.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning rate schedule from the optimiser; ``None`` for a constant rate.
        lr_interval: Whether the schedule counts steps or epochs.
        init_from: Checkpoint or state dict with initial weights, averaged ones preferred, or the name of a model that
            ships; loaded when a Trainer starts, not before, and ignored when a run resumes.
        new_head: Whether the classification head of ``init_from`` may be left out because it has other classes.
        execution: Layout, compiling, folding and precision: how the network is run.

    Raises:
        InputError: If an argument is not of its class.

    Attributes:
        trains_batch_norm: Whether the method is one for batch norm that trains; frozen one is warned of.
        trains_energy: Whether the loss has a term of energies, for which callbacks look out.
        training_parts: The entries of a batch that ``training_step`` looks at; the first batch's are checked.
        evaluation_parts: Those that validation and test look at, likewise.
        curriculum: The number of contrastive steps, in modules that have one; callbacks ask for it.
        network_evaluations: How often training has evaluated the network for an image, since it began and over all
            ranks, to compare methods at equal cost: a forward pass is one, with input gradient two, with gradients of
            the parameters three. What :meth:`count_evaluations` is told of is counted, by rank 0, and taken for that
            of each rank. It is the sum over all steps, and in checkpoints, so that steps and batches of any size share
            one axis.
    """

    trains_batch_norm: bool = False
    trains_energy: bool = False
    training_parts: tuple[str, ...] = ("x_gen", "y_gen", "x_clf", "y_clf", "x_ood")
    evaluation_parts: tuple[str, ...] = ("x", "y")

    def __init__(
        self,
        energy_model: EnergyModel,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "epoch",
        init_from: str | None = None,
        new_head: bool = False,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__()
        require_kind(Execution, execution=execution)
        require_kind(AnyEnergyModel, energy_model=energy_model)
        self.energy_model = energy_model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        # LearningRateFinder writes here what it has found.
        self.lr: float | None = None
        self.init_from = init_from
        self.new_head = new_head
        self.execution = execution
        self.network_forms = NetworkForms(execution.compile, execution.fold_batch_norm)
        self.curriculum: AUCCurriculum | None = None
        self.network_evaluations = 0
        self._training_checked = False
        self._batches: EvaluationEntry | None = None
        if execution.memory_format == "channels_last":
            check_layout(energy_model)
            energy_model.to(memory_format=torch.channels_last)

    @property
    def freezes_batch_norm(self) -> bool:
        """Whether batch norm layers are to stay in eval mode while the module trains; callbacks ask for it."""
        return self.energy_model.batch_norm_frozen

    # For subclasses.

    def evaluation_metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the per-example values, each (N,), whose means validation and test log."""
        raise NotImplementedError

    def part(self, batch: Batch, key: str) -> Tensor:
        """Returns an entry of the batch: float images, or labels as int64.

        Raises:
            InputError: If there is none, whereby the message says which part of the program supplies it, or it has
                another shape or type.
        """
        return batch_part(batch, key, type(self).__name__)

    def draws_of(self, batch: Batch) -> Tensor:
        """Returns the global numbers of a training batch's examples, (N,), which name their random numbers.

        Data that do not number them, as :class:`~dat_lightning.data.PairedDataModule` does, are counted: over the
        batches of the run, also where it resumes, and its ranks. Batches are as large as the loader says, or smaller;
        of a loader that does not say, they need to be of one size.
        """
        if "draw" in batch:
            return batch["draw"]
        size = len(self.part(batch, self.training_parts[0]))
        step, most = 0, size
        if self._is_fitting():
            step = self.trainer.fit_loop.total_batch_idx
            most = getattr(self.trainer.train_dataloader, "batch_size", None) or size
        first = (step * number_of_ranks() + self.global_rank) * most
        return torch.arange(first, first + size)

    def count_evaluations(self, x: Tensor, times: int) -> None:
        """Adds the evaluations of images (N, …), each so many times, to :attr:`network_evaluations`, in training."""
        if self.training:
            self.network_evaluations += len(x) * times * number_of_ranks()

    def log_training(self, scalars: Mapping[str, Tensor], batch_size: int, shown: Collection[str]) -> None:
        """Logs ``train/<name>`` of each scalar.

        Args:
            scalars: By name; rank 0's share of the batch, as a curve is not worth a collective in every step.
            batch_size: Of this rank.
            shown: Names that the progress bar shows.
        """
        # Lightning reads what a bar may show in every step, and waits for the device each time.
        has_bar = self._is_fitting() and self.trainer.progress_bar_callback is not None
        for name, value in scalars.items():
            shows = has_bar and name in shown
            self.log(f"train/{name}", value.detach(), prog_bar=shows, sync_dist=False, batch_size=batch_size)

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Refuses Lightning's callbacks that do not get along with the module.

        Raises:
            InputError: If there is one.
        """
        if stage == "fit":
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            has_schedule = self.lr_scheduler is not None
            check_callbacks(callbacks, freezes_batch_norm=self.freezes_batch_norm, has_schedule=has_schedule)

    def on_fit_start(self) -> None:
        """Loads the initial weights; like its three siblings below, once, and not where a checkpoint was restored.

        Warns if bfloat16 is to be emulated, or batch norm is frozen that should train.

        Raises:
            InputError: If the learning rate schedule is shorter than the training.
        """
        self._load_initial_weights()
        if self.freezes_batch_norm:
            if self.trains_batch_norm:
                rank_zero_warn(
                    f"batch norm of the network is frozen, which {type(self).__name__} trains as a rule: give it an"
                    " EnergyModel of its own, unless you called freeze_batch_norm() for that"
                )
            # Just before on_train_start, which freezes them again, Lightning warns of layers in eval mode.
            for layer in batch_norm_layers(self.energy_model):
                layer.train()
        if self.trainer.ckpt_path is None or self._run_name is None:
            self._run_name = uuid4().hex
            self.network_evaluations = 0
        self._warn_of_emulation()
        check_schedules(self.trainer)

    def on_train_start(self) -> None:
        """Freezes batch norm again, where it is to be frozen."""
        if self.freezes_batch_norm:
            self.energy_model.freeze_batch_norm()

    def on_validation_start(self) -> None:
        """Loads the initial weights; there is one loader."""
        only_loader(self.trainer.val_dataloaders, type(self).__name__)
        self._load_initial_weights()
        if not self._is_fitting():  # where the guard against divergence looks after them
            self._check_weights()

    def on_test_start(self) -> None:
        """Loads the initial weights; there is one loader; warns as in training."""
        only_loader(self.trainer.test_dataloaders, type(self).__name__)
        self._load_initial_weights()
        self._check_weights()
        self._warn_of_emulation()

    def on_predict_start(self) -> None:
        """Loads the initial weights; warns as in training."""
        self._load_initial_weights()
        self._check_weights()
        self._warn_of_emulation()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Checks the values of the first batch, and its labels against the network.

        Raises:
            InputError: If pixels are not in [0, 1], or a label is no integer or not below the number of logits.
        """
        if not self._training_checked and isinstance(batch, Mapping):
            self._check_first_batch({key: batch[key] for key in self.training_parts if key in batch})
            self._training_checked = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs :attr:`network_evaluations`."""
        # Filled in on the device: a number from the host would be waited for.
        count = torch.full((), float(self.network_evaluations), device=self.device)
        self.log("train/network_evaluations", count, on_step=True, on_epoch=False, sync_dist=False)

    def teardown(self, stage: str) -> None:
        """Gives back the memory of the network's faster forms.

        Raises:
            InputError: If there was no loader to evaluate.
        """
        self._training_checked, self._batches = False, None
        self.network_forms.clear()
        # Of no loader Lightning calls no other hook.
        if stage in ("validate", "test"):
            loaders = self.trainer.test_dataloaders if stage == "test" else self.trainer.val_dataloaders
            only_loader(loaders, type(self).__name__)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns the optimiser over all parameters that train, and its schedule.

        Raises:
            InputError: If one of them refuses its arguments.
        """
        try:
            optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        except (TypeError, ValueError) as error:
            raise InputError(f"the optimizer cannot be made as configured: {error}") from error
        for group in optimizer.param_groups if self.lr is not None else ():
            group["lr"] = self.lr
        if self.lr_scheduler is None:
            return optimizer
        try:
            scheduler = self.lr_scheduler(optimizer)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"the learning rate schedule cannot be made as configured: {error}") from error
        schedule: dict[str, object] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if not hasattr(scheduler, "monitor"):
                raise InputError(
                    "lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau does not say what it watches: use"
                    " lightning.pytorch.cli.ReduceLROnPlateau, which has an argument monitor, such as val/loss"
                )
            schedule["monitor"] = scheduler.monitor
        return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": schedule})

    # Without dataloader_idx Lightning refuses several loaders before the hooks that name the remedy.
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Updates the validation metrics."""
        self._evaluate(self._entered(batch, batch_idx, self.trainer.val_dataloaders, self.evaluation_parts), "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Updates the test metrics."""
        self._evaluate(self._entered(batch, batch_idx, self.trainer.test_dataloaders, self.evaluation_parts), "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns ``index``, ``prediction``, ``confidence`` and ``energy`` of each image, (N,) each."""
        batch = self._entered(batch, batch_idx, self.trainer.predict_dataloaders, ("x",))
        logits = self(batch["x"])
        confidence, prediction = logits.softmax(1).max(1)
        return {
            "index": batch["index"],
            "prediction": prediction,
            "confidence": confidence,
            "energy": marginal_energy(logits),
        }

    # Parts.

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> None:
        for name, value in self.evaluation_metrics(batch).items():
            # Lightning weights batches by their size, also over ranks, so the mean is that of one process. Not with an
            # int: the mean of the ranks' sums would be rounded down (_ResultMetric.compute in Lightning's result.py).
            size: Any = torch.tensor(len(value), dtype=torch.float32)
            self.log(f"{stage}/{name}", value.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)

    def _check_weights(self) -> None:
        """Figures of a network that computes NaN look like those of a bad one."""
        try:
            check_finite(self.energy_model.state_dict().items())
        except InputError as error:
            raise InputError(f"there is nothing to evaluate: {error}") from error

    def _warn_of_emulation(self) -> None:
        attacks = {"execution.attack_precision": self.execution.attack_precision}
        warning = emulation_warning({"trainer.precision": str(self.trainer.precision), **attacks}, self.device)
        if warning is not None:
            rank_zero_warn(warning)

    def _entered(self, batch: Any, batch_idx: int, loader: Any, parts: Sequence[str]) -> Batch:
        """An evaluation batch in form; graphs are compiled for whole ones, and values checked of the first."""
        if batch_idx == 0 or self._batches is None:
            self._batches = EvaluationEntry(type(self).__name__, loader, self.trainer, parts, values="first")
        found = self._batches(batch)
        if batch_idx == 0:
            self._check_first_batch({key: found[key] for key in parts})
            # One that follows may have an image more, the last one fewer: PairedDataModule spreads them evenly.
            self.network_forms.expect(len(found["x"]))
            self.network_forms.expect(len(found["x"]) + 1)
        return found

    def _check_first_batch(self, batch: Batch) -> None:
        declared = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        check_first_batch(self.energy_model, batch, type(self).__name__, declared)
