"""Generation: one class-balanced set of images per evaluation, from one chain, handed to whoever consumes samples."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.ascent import AUTOCAST_DTYPES, Ascent, Logits, Precision, unbounded_ascent
from dat_lightning.core.energy import first_weight
from dat_lightning.core.errors import InputError, require_choice, require_counts, require_kind
from dat_lightning.core.objectives import targeted_logit
from dat_lightning.core.update_rules import Steepest, UpdateRule
from dat_lightning.data.batches import logits_of, require_finite
from dat_lightning.data.draws import OrderedStream
from dat_lightning.data.pixels import Rounding
from dat_lightning.results.gathering import Values
from dat_lightning.results.kept_values import KeptValues
from dat_lightning.results.measurement import canonical
from dat_lightning.results.progress import is_silent
from dat_lightning.sampling.monitors import check_monitors
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan, Stage, checked_stages
from dat_lightning.sampling.seed_batches import SeedBatches
from dat_lightning.speed.network_forms import CompiledNetwork, NetworkForms

# Loader processes for seeds, of which a chain takes seconds to use up a batch; those of training stay beside them.
_MAX_WORKERS = 4


class SampleConsumer(Callback):
    """A callback that receives generated samples from the :class:`PGDSampler` of the same Trainer.

    Override :meth:`on_samples_start`, :meth:`on_samples_batch` and :meth:`on_samples_end`. Each rank gets its own
    batches, not equally many; collectives belong in the first and the last of these, which every rank enters once.

    Attributes:
        stages: The evaluations whose samples it receives.
        plan: What is being sampled, from :meth:`on_samples_start` on.

    Raises:
        InputError: On set-up, if the Trainer has no sampler.
    """

    stages: Sequence[Stage] = ("val", "test", "predict")
    plan: SamplingPlan

    @property
    def logged_names(self) -> set[str] | None:
        """Names that are logged behind the stage, but for those of single step counts; ``None`` does not say."""
        return None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that somebody generates samples."""
        if not any(isinstance(c, PGDSampler) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise InputError(f"{type(self).__name__} consumes samples: add a PGDSampler to trainer.callbacks")

    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Called on every rank before the first batch."""

    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Called with every finished batch of this rank."""

    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called on every rank after the last batch."""


class PGDSampler(Callback):
    """Generates class-balanced images at the end of validation, test and predict.

    Sample i has class i mod K and the i-th held-out OOD seed, and climbs f(x)[class] by unbounded L2 steps; it is the
    same for any batch size and number of ranks (bitwise where batches are composed alike). Whole batches are dealt to
    the ranks in turn. The chain is walked once, with a snapshot at each of ``num_steps``, and every
    :class:`SampleConsumer` of the Trainer sees each finished batch. Weights are those that evaluation uses, the
    averaged ones under :class:`~dat_lightning.training.ExponentialMovingAverage`.

    The LightningModule may be any that maps images in [0, 1] to logits. Seeds come from the DataModule's
    ``held_out_seeds()``; if it has ``num_workers``, so many loader processes read them while chains are walked.

    A network that gives NaN has no samples, and no figure is made of them: that is an error at once, in the validation
    of a training as well. Nothing would rescue such a run, for what
    :class:`~dat_lightning.training.DivergenceGuard` lets go on has kept its weights finite.

    Logged: ``val/network_evaluations_{steps}_steps``, the cost of one sample; the plan has it for consumers.

    With a ``dirpath``, generation that was interrupted goes on where it stopped: batches that were finished are read,
    and consumers see them as if they were new. Override :meth:`settings` where a subclass has more of them.

    Args:
        num_samples: Samples over all ranks.
        num_steps: Step counts of the sweep.
        step_size: L2 length of a step.
        batch_size: Samples per batch and rank.
        every_n_epochs: During fit, sample after each n-th epoch only. Where a checkpoint or early stopping monitors
            what samples give, set the Trainer's ``check_val_every_n_epoch`` instead.
        stages: The evaluations that sample.
        precision: Precision of the chain's passes; by default the Trainer's.
        dirpath: Folder that keeps finished batches of test and predict until all consumers of all ranks are done;
            validation keeps nothing, and neither does ``None``. N samples of C×H×W values take N · C·H·W · 4 bytes for
            each step count: 0.6 GB for 50 000 of 3×32×32, 39 GB at 3×256×256. Any number of ranks can go on, if they
            share the folder. Other weights, seeds or settings, number of samples and batch size among them, start anew;
            what was kept then stays until the test that was interrupted is whole.
        rule: How steps are made; a frozen dataclass of primitives.
        rounding: How samples become eight-bit pixels, in files and for features alike: ``nearest``, the nearest of 256
            levels, or ``truncate``, 255·x cut, as the paper's published code does. Reference images keep their levels.

    Raises:
        InputError: If a number is outside its range, the rule is no such dataclass, or ``rounding`` is unknown; when
            training begins, if a callback or a schedule monitors what samples give and there are none after some
            validations.
        InputError: On set-up, if the DataModule has no held-out seeds; when sampling starts, if a setting is no
            primitive; with a batch, if the network gives no finite logits (N, K), or a sample is NaN.
        OSError: With a batch, if it cannot be kept.

    Source: DAT (arXiv 2510.13872), on generation.
    """

    def __init__(
        self,
        num_samples: int = 1000,
        num_steps: Sequence[int] = (10, 20, 40),
        step_size: float = 0.2,
        batch_size: int = 250,
        every_n_epochs: int = 1,
        stages: Sequence[Stage] = ("val", "test", "predict"),
        precision: Precision | None = None,
        dirpath: str | None = None,
        rule: UpdateRule = Steepest(),
        rounding: Rounding = "nearest",
    ) -> None:
        require_counts(1, num_samples=num_samples, batch_size=batch_size, every_n_epochs=every_n_epochs)
        require_kind(UpdateRule, rule=rule)
        if not num_steps or any(not hasattr(steps, "__index__") or steps < 0 for steps in num_steps):
            raise InputError(f"num_steps must be step counts of at least 0, got {list(num_steps)}")
        require_choice(get_args(Rounding), rounding=rounding)
        require_choice(tuple(AUTOCAST_DTYPES), precision=precision)
        self.num_samples = num_samples
        self.num_steps = tuple(sorted(set(num_steps)))
        self.chain = unbounded_ascent(step_size, max(num_steps))
        self.rule = _checked_rule(rule)
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.stages = checked_stages(stages)
        self.precision = precision
        self.dirpath = dirpath
        self.rounding = rounding

    def settings(self) -> dict[str, Any]:
        """Returns the primitives on which samples depend, beside the network, its precision and the seeds."""
        steps = {"chain": self.chain, "rule": self.rule, "num_steps": list(self.num_steps)}
        return {**steps, "precision": self.precision}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there are seeds to start from, and that consumers have one source of samples."""
        samplers = [type(c).__name__ for c in trainer.callbacks if isinstance(c, PGDSampler)]  # type: ignore[attr-defined]
        if len(samplers) > 1:
            raise InputError(
                f"trainer.callbacks has {' and '.join(samplers)}: every consumer would see the samples of both, and log"
                " their mean; sample them in runs of their own"
            )
        if not callable(getattr(trainer.datamodule, "held_out_seeds", None)):  # type: ignore[attr-defined]
            raise InputError(
                "PGDSampler needs a DataModule with held_out_seeds(), which gives a function from the sample's index to"
                " (image, label or None), as PairedDataModule has it"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that nobody waits for samples in an epoch without; schedules are not there before."""
        logged: set[str] = set()
        never: set[str] = set()
        silent: set[str] = set()
        for consumer in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(consumer, SampleConsumer):
                names, sampled = consumer.logged_names, "val" in self.stages and "val" in consumer.stages
                (logged if sampled else never).update(names or (), ("network_evaluations",))
                if sampled and names is None:
                    silent.add(type(consumer).__name__)
        check_monitors(trainer, self.every_n_epochs, logged, never, silent)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples, unless this is the sanity check or an epoch in between."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0 or trainer.state.fn != "fit"
        if due and not trainer.sanity_checking:
            self.sample(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples."""
        self.sample(trainer, pl_module, "test")

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples."""
        self.sample(trainer, pl_module, "predict")

    def sample(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Generates the set and feeds the consumers; does nothing if the stage is not asked for or nobody wants it."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        consumers = [c for c in callbacks if isinstance(c, SampleConsumer) and stage in c.stages]
        if stage not in self.stages or not consumers:
            return
        like = first_weight(pl_module, torch.empty(0, device=pl_module.device))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        chunks = list(self._chunks(trainer.global_rank, trainer.world_size))
        workers = min(_MAX_WORKERS, getattr(data, "num_workers", None) or 0)
        source = data.held_out_seeds()
        seeds = SeedBatches(source, chunks, like, workers)
        with torch.no_grad():
            logits = logits_of(pl_module, seeds.first.unsqueeze(0).to(like), "PGDSampler")
        require_finite(logits, "PGDSampler")
        num_classes = logits.shape[1]
        if isinstance(source, OrderedStream):
            self._check_enough(source.size, num_classes)
        evaluations = {steps: self.ascent.network_evaluations(steps) for steps in self.num_steps}
        plan = SamplingPlan(
            stage,
            num_samples=self.num_samples,
            num_classes=num_classes,
            num_steps=self.num_steps,
            step_size=self.chain.step_size,
            rule=self.rule,
            network_evaluations=evaluations,
            rounding=self.rounding,
            seeds=getattr(data, "seed_settings", {}),
        )
        if stage == "val":
            for steps, count in evaluations.items():
                name = f"val/network_evaluations_{steps}_steps"
                pl_module.log(name, torch.full((), float(count), device=pl_module.device), sync_dist=False)
        for consumer in consumers:
            consumer.plan = plan
            consumer.on_samples_start(trainer, pl_module, plan)
        # A faster form of the same function, where the module has one.
        network: Logits = getattr(pl_module, "ascent_network", lambda: pl_module)()
        forms = _network_forms(pl_module)
        if forms is not None:
            forms.expect(min(self.batch_size, self.num_samples), ("ascents",))
        kept = self._kept_values(trainer, pl_module, network, stage)
        # Closed, so that an error here ends the loader processes.
        with closing(iter(seeds)) as batches:
            for indices in tqdm(chunks, desc="Generating", leave=False, disable=is_silent(trainer)):
                images = next(batches)
                with trainer.precision_plugin.forward_context():
                    batch = self._generate_or_read(kept, pl_module, network, images, torch.tensor(indices), num_classes)
                _check_finite(batch)
                for consumer in consumers:
                    consumer.on_samples_batch(trainer, pl_module, batch)
        for consumer in consumers:
            consumer.on_samples_end(trainer, pl_module)
        if kept is not None:
            # Not before the slowest rank is done, and not while a fast one begins the next set.
            trainer.strategy.barrier("PGDSampler.end")
            if chunks:
                shutil.rmtree(kept.own_folder(pl_module), ignore_errors=True)
            trainer.strategy.barrier("PGDSampler.removed")

    def _check_enough(self, num_seeds: int, num_classes: int) -> None:
        """Seed i and class i mod K, of seeds without an augmentation, come back together after lcm(N, K) samples."""
        different = math.lcm(num_seeds, num_classes)
        if different < self.num_samples:
            raise InputError(
                f"PGDSampler: {self.num_samples} samples cannot be different ones: under seed_transform 'squash' each"
                f" of the {num_seeds} held-out images is one seed, and there are {different} pairs of seed and class;"
                " lower num_samples, raise num_held_out, or let seeds be augmented"
            )

    @property
    def ascent(self) -> Ascent:
        """What is climbed, and how."""
        return Ascent(targeted_logit, self.chain, self.rule)

    def generate(self, logits: Logits, seeds: Tensor, indices: Tensor, num_classes: int) -> SampleBatch:
        """Returns the samples with the given global indices (N,) from their seeds (N, C, H, W)."""
        labels = (indices % num_classes).to(seeds.device)
        dtype = AUTOCAST_DTYPES[self.precision]
        images = self.ascent.snapshots(logits, seeds, labels, self.num_steps, draws=indices, autocast_dtype=dtype)
        return SampleBatch(indices, labels, seeds, images)

    def _chunks(self, rank: int, world_size: int) -> Iterator[list[int]]:
        """This rank's batches of indices: the same batches for any number of ranks, dealt in turn."""
        for first in range(rank * self.batch_size, self.num_samples, world_size * self.batch_size):
            yield list(range(first, min(first + self.batch_size, self.num_samples)))

    def _kept_values(
        self, trainer: Trainer, pl_module: LightningModule, network: Logits, stage: Stage
    ) -> KeptValues | None:
        """Where batches of this evaluation are kept, if they are."""
        if self.dirpath is None or stage == "val":
            return None
        # A network that is folded for speed has the weights of the module, and other last bits.
        climbed = [f"{type(part).__module__}.{type(part).__qualname__}" for part in _forms_of(network)]
        # The size of set and batches enters, so that a folder holds one set, and goes with it.
        sizes = {"num_samples": self.num_samples, "batch_size": self.batch_size}
        forms = _network_forms(pl_module)
        passes = {
            "climbed": climbed,
            "compile": None if forms is None else forms.compile,
            "trainer_precision": str(trainer.precision),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
        settings = {**self.settings(), **sizes, **passes}
        return KeptValues(Path(self.dirpath), f"{type(self).__module__}.{type(self).__qualname__}", settings)

    def _generate_or_read(
        self,
        kept: KeptValues | None,
        pl_module: LightningModule,
        network: Logits,
        seeds: Tensor,
        indices: Tensor,
        num_classes: int,
    ) -> SampleBatch:
        """A batch from its file, or else generated, and kept if batches are."""
        if kept is None:
            return self.generate(network, seeds, indices, num_classes)

        def compute(batch: Mapping[str, Tensor]) -> Values:
            made = self.generate(network, seeds, indices, num_classes)
            images = {f"images_{steps}": _storable(images) for steps, images in made.images.items()}
            return {"labels": made.labels.cpu(), **images}

        values = kept.get_or_compute(pl_module, {"x": seeds, "index": indices}, compute, "samples")
        # A new batch goes the same way as one that was read, so that they cannot differ.
        images = {steps: values[f"images_{steps}"].to(seeds) for steps in self.num_steps}
        return SampleBatch(indices, values["labels"].to(seeds.device), seeds, images)


def _checked_rule(rule: UpdateRule) -> UpdateRule:
    """The rule, of which settings must tell class and fields; a dataclass's subclass hides its own unless it is one."""
    if "__dataclass_fields__" not in vars(type(rule)):
        raise InputError(f"rule must be a frozen dataclass, by whose fields samples are told apart, got {rule!r}")
    try:
        canonical({"rule": rule})
    except TypeError as error:
        raise InputError(f"the fields of rule={rule!r} must be numbers, strings or the like: {error}") from error
    return rule


def _check_finite(batch: SampleBatch) -> None:
    """Raises an InputError if a sample is NaN: eight-bit images would have it black, and figures look good."""
    for steps, images in batch.images.items():
        wrong = ~images.flatten(1).isfinite().all(1)
        if bool(wrong.any()):
            raise InputError(
                f"PGDSampler: sample {int(batch.indices[wrong.cpu()][0])} is NaN after {steps} steps, and"
                f" {int(wrong.sum())} of the {len(wrong)} samples in its batch are: the network gives gradients that"
                " are not finite"
            )


def _network_forms(pl_module: LightningModule) -> NetworkForms | None:
    """Those of this package's modules; others have none."""
    forms = getattr(pl_module, "network_forms", None)
    return forms if isinstance(forms, NetworkForms) else None


def _forms_of(network: Logits) -> list[object]:
    """The network as it is climbed, and what a compiled graph was made from."""
    return [network, network.network] if isinstance(network, CompiledNetwork) else [network]


def _storable(images: Tensor) -> Tensor:
    """Images as NumPy's files take them, without loss."""
    images = images.detach().cpu().contiguous()
    return images.float() if images.dtype == torch.bfloat16 else images
