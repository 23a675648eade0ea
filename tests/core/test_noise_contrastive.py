"""Gaussians with one covariance against scipy, and the constant that is best for a batch."""

import numpy as np
import pytest
import torch
from scipy import optimize, stats  # type: ignore[import-untyped]
from torch import Tensor

from dat_lightning.core import TiedGaussians, best_offset


def images(n: int = 40, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, 1, side, side, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def log_q(x: Tensor, data: Tensor, labels: Tensor, noise: float) -> np.ndarray:
    """Log q by scipy, from means and the mean covariance within classes of NumPy."""
    rows = data.flatten(1).numpy()
    means = [rows[labels.numpy() == k].mean(0) for k in range(3)]
    spread = np.concatenate([rows[labels.numpy() == k] - means[k] for k in range(3)])
    covariance = spread.T @ spread / len(rows) + noise**2 * np.eye(rows.shape[1])
    each = [stats.multivariate_normal(mean, covariance).logpdf(x.flatten(1).numpy()) for mean in means]
    shares = np.log(np.bincount(labels.numpy()) / len(labels))[:, None]
    return np.asarray(np.logaddexp.reduce(shares + np.stack(each)))


def test_log_q_is_that_of_scipy_and_samples_have_its_moments() -> None:
    data, labels = images(60, side=2)
    q = TiedGaussians.fitted(data, labels, 0.1)
    x = torch.randn(30, 1, 2, 2, dtype=torch.float64)
    np.testing.assert_allclose(q.log_prob(x).numpy(), log_q(x, data, labels, 0.1), rtol=1e-10)
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    samples = q.sample(uniform, torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64)).flatten(1)
    rows = data.flatten(1)
    torch.testing.assert_close(samples.mean(0), rows.mean(0), rtol=0, atol=0.01)
    # Within and between classes: the covariance of all images, and that of the noise.
    covariance = torch.cov(rows.T, correction=0) + 0.01 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(samples.T), covariance, rtol=0, atol=0.01)


def test_a_class_of_one_image_is_a_component_of_its_own() -> None:
    data, labels = images(9, side=2)
    labels = torch.tensor([4, 4, 4, 4, 7, 7, 7, 7, 9])
    q = TiedGaussians.fitted(data, labels, 0.1)
    assert q.weights.tolist() == pytest.approx([4 / 9, 4 / 9, 1 / 9])
    torch.testing.assert_close(q.means[2], data[8].flatten())


def test_c_is_the_best_and_that_of_separated_logits_lies_between() -> None:
    a, b = torch.randn(50, dtype=torch.float64) + 300, torch.randn(50, dtype=torch.float64) + 299

    def value(c: float) -> float:
        return float(np.logaddexp(0, -(a.numpy() + c)).sum() + np.logaddexp(0, b.numpy() + c).sum())

    c = float(best_offset(a, b))
    assert c == pytest.approx(optimize.minimize_scalar(value, bracket=(-310, -300, -290), tol=1e-10).x, abs=1e-5)
    assert -1000 < float(best_offset(torch.tensor([1000.0]), torch.tensor([-7.0]))) < 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_samples_nor_log_q_are_those_of_bfloat16(dtype: torch.dtype) -> None:
    data, labels = images(60, side=4)
    q = TiedGaussians.fitted(data, labels, 0.1)
    uniform, normal = torch.rand(8, dtype=dtype), torch.randn(8, 1, 4, 4, dtype=dtype)
    samples = q.sample(uniform, normal)
    assert samples.dtype == dtype
    expected = q.log_prob(samples)
    np.testing.assert_allclose(expected.numpy(), log_q(samples, data, labels, 0.1), rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(q.sample(uniform, normal), samples)
        assert torch.equal(q.log_prob(samples), expected)
