"""KID, Inception score, precision, recall and FID of generated samples, for every step count of the sweep."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.features.fidelity import (
    FeatureCollector,
    Features,
    FidelitySettings,
    Metric,
    Reference,
    check_metrics,
    check_sizes,
    check_values,
    fidelity_scores,
    measurements,
)
from dat_lightning.features.layers import LayerReader
from dat_lightning.results.gathering import all_ranks
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.progress import is_silent, warn_if_spawned
from dat_lightning.sampling.pgd_sampler import SampleConsumer
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan
from dat_lightning.sampling.reference import ReferenceFeatures
from dat_lightning.sampling.sweep import log_sweep, over_sweep

# What each metric's figures are called.
_NAMES: Mapping[Metric, tuple[str, ...]] = {
    "fid": ("fid",),
    "kid": ("kid",),
    "isc": ("inception_score",),
    "prc": ("precision", "recall"),
}


class SampleMetrics(SampleConsumer):
    """Measures generated samples by features, with torch-fidelity's definitions.

    FID is that of float64 moments, which are added up over batches and ranks: for it alone, memory does not grow with
    the number of samples. For the other metrics features of all ranks are put in the order class, then index, in which
    the files of :class:`~dat_lightning.SampleWriter` sort: figures equal those of one process, and those of
    torch-fidelity's own program on these files. They stay in memory, 400 MB for 50 000 samples of 2 048 features and
    each step count. Images become eight bits first, samples by the sampler's ``rounding``.

    Precision and recall of the ADM evaluator (Dhariwal & Nichol 2021) are those here with Inception's layer 2048 and
    its reference ``.npz`` of 10 000 images; torch-fidelity's own default are features of VGG16. FD-DINOv2 is
    ``fid`` with ``TorchFidelityLayers("dinov2-vit-l-14")``.

    Logged: ``{stage}/{prefix}{name}`` with the names ``fid``, ``kid``, ``inception_score``, ``precision`` and
    ``recall``, all after the number of steps that has the lowest FID (without FID, KID; without either, the most
    steps), which is ``{stage}/{prefix}sample_steps``; and ``{stage}/{prefix}{name}_{steps}_steps`` for each.

    Args:
        extractor: Maps uint8 images (N, 3, H, W) to features (N, D), or to a tuple or a dictionary of layers.
        metrics: What to measure: Fréchet distance, kernel distance, Inception score, precision and recall.
        settings: What their definitions leave open.
        reference: Folder of images, ``.npz`` of images (``arr_0``) or of statistics (``mu`` and ``sigma``, for FID
            alone), or one with both, as the ADM evaluator's; by default the DataModule's ``reference_data()``.
        classifier: Maps images in [0, 1] to the logits of the Inception score; by default they are a layer of the
            extractor. It is copied. Take one that the samples were not drawn to please.
        feature_layer: Name of the layer with the features, its position in a tuple; by default the first.
        logit_layer: Name of the layer with the logits; by default ``logits_unbiased`` or ``logits``.
        prefix: Begins the names of figures; two of these callbacks need different ones.
        cache_dir: Where moments and features of ``reference_data()`` are kept, under a key of data, transform and
            extractor; by default ``$XDG_CACHE_HOME/dat_lightning`` or ``~/.cache/dat_lightning``.
        batch_size: Images per pass of the extractor over reference images.

    Attributes:
        figures: Results of the last evaluation, on every rank; those of the chosen number of steps come first.

    Raises:
        InputError: If a metric is unknown; on set-up, if another callback logs the same names or there is no reference;
            when sampling starts, if there are too few images, only statistics where images are needed, or a number of
            the reference is not finite; with a batch, if a layer is missing, or a feature is not finite.
        FileNotFoundError: If there is no ``reference``.

    Source: see :func:`~dat_lightning.features.fidelity.fidelity_scores`.
    """

    # Logged as the number of steps that was chosen.
    _steps_name = "sample_steps"

    def __init__(
        self,
        extractor: nn.Module,
        metrics: Sequence[Metric] = ("fid", "kid", "isc", "prc"),
        settings: FidelitySettings = FidelitySettings(),
        reference: str | None = None,
        classifier: nn.Module | None = None,
        feature_layer: str | None = None,
        logit_layer: str | None = None,
        prefix: str = "",
        cache_dir: str | None = None,
        batch_size: int = 250,
    ) -> None:
        require_at_least(1, batch_size=batch_size)
        if reference is not None and not Path(reference).exists():
            raise FileNotFoundError(f"{type(self).__name__}.reference: no folder or .npz at {reference}")
        self.metrics = check_metrics(metrics)
        self.settings = settings
        self.extractor = extractor.requires_grad_(False).eval()
        self.classifier = None if classifier is None else copy.deepcopy(classifier).requires_grad_(False).eval()
        self.reader = LayerReader(self.extractor, self.classifier, feature_layer, logit_layer, settings.isc_size)
        self.prefix = prefix
        files, cache = (None if path is None else Path(path) for path in (reference, cache_dir))
        self.reference_features = ReferenceFeatures(
            self.reader, self.metrics, files, cache, batch_size, type(self).__name__
        )
        self.figures: list[Measurement] = []
        self._samples: dict[int, FeatureCollector] = {}
        self._reference: Reference | None = None

    # Lightning's and the sampler's hooks.

    @property
    @override
    def logged_names(self) -> set[str]:
        """Names that are logged behind the stage, but for those of single step counts."""
        return {f"{self.prefix}{n}" for n in (self._steps_name, *(n for m in self.metrics for n in _NAMES[m]))}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks for a sampler, a reference and names that are taken, and forgets the reference of earlier data."""
        super().setup(trainer, pl_module, stage)
        self.reference_features.check(trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, SampleMetrics) and other is not self and other.logged_names & self.logged_names:
                raise InputError(
                    f"{type(self).__name__} and another {type(other).__name__} would log the same names: give"
                    f" SampleMetrics another prefix than {self.prefix!r}"
                )
        self._reference = None

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Finds the reference, and checks that there are enough images."""
        for network in (self.extractor, self.classifier):
            if network is not None:
                network.to(pl_module.device)
        if self._reference is None:
            self._reference = self.reference_features.find(trainer, pl_module)
        known = self._reference.features
        check_sizes(self.metrics, self.settings, plan.num_samples, None if known is None else len(known))
        self._samples = {steps: FeatureCollector(self.metrics, pl_module.device) for steps in plan.num_steps}

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Reads the features of this batch."""
        for steps, images in batch.images.items():
            pixels = to_uint8_rgb(images, self.plan.rounding)[:, : images.shape[1]]
            layers = self.reader.read(pixels, with_logits="isc" in self.metrics)
            self._samples[steps].add({"index": batch.indices, "label": batch.labels, **layers})

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the ranks together, and logs the figures."""
        reference = self._reference or Reference()
        mine: dict[int, Features] = {}
        for k, steps in enumerate(self.plan.num_steps):
            samples = self._samples.pop(steps).collected("no samples were generated")
            # On every rank, so that an error meets all of them; the figures themselves are dealt to the ranks.
            check_values(self.metrics, self.settings, samples, reference)
            if k % trainer.world_size == trainer.global_rank:
                mine[steps] = samples
        sweep: dict[int, dict[str, float]] = {}
        for steps in tqdm(list(mine), desc="Measuring samples", leave=False, disable=is_silent(trainer)):
            sweep[steps] = fidelity_scores(self.metrics, self.settings, mine.pop(steps), reference)
        sweep = {steps: scores for part in all_ranks(sweep) for steps, scores in part.items()}
        best = max(sweep)
        for name in ("fid", "kid"):
            if name in sweep[best]:
                best = min(sorted(sweep), key=lambda steps: sweep[steps][name])
                break
        made = {steps: self._measurements(steps, sweep[steps], reference) for steps in sweep}
        self.figures = over_sweep(made, made[best])
        if self.plan.stage == "test":
            warn_if_spawned(trainer, type(self).__name__)
        steps_name, in_bar = f"{self.prefix}{self._steps_name}", f"{self.prefix}fid"
        log_sweep(pl_module, self.plan.stage, self.figures, steps_name, best, in_bar)

    def _measurements(self, steps: int, scores: Mapping[str, float], reference: Reference) -> list[Measurement]:
        """The figures of one number of steps, which is a result of the sweep and stands in the details."""
        layers, plan = self.reader.settings(), self.plan
        cost = {"num_steps": steps, "network_evaluations": plan.network_evaluations[steps]}
        samples = {**plan.settings, "rounding": plan.rounding}
        found = measurements(scores, self.settings, layers, reference, plan.num_samples, samples)
        return [replace(each, name=f"{self.prefix}{each.name}", details={**each.details, **cost}) for each in found]


class FrechetDistance(SampleMetrics):
    """FID alone, :class:`SampleMetrics` with the metric ``fid``, light enough for validation.

    Logged: ``{stage}/fid``, the best over the sweep, ``{stage}/fid_steps``, the step count that it belongs to, and
    ``{stage}/fid_{steps}_steps`` for each. In predict, where nothing is logged, they are printed.

    Args:
        extractor: Maps uint8 images (N, 3, H, W) to features (N, D), or to a tuple or dictionary that begins with them,
            as torch-fidelity's extractors do.
        reference: See :class:`SampleMetrics`.
        cache_dir: See :class:`SampleMetrics`.
        batch_size: Images per pass of the extractor over reference images.

    Raises:
        FileNotFoundError: If there is no ``reference``.

    Source: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6.
    """

    _steps_name = "fid_steps"

    def __init__(
        self, extractor: nn.Module, reference: str | None = None, cache_dir: str | None = None, batch_size: int = 250
    ) -> None:
        super().__init__(extractor, ("fid",), reference=reference, cache_dir=cache_dir, batch_size=batch_size)

    @property
    def scores(self) -> dict[int, float]:
        """Step count → distance, of the last samples."""
        figure = self.figures[0] if self.figures else None
        return {} if figure is None else dict(zip(figure.details["sweep_steps"], figure.details["sweep"], strict=True))
