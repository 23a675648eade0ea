"""Features of the training images: one by one, and as moments of each class."""

import logging
from collections.abc import Collection, Iterator, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from tqdm.auto import tqdm

from dat_lightning.features.gaussian_stats import FeatureMoments, Gaussian, frechet_distance
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.progress import is_silent
from dat_lightning.sampling.frechet import extract_features
from dat_lightning.sampling.reference_images import ReferenceImages, reference_data

_logger = logging.getLogger(__name__)


def training_features(
    trainer: Trainer, pl_module: LightningModule, extractor: nn.Module, batch_size: int, who: str
) -> Iterator[Values]:
    """Yields ``features`` (N, D), float32 on the CPU, with ``y`` and ``index`` (N,) of this rank's training images.

    Rank r has every image i with i mod world size = r; a rank may have none.

    Args:
        trainer: Has the DataModule.
        pl_module: Names the device.
        extractor: Maps uint8 images (N, 3, H, W) to features.
        batch_size: Images per pass.
        who: The callback that asks, for messages.
    """
    data = reference_data(trainer, f"{who} compares with training images:")
    for batch in ReferenceImages(trainer, data, batch_size, who):
        features = extract_features(extractor, batch["x"].to(pl_module.device))
        yield {"index": batch["index"], "y": batch["y"], "features": features.float().cpu()}


def class_gaussians(
    batches: Iterator[Values], classes: Collection[int], dim: int, device: torch.device
) -> dict[int, Gaussian]:
    """Returns mean and covariance of the features of each class, over all ranks; every rank must call it.

    Memory is that of one D×D matrix in float64 per class.

    Args:
        batches: This rank's features with their labels ``y``.
        classes: The classes of interest.
        dim: Number of features D.
        device: Where ranks can add up.

    Returns:
        Class → Gaussian; classes with fewer than two images are missing.
    """
    moments = {label: FeatureMoments(dim) for label in sorted(classes)}
    for batch in batches:
        for label in set(batch["y"].tolist()) & moments.keys():
            moments[label].update(batch["features"][batch["y"] == label])
    gaussians = {}
    for label, mine in moments.items():
        # Sums are kept on the CPU, but NCCL adds up on GPUs alone.
        total = FeatureMoments(dim, "cpu" if device.type == "mps" else device)
        total.merge(mine)
        total.all_reduce()
        if int(total.count) >= 2:
            gaussian = total.gaussian()
            gaussians[label] = Gaussian(gaussian.mean.cpu(), gaussian.covariance.cpu(), gaussian.num_samples)
    return gaussians


def frechet_distances(trainer: Trainer, jobs: Sequence[tuple[Gaussian, Tensor]]) -> list[float]:
    """Returns the Fréchet distance of each job, a Gaussian and the features (N, D), dealt to the ranks in turn.

    Every rank must call it, with the same jobs.
    """
    if not jobs:
        return []
    mine = list(range(trainer.global_rank, len(jobs), trainer.world_size))
    distances = []
    for place in tqdm(mine, desc="Fréchet distances", leave=False, disable=is_silent(trainer)):
        real, features = jobs[place]
        moments = FeatureMoments(features.shape[1])
        moments.update(features)
        distances.append(frechet_distance(real, moments.gaussian()))
    part = {"index": torch.tensor(mine), "distance": torch.tensor(distances, dtype=torch.float64)}
    found: list[float] = gather([part] if mine else [])["distance"].tolist()
    return found
