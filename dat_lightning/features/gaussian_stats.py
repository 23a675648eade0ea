"""Mergeable float64 moments of features, and the Fréchet distance between the Gaussians that they describe."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dat_lightning.core.errors import InputError

_LARGEST_PART = 1 << 30  # bytes; a covariance of 11 000 features
# Features are float32; a distance of larger numbers overflows.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Gaussian:
    """A mean (D,) and a covariance (D, D), both float64, and the number of samples behind them (0: unknown)."""

    mean: Tensor
    covariance: Tensor
    num_samples: int = 0


class FeatureMoments:
    """Count, sum and sum of outer products of feature vectors, in float64: constant memory, exact to merge.

    Args:
        dim: Number of features D.
        device: Where the sums live.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Adds features of shape (N, D).

        Raises:
            InputError: If the shape is another, or a feature is NaN or infinite.
        """
        if features.dim() != 2 or features.shape[1] != len(self.sum):
            raise InputError(f"features must have shape (N, {len(self.sum)}), got {tuple(features.shape)}")
        features = features.detach().to(self.sum)
        if not bool(features.isfinite().all()):
            raise InputError("features must be finite: the images or the extractor produced NaN or infinity")
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: "FeatureMoments") -> None:
        """Adds another accumulator's samples to this one."""
        self.count += other.count.to(self.count)
        self.sum += other.sum.to(self.sum)
        self.outer += other.outer.to(self.outer)

    def all_reduce(self) -> None:
        """Adds up all ranks' samples in place; does nothing without a process group. Every rank has to call it."""
        if dist.is_available() and dist.is_initialized():
            for total in (self.count, self.sum, self.outer):
                dist.all_reduce(total)

    def gaussian(self) -> Gaussian:
        """Returns mean and unbiased covariance.

        Raises:
            InputError: If there are fewer than two samples.
        """
        count = int(self.count)
        if count < 2:
            raise InputError(f"a covariance needs at least 2 samples, got {count}")
        mean = self.sum / count
        covariance = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean, covariance, count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Returns the squared Fréchet distance ‖μ₁−μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), at least 0.

    The trace of the root comes from the symmetric matrix Σ₁^½ Σ₂ Σ₁^½, which has the eigenvalues of Σ₁Σ₂ and keeps them
    real and non-negative also where a covariance is singular.

    Raises:
        InputError: If the two have different numbers of features, or a number is NaN or infinite.

    Source: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6; Dowson & Landau 1982.
    """
    for gaussian in (a, b):
        if not (bool(gaussian.mean.isfinite().all()) and bool(gaussian.covariance.isfinite().all())):
            raise InputError("a Gaussian's mean and covariance must be finite, got NaN or infinity")
    if a.mean.shape != b.mean.shape:
        raise InputError(f"the Gaussians have {len(a.mean)} and {len(b.mean)} features; both need the same extractor")
    mean_a, cov_a = a.mean.cpu().double(), a.covariance.cpu().double()
    mean_b, cov_b = b.mean.cpu().double(), b.covariance.cpu().double()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_root = product.clamp_min(0).sqrt().sum()
    distance = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root)
    if not math.isfinite(distance):
        raise InputError("the Fréchet distance overflows: means or covariances are beyond what a float can hold")
    # Rounding alone makes it negative.
    return max(0.0, distance)


def check_parts(path: Path, archive: zipfile.ZipFile, names: Sequence[str] = ("mu", "sigma")) -> None:
    """Checks arrays of a ``.npz``, which may be compressed, for their size before they are read.

    Raises:
        InputError: If one is larger than any that is read whole here.
    """
    for entry in archive.infolist():
        if entry.filename in {f"{name}.npy" for name in names} and entry.file_size > _LARGEST_PART:
            raise InputError(
                f"{path}: {entry.filename} has {entry.file_size} bytes, and at most {_LARGEST_PART} are read whole"
            )


def read_statistics(path: Path) -> Gaussian:
    """Returns the Gaussian in a ``.npz`` with ``mu`` (D,) and ``sigma`` (D, D), of any real type.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it has no such entries, they do not fit each other, a number is complex, NaN, infinite or beyond
            float32, or a variance is negative.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no statistics file at {path}")
    try:
        # NumPy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            check_parts(path, file.zip)
            raw_mu, raw_sigma = file["mu"], file["sigma"]
    except KeyError as error:
        raise InputError(f"{path} has no entry {error}; expected mu and sigma, as pytorch-fid writes them") from error
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not a readable .npz: {error}") from error
    for name, array in (("mu", raw_mu), ("sigma", raw_sigma)):
        if array.dtype.kind not in "fiu":
            raise InputError(f"{path}: {name} must be real numbers, got {array.dtype}")
    mu, sigma = raw_mu.astype(np.float64), raw_sigma.astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(f"{path}: mu {mu.shape} and sigma {sigma.shape} must have shapes (D,) and (D, D)")
    for name, array in (("mu", mu), ("sigma", sigma)):
        wrong = int((~np.isfinite(array)).sum())
        if wrong:
            raise InputError(f"{path}: {name} must be finite, got NaN or infinity in {wrong} of {array.size} numbers")
        largest = float(np.abs(array).max(initial=0.0))
        if largest > _LARGEST:
            raise InputError(f"{path}: {name} must be statistics of features, got a number of size {largest:.3g}")
    variance = sigma.diagonal()
    # Rounding of sums may leave a feature that never varies a little below zero.
    if variance.min(initial=0.0) < -1e-6 * np.abs(sigma).max(initial=0.0):
        place = int(variance.argmin())
        raise InputError(f"{path}: sigma[{place}, {place}] is a variance, got {variance[place]:.4g}")
    if not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6 * float(np.abs(sigma).max(initial=0.0))):
        raise InputError(f"{path}: sigma must be symmetric, as a covariance is")
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma))
