"""The LightningModule that both stages share: attack, evaluation, prediction, optimiser, initial weights."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, cast
from uuid import uuid4

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, distributed, nn

from dat_lightning.core.ascent import Ascent, AttackMode, no_trace
from dat_lightning.core.curriculum import AUCCurriculum
from dat_lightning.core.energy import batch_norm_layers, marginal_energy
from dat_lightning.core.errors import InputError
from dat_lightning.core.losses import energy_gradient_norm, is_right, robust_cross_entropy
from dat_lightning.core.objectives import cross_entropy
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.core.update_rules import Steepest, UpdateRule
from dat_lightning.data.batches import EvaluationEntry, batch_part, check_pixels, class_labels
from dat_lightning.speed import Execution, NetworkForms, emulation_warning
from dat_lightning.weights import check_hyperparameters, check_stamp, load_weights, run_of, stamp
from dat_lightning.weights.hub import EnergyModel

Batch = Mapping[str, Tensor]


class EnergyModule(LightningModule):
    """Trains an :class:`~dat_lightning.weights.EnergyModel`; subclasses say how, by their ``training_step``.

    Override points: :meth:`attack_objective` (what the classification attack climbs), :meth:`adversarial_examples`
    (how), :meth:`classification_loss` (what is minimised there), :meth:`evaluation_metrics` (what validation and test
    log).

    Logged: ``{val,test}/{loss, accuracy, robust_accuracy, energy, r1}``; exact over any number of ranks. And
    ``train/network_evaluations``, see :attr:`network_evaluations`.

    Args:
        energy_model: The network.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning rate schedule from the optimiser; ``None`` for a constant rate.
        lr_interval: Whether the schedule counts steps or epochs.
        threat_model: The attack in training.
        eval_threat_model: The attack of ``robust_accuracy``; by default the one in training.
        attack_mode: Whether the attack in training sees the network in eval mode, or in the mode it trains in, where
            batch norm uses the batch's statistics; running statistics never change through an attack.
        attack_rule: How the attack in training makes its steps; the one of evaluation is always steepest.
        init_from: Checkpoint or state dict with initial weights, averaged ones preferred; loaded when a Trainer starts,
            not before, and ignored when a run resumes.
        new_head: Whether the classification head of ``init_from`` may be left out because it has other classes.
        execution: Layout, compiling, folding and precision: how the network is run.
        seed: Seed of random starts.

    Attributes:
        network_evaluations: How often training has evaluated the network for an image, since it began and over all
            ranks, to compare methods at equal cost: a forward pass is one, with input gradient two, with gradients of
            the parameters three. What goes through :meth:`forward` and :meth:`ascend` is counted. It is the sum over
            all steps, and in checkpoints, so that steps and batches of any size share one axis.

    Source: DAT (arXiv 2510.13872); Madry et al. 2018 (arXiv 1706.06083).
    """

    def __init__(
        self,
        energy_model: EnergyModel,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "epoch",
        threat_model: ThreatModel = ThreatModel(),
        eval_threat_model: ThreatModel | None = None,
        attack_mode: AttackMode = "eval",
        attack_rule: UpdateRule = Steepest(),
        init_from: str | None = None,
        new_head: bool = False,
        execution: Execution = Execution(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.energy_model = energy_model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        # LearningRateFinder writes here what it has found.
        self.lr: float | None = None
        self.threat_model = threat_model
        self.eval_threat_model = eval_threat_model or threat_model
        self.attack_mode: AttackMode = attack_mode
        self.attack_rule = attack_rule
        self.init_from = init_from
        self.new_head = new_head
        self.execution = execution
        self.network_forms = NetworkForms(execution.compile, execution.fold_batch_norm)
        # What callbacks ask of a module: this, and freezes_batch_norm.
        self.curriculum: AUCCurriculum | None = None
        self.seed = seed
        self.network_evaluations = 0
        self._initialized = False
        self._training_checked = False
        self._batches: EvaluationEntry | None = None
        self._run_name: str | None = None
        if execution.memory_format == "channels_last":
            self._to_channels_last()

    @property
    def freezes_batch_norm(self) -> bool:
        """Whether batch norm layers are to stay in eval mode while the module trains."""
        return self.energy_model.batch_norm_frozen

    # One method per equation.

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits f(x), (N, K), of images (N, C, H, W) in [0, 1]."""
        self.count_evaluations(x, 3 if torch.is_grad_enabled() else 1)
        logits: Tensor = self.network_forms.for_passes(self.energy_model)(x)
        return logits

    def attack_objective(self, logits: Tensor, y: Tensor) -> Tensor:
        """Returns what the attack on the classification climbs, (N,): the cross-entropy."""
        return cross_entropy(logits, y)

    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the images that :attr:`threat_model` reaches from ``x`` (N, C, H, W), detached.

        Args:
            x: Images in [0, 1].
            y: True labels, (N,).
            draws: Global numbers of the examples, (N,), which name the streams of a random start.
        """
        attack = Ascent(self.attack_objective, self.threat_model, self.attack_rule)
        return self.ascend(attack, x, y, mode=self.attack_mode, draws=draws)

    def ascend(
        self,
        ascent: Ascent,
        x: Tensor,
        y: Tensor,
        *,
        mode: AttackMode = "eval",
        start: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Returns the end of an ascent on the network, shape of ``x``, detached, and counts its evaluations.

        Network, precision and seed are the module's; see :meth:`~dat_lightning.core.Ascent.snapshots` for the rest.
        """
        self.count_evaluations(x, ascent.network_evaluations())
        # A folded form has no train mode.
        network = self.ascent_network() if mode == "eval" else self.network_forms.for_passes(self.energy_model)
        dtype = self.execution.attack_dtype(x.device)
        return ascent(network, x, y, start=start, mode=mode, draws=draws, seed=self.seed, autocast_dtype=dtype)

    def count_evaluations(self, x: Tensor, times: int) -> None:
        """Adds the evaluations of images (N, …), each so many times, to :attr:`network_evaluations`, in training."""
        if self.training:
            self.network_evaluations += len(x) * times * number_of_ranks()

    def ascent_network(self) -> nn.Module:
        """Returns the network that ascents in eval mode climb, in its fastest form, with current weights.

        Raises:
            InputError: If batch norm is to be folded, and cannot be.
        """
        return self.network_forms.for_ascents(self.energy_model)

    def classification_loss(self, logits_adv: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross-entropy at adversarial examples, a scalar."""
        return robust_cross_entropy(logits_adv, y)

    def evaluation_metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the per-example values, each (N,), whose means validation and test log."""
        x, y = self.part(batch, "x"), self.part(batch, "y")
        logits = self(x)
        x_adv = self.ascend(Ascent(cross_entropy, self.eval_threat_model), x, y, draws=batch.get("index"))
        return {
            "loss": cross_entropy(logits, y),
            "accuracy": is_right(logits, y).float(),
            "robust_accuracy": is_right(self(x_adv), y).float(),
            "energy": marginal_energy(logits),
            "r1": self.energy_gradient_norm(x),
        }

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

    def energy_gradient_norm(self, x: Tensor) -> Tensor:
        """Returns ‖∇ₓE(x)‖² of each image, (N,), without a graph; works where gradients are off."""
        with torch.inference_mode(False), torch.enable_grad():
            # Not self: a compiled graph has no second derivatives.
            return energy_gradient_norm(self.energy_model, x.clone()).detach()

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Refuses Lightning's callbacks that do not get along with the module.

        Raises:
            InputError: If there is one.
        """
        callbacks: list[Callback] = self.trainer.callbacks if stage == "fit" else []  # type: ignore[attr-defined]
        if self.freezes_batch_norm and any(isinstance(c, StochasticWeightAveraging) for c in callbacks):
            raise InputError(
                "StochasticWeightAveraging estimates the statistics of batch norm anew, which this module freezes: use"
                " dat_lightning.ExponentialMovingAverage"
            )
        if self.lr_scheduler is not None and any(isinstance(c, LearningRateFinder) for c in callbacks):
            raise InputError(
                "LearningRateFinder finds a constant rate, which lr_scheduler would overwrite: set lr_scheduler to null"
                " while it searches"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes that the weights come from a checkpoint, so that :attr:`init_from` is not needed.

        Raises:
            InputError: If a newer version of this package wrote it, or, where training is to go on, another module.
        """
        if self._is_fitting():
            check_stamp(checkpoint, _class_path(self))
            self._run_name = run_of(checkpoint) or self._run_name
            # Older checkpoints have no count: theirs begins anew.
            self.network_evaluations = int(checkpoint.get("network_evaluations", 0))
        else:
            check_stamp(checkpoint)
        self._initialized = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the number of the checkpoint's format into it, the module's class, and the name of the run.

        Raises:
            InputError: If a hyperparameter is an object, which nobody could read back.
        """
        check_hyperparameters(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        if not self._initialized and self._is_fitting():
            # LearningRateFinder saves before on_fit_start what it goes back to.
            self._load_initial_weights()
            checkpoint["state_dict"] = self.trainer.strategy.lightning_module_state_dict()
        stamp(checkpoint, _class_path(self), self._run_name)
        checkpoint["network_evaluations"] = self.network_evaluations

    def on_fit_start(self) -> None:
        """Loads the initial weights; like its three siblings below, once, and not where a checkpoint was restored.

        Warns if bfloat16 is to be emulated.

        Raises:
            InputError: If the learning rate schedule is shorter than the training.
        """
        self._load_initial_weights()
        if self.freezes_batch_norm:
            # Just before on_train_start, which freezes them again, Lightning warns of layers in eval mode.
            for layer in batch_norm_layers(self.energy_model):
                layer.train()
        if self.trainer.ckpt_path is None or self._run_name is None:
            self._run_name = uuid4().hex
            self.network_evaluations = 0
        self._warn_of_emulation()
        for config in self.trainer.lr_scheduler_configs:
            self._check_cosine(config.scheduler, config.interval)
            total = getattr(config.scheduler, "total_steps", None)
            if total is not None and config.interval == "step" and total < self.trainer.estimated_stepping_batches:
                raise InputError(
                    f"lr_scheduler has total_steps={total}, but trainer.max_epochs and max_steps ask for"
                    f" {self.trainer.estimated_stepping_batches} steps; set total_steps to that"
                )

    def on_train_start(self) -> None:
        """Freezes batch norm again, where it is to be frozen."""
        if self.freezes_batch_norm:
            self.energy_model.freeze_batch_norm()

    def _check_cosine(self, scheduler: object, interval: str) -> None:
        if not isinstance(scheduler, torch.optim.lr_scheduler.CosineAnnealingLR):
            return
        ends = self.trainer.estimated_stepping_batches if interval == "step" else self.trainer.max_epochs
        if ends is not None and 0 < scheduler.T_max < ends < math.inf:
            raise InputError(
                f"lr_scheduler has T_max={scheduler.T_max}, but training has {ends} {interval}s: the rate would rise"
                " again after its minimum; set T_max to that"
            )

    def on_validation_start(self) -> None:
        """Loads the initial weights."""
        self._load_initial_weights()

    def on_test_start(self) -> None:
        """Loads the initial weights; warns as in training."""
        self._load_initial_weights()
        self._warn_of_emulation()

    def on_predict_start(self) -> None:
        """Loads the initial weights; warns as in training."""
        self._load_initial_weights()
        self._warn_of_emulation()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Checks the values of the first batch, and its labels against the network.

        Raises:
            InputError: If pixels are not in [0, 1], or a label is no integer or not below the number of logits.
        """
        if not self._training_checked and isinstance(batch, Mapping):
            self._check_values(batch)
            self._training_checked = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs :attr:`network_evaluations`."""
        # Filled in on the device: a number from the host would be waited for.
        count = torch.full((), float(self.network_evaluations), device=self.device)
        self.log("train/network_evaluations", count, on_step=True, on_epoch=False, sync_dist=False)

    def teardown(self, stage: str) -> None:
        """Gives back the memory of the network's faster forms."""
        self._training_checked, self._batches = False, None
        self.network_forms.clear()

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

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the validation metrics."""
        self._evaluate(self._entered(batch, batch_idx, self.trainer.val_dataloaders), "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the test metrics."""
        self._evaluate(self._entered(batch, batch_idx, self.trainer.test_dataloaders), "test")

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

    def _is_fitting(self) -> bool:
        try:
            return self.trainer.state.fn is TrainerFn.FITTING
        except RuntimeError:  # as in load_from_checkpoint there is no Trainer
            return False

    def _load_initial_weights(self) -> None:
        if not self._initialized and self.init_from is not None:
            loaded = load_weights(self.energy_model, self.init_from, new_head=self.new_head)
            rank_zero_info(f"weights from {self.init_from}: {loaded}")
        self._initialized = True

    def _warn_of_emulation(self) -> None:
        attacks = {"execution.attack_precision": self.execution.attack_precision}
        warning = emulation_warning({"trainer.precision": str(self.trainer.precision), **attacks}, self.device)
        if warning is not None:
            rank_zero_warn(warning)

    def _entered(self, batch: Any, batch_idx: int, loader: Any, parts: Sequence[str] = ("x", "y")) -> Batch:
        """An evaluation batch in form; graphs are compiled for whole ones, and values checked of the first."""
        if batch_idx == 0 or self._batches is None:
            self._batches = EvaluationEntry(type(self).__name__, loader, self.trainer, parts, values="first")
        found = self._batches(batch)
        if batch_idx == 0:
            self._check_values(found)
            # One that follows may have an image more, the last one fewer: PairedDataModule spreads them evenly.
            self.network_forms.expect(len(found["x"]))
            self.network_forms.expect(len(found["x"]) + 1)
        return found

    def _to_channels_last(self) -> None:
        named = [*self.energy_model.named_parameters(), *self.energy_model.named_buffers()]
        wrong = next((name for name, tensor in named if tensor.dim() == 5), None)
        if wrong is not None:
            raise InputError(
                f"{wrong} of the network has five dimensions, which the layout channels_last has no place for: set"
                " execution.memory_format to contiguous"
            )
        self.energy_model.to(memory_format=torch.channels_last)

    def _check_values(self, batch: Batch) -> None:
        """Looks at values, which waits for a device; an error says so before a GPU fails on a label too large."""
        for key in ("x", "x_gen", "x_clf", "x_ood"):
            if key in batch:
                check_pixels(batch[key], f"{key} of {type(self).__name__}", allow_nan=True)
        declared = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        parts = [name for name in ("", "_gen", "_clf") if f"x{name}" in batch and f"y{name}" in batch]
        for name in parts:
            with torch.no_grad(), no_trace(self.energy_model):
                num_classes = self._first_logits(batch[f"x{name}"]).shape[1]
            if isinstance(declared, int) and declared > num_classes:
                raise InputError(
                    f"the network has {num_classes} logits, but the data have {declared} classes: set the backbone's"
                    " num_classes to that"
                )
            labels = class_labels(batch[f"y{name}"], f"y{name} of {type(self).__name__}")
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise InputError(
                    f"the network has {num_classes} logits, but y{name} has labels {int(labels.min())} …"
                    f" {int(labels.max())}: set the backbone's num_classes to the number of classes of the data"
                )

    def _first_logits(self, x: Tensor) -> Tensor:
        """Logits of the first images, or a sentence if the network cannot take them, or gives something else."""
        try:
            logits: Tensor = self.energy_model(x[:2])
        except RuntimeError as error:
            # Out of memory is another matter, as are errors of devices.
            if isinstance(error, torch.OutOfMemoryError) or "size" not in str(error).lower():
                raise
            shape = "×".join(str(n) for n in x.shape[1:])
            first = str(error).splitlines()[0]
            raise InputError(
                f"the network cannot take the data's images of {shape} (channels, height, width): {first}; set the"
                " backbone's in_channels and the data's image_size to what goes together"
            ) from error
        network = type(self.energy_model.backbone).__name__
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise InputError(f"the network {network} must return logits, a tensor (N, K), got {found}")
        values = logits.float()
        constant = {"log_softmax": values.exp().sum(1), "softmax": values.sum(1) + (values < 0).any(1)}
        for ending, totals in constant.items() if logits.shape[1] > 1 else ():
            if bool(((totals - 1).abs() < 1e-4).all()):
                raise InputError(
                    f"the network {network} seems to end in {ending}, which leaves no energy: let it return logits"
                )
        return logits

    def part(self, batch: Batch, key: str) -> Tensor:
        """Returns an entry of the batch: float images, or labels as int64.

        Raises:
            InputError: If there is none, whereby the message says which part of the program supplies it, or it has
                another shape or type.
        """
        return batch_part(batch, key, type(self).__name__)

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> None:
        for name, value in self.evaluation_metrics(batch).items():
            # Lightning weights batches by their size, also over ranks, so the mean is that of one process. Not with an
            # int: the mean of the ranks' sums would be rounded down (_ResultMetric.compute in Lightning's result.py).
            size: Any = torch.tensor(len(value), dtype=torch.float32)
            self.log(f"{stage}/{name}", value.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)


def number_of_ranks() -> int:
    """Returns how many processes train together; one where there is no Trainer."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _class_path(module: EnergyModule) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
