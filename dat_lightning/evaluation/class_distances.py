"""Fréchet distances of counterfactuals to the training images of their class, shared out over the ranks."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from dat_lightning.features.gaussian_stats import FeatureMoments, Gaussian, frechet_distance
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.progress import is_silent

Target = Literal["next", "uniform", "all"]

ClassDistances = dict[int, tuple[float, int, int]]
"""Class → Fréchet distance, number of counterfactuals, number of training images."""


def class_distances(
    trainer: Trainer,
    pl_module: LightningModule,
    batches: Iterator[Values],
    targets: Mapping[Target, Tensor],
    features: Mapping[tuple[Target, int], Tensor],
    min_images: int,
) -> dict[tuple[Target, int], tuple[ClassDistances, list[int]]]:
    """Returns, for each search, the Fréchet distance of each target class to its training images, and what is left out.

    Every rank must call it, with the same targets and features.

    Args:
        trainer: Deals the distances to the ranks.
        pl_module: Names the device.
        batches: This rank's training features.
        targets: How they were chosen → targets (N, T).
        features: How targets were chosen, and number of the radius → features (N, T, D).
        min_images: Images that a class needs on both sides.
    """
    counts = {kind: Counter(column.flatten().tolist()) for kind, column in targets.items()}
    wanted = {label for count in counts.values() for label, n in count.items() if n >= min_images}
    dim = next(iter(features.values())).shape[-1]
    real = class_gaussians(batches, wanted, dim, pl_module.device) if wanted else {}
    real = {label: gaussian for label, gaussian in real.items() if gaussian.num_samples >= min_images}
    classes = {kind: [label for label in sorted(real) if count[label] >= min_images] for kind, count in counts.items()}
    jobs = [(key, label) for key in features for label in classes[key[0]]]
    values = frechet_distances(trainer, [(real[label], features[key][targets[key[0]] == label]) for key, label in jobs])
    found: dict[tuple[Target, int], tuple[ClassDistances, list[int]]] = {
        key: ({}, sorted(counts[key[0]].keys() - set(classes[key[0]]))) for key in features
    }
    for (key, label), value in zip(jobs, values, strict=True):
        found[key][0][label] = (value, counts[key[0]][label], real[label].num_samples)
    for kind, count in counts.items():
        missing = sorted(count.keys() - set(classes[kind]))
        if missing:
            rank_zero_warn(
                f"Counterfactuals: {len(missing)} of {len(count)} target classes ({kind}) have fewer than"
                f" min_class_images={min_images} images and no Fréchet distance, the first: {missing[:10]}"
            )
    return found


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
