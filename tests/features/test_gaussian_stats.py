import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from dat_lightning.features import FeatureMoments, Gaussian, frechet_distance


def random_features(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return (noise @ mixing + torch.arange(dim)).to(dtype)


def moments(features: Tensor) -> FeatureMoments:
    result = FeatureMoments(features.shape[1])
    result.update(features)
    return result


def oracle(a: Gaussian, b: Gaussian) -> float:
    one, two = ({"mu": g.mean.numpy(), "sigma": g.covariance.numpy()} for g in (a, b))
    return float(fid_statistics_to_metric(one, two, verbose=False)[KEY_METRIC_FID])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_equal_numpy_s_in_float64(dtype: torch.dtype) -> None:
    features = random_features(50, 4, 0, dtype)
    gaussian = moments(features).gaussian()
    exact = features.double().numpy()
    assert gaussian.num_samples == 50
    assert gaussian.mean.dtype == gaussian.covariance.dtype == torch.float64
    np.testing.assert_allclose(gaussian.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(exact, rowvar=False), rtol=1e-11)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 100))
def test_any_split_merges_to_the_whole(cuts: list[int], seed: int) -> None:
    features = random_features(40, 3, seed)
    whole, merged = moments(features), FeatureMoments(3)
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        merged.merge(moments(features[first:last]))
    assert merged.count == 40
    a, b = merged.gaussian(), whole.gaussian()
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-12, atol=1e-12)


def test_without_a_process_group_all_reduce_changes_nothing() -> None:
    result = moments(random_features(5, 2, 0))
    before = (result.count.clone(), result.sum.clone(), result.outer.clone())
    result.all_reduce()
    assert all(map(torch.equal, (result.count, result.sum, result.outer), before))


@pytest.mark.parametrize("dim", [1, 5, 20])
def test_frechet_distance_equals_torch_fidelity_s(dim: int) -> None:
    a, b = (moments(random_features(100, dim, seed)).gaussian() for seed in (0, 1))
    expected = oracle(a, b)
    assert expected > 0.1
    assert math.isclose(frechet_distance(a, b), expected, rel_tol=1e-9)


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form() -> None:
    means, deviations = np.array([[0.0, 1.0, -2.0], [0.5, 1.0, 3.0]]), np.array([[1.0, 0.0, 2.0], [3.0, 0.5, 2.0]])
    a, b = (
        Gaussian(torch.from_numpy(mean), torch.from_numpy(np.diag(deviation**2)))
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert math.isclose(frechet_distance(a, b), expected, rel_tol=1e-12)


def test_fewer_samples_than_features_give_a_real_symmetric_distance() -> None:
    # Covariances of rank 4 in 12 dimensions, where a matrix root by eigenvalues of the product turns complex.
    a, b = (moments(random_features(5, 12, seed)).gaussian() for seed in (0, 1))
    assert np.linalg.matrix_rank(a.covariance.numpy()) == 4
    distance = frechet_distance(a, b)
    assert math.isclose(distance, frechet_distance(b, a), rel_tol=1e-6)
    assert math.isclose(distance, oracle(a, b), rel_tol=1e-4)


def test_rank_one_covariances_have_a_closed_form() -> None:
    # Σ₁ = uuᵀ and Σ₂ = vvᵀ have tr (Σ₁Σ₂)^½ = |u·v|.
    u, v = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([-3.0, 1.0, 1.0]).double()
    a, b = (Gaussian(torch.zeros(3).double(), torch.outer(w, w)) for w in (u, v))
    assert math.isclose(frechet_distance(a, b), 5 + 11 - 2 * abs(-3 + 2), rel_tol=1e-7)


def test_the_distance_to_oneself_is_zero_and_never_negative() -> None:
    for seed in range(5):
        a = moments(random_features(30, 8, seed)).gaussian()
        assert 0 <= frechet_distance(a, a) < 1e-9 * float(a.covariance.trace())


def test_float32_statistics_are_compared_in_float64() -> None:
    a, b = (moments(random_features(60, 4, seed)).gaussian() for seed in (0, 1))
    a32, b32 = (Gaussian(g.mean.float(), g.covariance.float()) for g in (a, b))
    exact = [Gaussian(g.mean.double(), g.covariance.double()) for g in (a32, b32)]
    assert frechet_distance(a32, b32) == frechet_distance(*exact)


@pytest.mark.parametrize("features", [torch.zeros(3), torch.zeros(2, 5), torch.zeros(2, 4, 1)])
def test_features_of_another_shape_are_refused(features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(N, 4\), got"):
        FeatureMoments(4).update(features)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_not_counted(value: float) -> None:
    result = FeatureMoments(2)
    with pytest.raises(ValueError, match="finite"):
        result.update(torch.tensor([[0.0, value]]))
    assert result.count == 0


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        moments(torch.zeros(1, 3)).gaussian()


def test_different_extractors_are_not_compared() -> None:
    a, b = (moments(random_features(9, dim, 0)).gaussian() for dim in (2, 3))
    with pytest.raises(ValueError, match="2 and 3 features"):
        frechet_distance(a, b)
