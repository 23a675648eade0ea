"""Nearest neighbours in feature space, by exact search."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dat_lightning.core.errors import InputError

NeighbourMetric = Literal["L2", "cosine"]


def nearest_neighbours(
    queries: Tensor, pool: Tensor, count: int, metric: NeighbourMetric = "L2", block_size: int = 8192
) -> tuple[Tensor, Tensor]:
    """Returns distances, ascending, in float64, and places in the pool of the nearest vectors, (N, count) on the CPU.

    The search is exact, and goes block by block, on the device of the queries.

    Args:
        queries: Shape (N, D).
        pool: Shape (M, D), M at least ``count``; may be on another device.
        count: Neighbours of each query.
        metric: Euclidean distance, or one minus the cosine.
        block_size: Vectors of the pool that are compared at once.

    Raises:
        InputError: If there are fewer than ``count`` vectors, the numbers of features differ, or one is not finite.
    """
    if len(pool) < count or pool.shape[1] != queries.shape[1]:
        raise InputError(
            f"pool must have at least {count} vectors of {queries.shape[1]} features, got {tuple(pool.shape)}"
        )
    for name, vectors in (("queries", queries), ("pool", pool)):
        if not bool(vectors.isfinite().all()):
            raise InputError(f"{name} must be finite features: the images or the extractor produced NaN or infinity")
    device = torch.device("cpu") if queries.device.type == "mps" else queries.device
    left = _prepared(queries.to(device), metric)
    distances = left.new_empty(len(left), 0)
    places = torch.empty(len(left), 0, dtype=torch.long, device=device)
    for first in range(0, len(pool), block_size):
        right = _prepared(pool[first : first + block_size].to(device), metric)
        block = left.square().sum(1, keepdim=True) + right.square().sum(1) - 2 * left @ right.T
        here = torch.arange(first, first + len(right), device=device).expand(len(left), -1)
        distances, kept = torch.cat([distances, block], 1).topk(min(count, first + len(right)), dim=1, largest=False)
        places = torch.cat([places, here], 1).gather(1, kept)
    distances = distances.clamp_min(0)
    # Of unit vectors, half the squared distance is one minus the cosine.
    distances = distances.sqrt() if metric == "L2" else distances / 2
    return distances.cpu(), places.cpu()


def _prepared(features: Tensor, metric: NeighbourMetric) -> Tensor:
    return F.normalize(features.double(), dim=1) if metric == "cosine" else features.double()
