"""The Fréchet distance between generated samples and reference data, for every step count of the sweep."""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.features.gaussian_stats import (
    FeatureMoments,
    Gaussian,
    frechet_distance,
    read_statistics,
    write_statistics,
)
from dat_lightning.results.digests import data_digest, digest, network_digest, probe_images
from dat_lightning.sampling.pgd_sampler import SampleBatch, SampleConsumer, SamplingPlan
from dat_lightning.sampling.reference_images import ReferenceImages, reference_data

# Share of reference images that may be corrupt.
_MAX_SKIPPED_SHARE = 0.01


class FrechetDistance(SampleConsumer):
    """Logs the Fréchet distance of generated samples; with Inception features this is FID.

    Feature moments are float64 sums, added up over ranks: memory does not grow with the number of samples, and the
    figure does not depend on who generated which. Images are rounded to eight bits first, as they would be in files.

    Logged: ``{stage}/fid``, the best over the sweep, ``{stage}/fid_steps``, the step count that it belongs to, and
    ``{stage}/fid_{steps}_steps`` for each. :attr:`scores` keeps the last ones; in predict, where nothing is logged,
    they are printed.

    Args:
        extractor: Maps uint8 images (N, 3, H, W) to features (N, D), or to a tuple or dictionary that begins with them,
            as torch-fidelity's extractors do.
        reference: ``.npz`` with ``mu`` (D,) and ``sigma`` (D, D); by default computed from the DataModule's
            ``reference_data()``, the training images.
        cache_dir: Where computed references are kept, under a key made of data, transform and extractor; by default
            ``$XDG_CACHE_HOME/dat_lightning`` or ``~/.cache/dat_lightning``.
        batch_size: Images per pass of the extractor over reference data.

    Raises:
        FileNotFoundError: If there is no file ``reference``.
        InputError: If that file is no statistics file, or has another number of features than the extractor.

    Source: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6.
    """

    def __init__(
        self, extractor: nn.Module, reference: str | None = None, cache_dir: str | None = None, batch_size: int = 250
    ) -> None:
        if reference is not None and not Path(reference).is_file():
            raise FileNotFoundError(f"FrechetDistance.reference: no statistics file at {reference}")
        self.extractor = extractor.requires_grad_(False).eval()
        self.reference = reference
        self.cache_dir = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        self.batch_size = batch_size
        self.scores: dict[int, float] = {}
        self._reference: Gaussian | None = None
        self._moments: dict[int, FeatureMoments] = {}
        self._plan: SamplingPlan | None = None

    def features(self, images: Tensor) -> Tensor:
        """Returns the features (N, D) of images (N, C, H, W) in [0, 1]."""
        return extract_features(self.extractor, images)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks for a sampler, and forgets the reference of earlier data."""
        super().setup(trainer, pl_module, stage)
        self._reference = None

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Finds the reference statistics, which every rank gets, and starts one accumulator per step count."""
        self.extractor.to(pl_module.device)
        if self._reference is None:
            self._reference = self._find_reference(trainer, pl_module)
        dim = len(self._reference.mean)
        self._plan = plan
        self._moments = {steps: _moments_on(pl_module.device, dim) for steps in plan.num_steps}

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Adds the features of this batch."""
        for steps, images in batch.images.items():
            self._moments[steps].update(self.features(images))

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up the ranks, and logs the distances."""
        if self._reference is None or self._plan is None:
            raise RuntimeError("samples ended before on_samples_start")
        for moments in self._moments.values():
            moments.all_reduce()
        scores: dict[int, float] = {}
        if trainer.is_global_zero:
            scores = {s: frechet_distance(self._reference, m.gaussian()) for s, m in self._moments.items()}
        self.scores = trainer.strategy.broadcast(scores)
        self._moments = {}
        best = min(self.scores, key=self.scores.__getitem__)
        stage = self._plan.stage
        if stage == "predict":
            rank_zero_info(f"Fréchet distance of the samples: {self.scores[best]:.4g} after {best} steps")
            return
        # The same number on every rank, so there is nothing to reduce.
        pl_module.log(f"{stage}/fid", self.scores[best], prog_bar=True, sync_dist=False)
        pl_module.log(f"{stage}/fid_steps", float(best), sync_dist=False)
        for steps, score in self.scores.items():
            pl_module.log(f"{stage}/fid_{steps}_steps", score, sync_dist=False)

    # The reference.

    def _find_reference(self, trainer: Trainer, pl_module: LightningModule) -> Gaussian:
        if self.reference is not None:
            return read_statistics(Path(self.reference))
        need = "FrechetDistance needs reference statistics: name a .npz as reference, or"
        data = reference_data(trainer, need)
        path: Path | None = None
        cached: Gaussian | None = None
        if trainer.is_global_zero:
            path = self.cache_dir / f"reference-{reference_key(data, self.extractor)}.npz"
            try:
                cached = read_statistics(path)
            except FileNotFoundError:
                cached = None
            except ValueError as error:
                rank_zero_warn(f"{error}; computing the statistics anew")
        # A Gaussian is a dataclass of tensors, which every strategy can send.
        cached = trainer.strategy.broadcast(cached)
        if cached is not None:
            return cached
        moments, num_skipped = self._reference_moments(data, trainer, pl_module)
        moments.all_reduce()
        gaussian = moments.gaussian()
        if path is not None and num_skipped == 0:
            write_statistics(path, gaussian)
        return gaussian

    def _reference_moments(self, data: Any, trainer: Trainer, pl_module: LightningModule) -> tuple[FeatureMoments, int]:
        """This rank's moments, and how many images were corrupt on all ranks."""
        images = ReferenceImages(trainer, data, self.batch_size, "FrechetDistance")
        moments: FeatureMoments | None = None
        for batch in images:
            features = self.features(batch["x"].to(pl_module.device))
            if moments is None:
                moments = _moments_on(features.device, features.shape[1])
            moments.update(features)
        num_skipped = images.num_skipped()
        if num_skipped > _MAX_SKIPPED_SHARE * len(data.dataset):
            raise InputError(
                f"{num_skipped} of {len(data.dataset)} reference images of the Fréchet distance could not be read; more"
                f" than {_MAX_SKIPPED_SHARE:.0%} make it another reference"
            )
        if moments is None:
            raise InputError(f"{len(data.dataset)} reference images are too few for {trainer.world_size} processes")
        return moments, num_skipped


def extract_features(extractor: nn.Module, images: Tensor) -> Tensor:
    """Returns an extractor's features (N, D) of images (N, C, H, W) in [0, 1], rounded to eight bits first."""
    with torch.no_grad():
        output = extractor(to_uint8_rgb(images))
    if isinstance(output, Mapping):
        output = tuple(output.values())
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features.flatten(1)


def _moments_on(device: torch.device, dim: int) -> FeatureMoments:
    """An empty accumulator: float64 sums cannot live on devices without that type."""
    return FeatureMoments(dim, "cpu" if device.type == "mps" else device)


def default_cache_dir() -> Path:
    """Returns the folder for what may be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dat_lightning"


def reference_key(data: Any, extractor: nn.Module) -> str:
    """Returns a key that changes with the data, the transform or the extractor.

    Names and weights of transform and extractor enter, and so does what they make of sixteen of the images: settings
    that neither shows, such as the body of a function, change that.

    Args:
        data: Has ``dataset`` and ``transform``, as the DataModule's ``reference_data()``.
        extractor: The feature extractor.
    """
    images = probe_images(data)
    features = extract_features(extractor, images.to(_device(extractor))).cpu()
    # A device's last bits do not make another extractor.
    seen = [f"{value:.3e}" for value in features.double().mean(1).tolist()]
    parts: list[str | Tensor] = [
        data_digest(data.dataset),
        repr(data.transform),
        network_digest(extractor),
        to_uint8_rgb(images),
        *seen,
    ]
    return digest([*parts, f"{tuple(features.shape)}"])[:32]


def _device(module: nn.Module) -> torch.device:
    """Where a module's tensors live."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
