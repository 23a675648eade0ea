"""KID, Inception score, precision, recall and FID of generated samples, for every step count of the sweep."""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.features.fidelity import (
    FidelitySettings,
    Metric,
    Reference,
    by_class,
    check_metrics,
    check_sizes,
    check_values,
    fidelity_scores,
    measurements,
)
from dat_lightning.features.image_sets import read_images, read_set
from dat_lightning.features.layers import LayerReader
from dat_lightning.results.digests import file_digest, reference_digest
from dat_lightning.results.gathering import Values, all_ranks, gather, on_rank_zero
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.progress import is_silent
from dat_lightning.sampling.frechet import FrechetDistance, default_cache_dir, reference_key
from dat_lightning.sampling.pgd_sampler import SampleBatch, SampleConsumer, SamplingPlan
from dat_lightning.sampling.reference_images import ReferenceImages, reference_data
from dat_lightning.weights.files import written_whole

_logger = logging.getLogger(__name__)


class SampleMetrics(SampleConsumer):
    """Measures generated samples by features, with torch-fidelity's definitions, and keeps :class:`Figure`s.

    Features of all ranks are put in the order class, then index, in which the files of
    :class:`~dat_lightning.SampleWriter` sort: figures equal those of one process, and those of torch-fidelity's own
    program on these files. They stay in memory, 400 MB for 50 000 samples of 2 048 features and each step count;
    :class:`~dat_lightning.FrechetDistance` needs none for FID alone. Images are rounded to eight bits first.

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
        cache_dir: Where features of ``reference_data()`` are kept, under a key made of data, transform and extractor;
            by default ``$XDG_CACHE_HOME/dat_lightning`` or ``~/.cache/dat_lightning``.
        batch_size: Images per pass of the extractor over reference images.

    Attributes:
        figures: Results of the last evaluation, on every rank; those of the chosen number of steps come first.

    Raises:
        InputError: If a metric is unknown; on set-up, if another callback logs the same names; when sampling starts, if
            there are too few images, or only statistics where images are needed; with the first batch, if a layer is
            missing.
        FileNotFoundError: If there is no ``reference``.

    Source: see :func:`~dat_lightning.features.fidelity.fidelity_scores`.
    """

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
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if reference is not None and not Path(reference).exists():
            raise FileNotFoundError(f"SampleMetrics.reference: no folder or .npz at {reference}")
        self.metrics = check_metrics(metrics)
        self.settings = settings
        self.extractor = extractor.requires_grad_(False).eval()
        self.classifier = None if classifier is None else copy.deepcopy(classifier).requires_grad_(False).eval()
        self.reader = LayerReader(self.extractor, self.classifier, feature_layer, logit_layer)
        self.reference = reference
        self.prefix = prefix
        self.cache_dir = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        self.batch_size = batch_size
        self.figures: list[Measurement] = []
        self._values: dict[int, list[Values]] = {}
        self._reference: Reference | None = None
        self._plan: SamplingPlan | None = None

    # Lightning's and the sampler's hooks.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks for a sampler and for names that are taken, and forgets the reference of earlier data."""
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            same = isinstance(other, SampleMetrics) and other is not self and other.prefix == self.prefix
            if same or (isinstance(other, FrechetDistance) and "fid" in self.metrics and not self.prefix):
                raise InputError(
                    f"SampleMetrics and another {type(other).__name__} would log the same names: give it another prefix"
                    f" than {self.prefix!r}"
                )
        self._reference = None

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Finds the reference, and checks that there are enough images."""
        for network in (self.extractor, self.classifier):
            if network is not None:
                network.to(pl_module.device)
        if self._reference is None:
            self._reference = self._find_reference(trainer, pl_module)
        known = self._reference.features
        check_sizes(self.metrics, self.settings, plan.num_samples, None if known is None else len(known))
        self._plan = plan
        self._values = {steps: [] for steps in plan.num_steps}

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Reads the features of this batch."""
        for steps, images in batch.images.items():
            pixels = to_uint8_rgb(images)[:, : images.shape[1]]
            values = self.reader.read(pixels, with_logits="isc" in self.metrics)
            self._values[steps].append({"index": batch.indices.cpu(), "label": batch.labels.cpu(), **values})

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the ranks, and logs the figures."""
        if self._reference is None or self._plan is None:
            raise RuntimeError("samples ended before on_samples_start")
        steps_of = self._plan.num_steps
        mine: dict[int, Values] = {}
        for k, steps in enumerate(steps_of):
            values = gather(self._values.pop(steps), "no samples were generated")
            # On every rank, so that an error meets all of them; the figures themselves are dealt to the ranks.
            check_values(self.metrics, self.settings, values, self._reference)
            if k % trainer.world_size == trainer.global_rank:
                mine[steps] = by_class(values)
        sweep: dict[int, dict[str, float]] = {}
        for steps in tqdm(list(mine), desc="Measuring samples", leave=False, disable=is_silent(trainer)):
            sweep[steps] = fidelity_scores(self.metrics, self.settings, mine.pop(steps), self._reference)
        sweep = {steps: scores for part in all_ranks(sweep) for steps, scores in part.items()}
        self.figures = self._figures(sweep, self._plan)
        best = int(self.figures[0].details["num_steps"])
        stage = self._plan.stage
        if stage == "predict":
            shown = ", ".join(f"{f.name} {f.value:.4g}" for f in self.figures if f.details["num_steps"] == best)
            rank_zero_info(f"Samples after {best} steps: {shown}")
            return
        # The same numbers on every rank, so there is nothing to reduce.
        pl_module.log(f"{stage}/{self.prefix}sample_steps", float(best), sync_dist=False)
        for figure in self.figures:
            pl_module.log(f"{stage}/{figure.name}", figure.value, sync_dist=False)

    # Figures.

    def _figures(self, sweep: Mapping[int, Mapping[str, float]], plan: SamplingPlan) -> list[Measurement]:
        """All figures, those of the chosen number of steps first."""
        best = max(plan.num_steps)
        for name in ("fid", "kid"):
            if name in sweep[best]:
                best = min(plan.num_steps, key=lambda steps: sweep[steps][name])
                break
        reference = self._reference if self._reference is not None else Reference("nothing")
        made: dict[int, list[Measurement]] = {}
        for steps, scores in sweep.items():
            # The number of steps is a result of the sweep, and stands in the details.
            origin = plan.settings
            made[steps] = measurements(scores, self.settings, self.reader, reference, plan.num_samples, origin)

        def cost(steps: int) -> dict[str, int]:
            return {"num_steps": steps, "network_evaluations": plan.network_evaluations[steps]}

        steps_of = sorted(made)
        figures: list[Measurement] = []
        for k, figure in enumerate(made[best]):
            curve = {"sweep_steps": steps_of, "sweep": [made[steps][k].value for steps in steps_of]}
            details = {**figure.details, **cost(best), **curve}
            figures.append(replace(figure, name=f"{self.prefix}{figure.name}", details=details))
        for steps in steps_of:
            for figure in made[steps]:
                details = {**figure.details, **cost(steps)}
                name = f"{self.prefix}{figure.name}_{steps}_steps"
                figures.append(replace(figure, name=name, details=details))
        return figures

    # The reference.

    def _find_reference(self, trainer: Trainer, pl_module: LightningModule) -> Reference:
        if self.metrics == ("isc",):
            return Reference("nothing")
        if self.reference is not None:
            return self._reference_from_file(Path(self.reference), trainer, pl_module)
        need = "SampleMetrics needs reference images: name a folder or .npz as reference, or"
        return self._reference_from_data(reference_data(trainer, need), trainer, pl_module)

    def _reference_from_file(self, path: Path, trainer: Trainer, pl_module: LightningModule) -> Reference:
        images, gaussian = read_set(path)
        features: Tensor | None = None
        if images is not None and (gaussian is None or set(self.metrics) & {"kid", "prc"}):
            share = range(trainer.global_rank, len(images), trainer.world_size)
            values = read_images(
                images, self.reader, share, pl_module.device, self.batch_size, silent=is_silent(trainer)
            )
            features = by_class(gather(values, f"{path} has no images"))["features"]
        digest = on_rank_zero(trainer, lambda: file_digest(path))
        return Reference(str(path), 0 if images is None else len(images), gaussian, features, digest)

    def _reference_from_data(self, data: Any, trainer: Trainer, pl_module: LightningModule) -> Reference:
        name = f"the {len(data.dataset)} images of the DataModule's reference_data()"
        path: Path | None = None
        features: Tensor | None = None
        if trainer.is_global_zero:
            key = f"{reference_key(data, self.extractor)} {self.reader.feature_layer}"
            path = self.cache_dir / f"features-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
            features = _read_features(path)
        # Caches may differ between machines; what rank zero found counts.
        features = trainer.strategy.broadcast(features)
        if features is None:
            images = ReferenceImages(trainer, data, self.batch_size, "SampleMetrics")
            features = self._read(images, pl_module)
            if images.num_skipped() == 0 and path is not None:
                with written_whole(path) as file:
                    np.save(file, features.numpy())
        seen = on_rank_zero(trainer, lambda: reference_digest(data))
        return Reference(name, len(features), None, features, seen)

    def _read(self, images: ReferenceImages, pl_module: LightningModule) -> Tensor:
        values: list[Values] = []
        for batch in images:
            x = batch["x"].to(pl_module.device)
            values.append({"index": batch["index"], **self.reader.read(to_uint8_rgb(x))})
        return gather(values, "reference_data() has no images")["features"]


def _read_features(path: Path) -> Tensor | None:
    """Cached features; ``None`` if there are none, or the file is damaged."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        rank_zero_warn(f"{path} is not a readable .npy: {error}; computing the features anew")
        return None
