from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dat_lightning.core import Norm, ThreatModel, project, random_start, steepest_step, vanishes

NORMS: tuple[Norm, ...] = ("L2", "Linf")
radii = st.one_of(st.just(0.0), st.just(float("inf")), st.floats(1e-6, 10))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# None, too small for float16, usual, beyond float16, beyond float32, none at all.
any_radius = st.one_of(st.floats(1e-3, 30), st.sampled_from([0.0, 1e-30, 1e-12, 1e5, 1e300, float("inf")]))


@st.composite
def centers_and_points(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], some of them at the border of the box, and points that may lie far outside of it."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    center = (torch.rand(shape, generator=generator, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    far = draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
    return center, center + far * torch.randn(shape, generator=generator, dtype=torch.float64)


def distances(x: Tensor, center: Tensor, norm: Norm) -> np.ndarray:
    delta = np.abs((x - center).numpy().reshape(len(x), x.shape[1:].numel()))
    return np.asarray(np.sqrt((delta**2).sum(1)) if norm == "L2" else delta.max(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "L1"}, "norm .* 'L1'"),
        ({"eps": -0.1}, "eps .* -0.1"),
        ({"eps": float("nan")}, "eps .* nan"),
        ({"step_size": -1.0}, "step_size .* -1"),
        ({"step_size": float("inf")}, "step_size .* inf"),
        ({"step_size": float("nan")}, "step_size .* nan"),
        ({"num_steps": -1}, "num_steps .* -1"),
        ({"eps": float("inf"), "random_start": True}, "random_start needs a finite eps"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(**arguments)


def test_the_default_is_the_attack_on_cifar() -> None:
    assert ThreatModel() == ThreatModel(norm="L2", eps=0.5, step_size=0.1, num_steps=10, random_start=False)


def test_l2_step_is_the_gradient_over_its_norm_plus_1e_10() -> None:
    # Lengths 0, 2e-8, which feels the constant that keeps the division finite, and 5.
    gradient = torch.tensor([[[0.0, 0.0]], [[2e-8, 0.0]], [[3.0, -4.0]]], dtype=torch.float64)
    expected = [[[0.0, 0.0]], [[2e-8 / (2e-8 + 1e-10), 0.0]], [[3 / (5 + 1e-10), -4 / (5 + 1e-10)]]]
    np.testing.assert_allclose(steepest_step(gradient, "L2").numpy(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ordinary_l2_step_has_the_bits_of_the_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(40, 3, 8, 8, generator=generator, dtype=dtype)
    gradient *= torch.logspace(-8, 6, 40, dtype=dtype).view(-1, 1, 1, 1)
    gradient[7] *= 1e-30  # beside one that is not
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).view(-1, 1, 1, 1)
    expected = gradient / (length + 1e-10)
    ordinary = [i for i in range(40) if i != 7]
    assert torch.equal(steepest_step(gradient, "L2")[ordinary], expected[ordinary])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e-10, 2e-9, 1e25, 1e38])
def test_a_step_is_a_whole_one_however_flat_or_steep_the_network(scale: float) -> None:
    """Its squares leave float32, or the constant would swallow it."""
    gradient = torch.tensor([[3.0, 0.0, -1.0], [0.0, 0.0, 0.0], [2.0, 2.0, 1.0]]) * scale
    gradient[1] = torch.tensor([3.0, 4.0, 0.0])
    exact = gradient.double()
    expected = exact / exact.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(steepest_step(gradient, "L2").double(), expected, rtol=0, atol=3e-7)


def test_a_gradient_below_the_step_s_constant_counts_as_vanished() -> None:
    gradient = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [9e-11, 0.0], [8e-11, 8e-11], [1.0, 0.0], [float("nan"), 0.0]])
    assert vanishes(gradient).tolist() == [True, True, True, False, False, False]
    assert vanishes(gradient.view(6, 1, 1, 2)).shape == (6,)


def test_linf_step_is_the_sign_and_rests_where_the_gradient_vanishes() -> None:
    gradient = torch.tensor([[[1e-30, -7.0], [0.0, 2.0]]])
    assert steepest_step(gradient, "Linf").tolist() == [[[1, -1], [0, 1]]]


def test_l2_projection_scales_each_example_on_its_own() -> None:
    center = torch.full((3, 1, 1, 2), 0.5, dtype=torch.float64)
    delta = torch.tensor([[0.3, 0.4], [0.03, 0.04], [-0.3, 0.0]], dtype=torch.float64).view(3, 1, 1, 2)
    expected = [[0.5 + 0.06, 0.5 + 0.08], [0.53, 0.54], [0.4, 0.5]]  # 0.1/0.5 of the first, the second is inside
    projected = project(center + delta, center, "L2", 0.1).view(3, 2)
    np.testing.assert_allclose(projected.numpy(), expected, rtol=1e-14)


def test_linf_projection_clips_each_pixel_to_the_ball_and_the_box() -> None:
    center = torch.tensor([[0.05, 0.5, 0.95]], dtype=torch.float64)
    x = torch.tensor([[-1.0, 0.55, 2.0]], dtype=torch.float64)
    np.testing.assert_allclose(project(x, center, "Linf", 0.1).numpy(), [[0.0, 0.55, 1.0]], rtol=1e-15)


@settings(deadline=None)
@given(data=centers_and_points(), norm=st.sampled_from(NORMS), eps=radii)
def test_a_projection_is_in_the_ball_and_the_box_and_stays_where_it_is(
    data: tuple[Tensor, Tensor], norm: Norm, eps: float
) -> None:
    center, x = data
    projected = project(x, center, norm, eps)
    assert projected.shape == x.shape
    assert 0 <= projected.min() <= projected.max() <= 1
    assert (distances(projected, center, norm) <= eps * (1 + 1e-12) + 1e-12).all()
    torch.testing.assert_close(project(projected, center, norm, eps), projected, rtol=0, atol=1e-12)
    if eps == 0:
        assert torch.equal(projected, center)


@settings(deadline=None)
@given(data=centers_and_points(), norm=st.sampled_from(NORMS))
def test_without_a_ball_only_the_box_holds(data: tuple[Tensor, Tensor], norm: Norm) -> None:
    center, x = data
    assert torch.equal(project(x, center, norm, float("inf")), x.clamp(0, 1))


@settings(deadline=None)
@given(data=centers_and_points(), norm=st.sampled_from(NORMS), eps=st.floats(1e-6, 10))
def test_a_point_inside_does_not_move(data: tuple[Tensor, Tensor], norm: Norm, eps: float) -> None:
    center, x = data
    inside = project(x, center, norm, 0.9 * eps)
    torch.testing.assert_close(project(inside, center, norm, eps), inside, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_l2_random_start_is_uniform_in_volume(dimensions: int) -> None:
    generator = torch.Generator().manual_seed(dimensions)
    count, eps = 20_000, 0.4
    noise = torch.randn(count, 1, 1, dimensions, generator=generator)
    radius = torch.rand(count, generator=generator)
    delta = (random_start(torch.full_like(noise, 0.5), "L2", eps, noise, radius) - 0.5).view(count, dimensions).numpy()
    length = np.linalg.norm(delta, axis=1)
    assert length.max() <= eps + 1e-6
    # A ball of radius r holds (r/eps)^d of the volume; the standard error is at most 0.0036.
    for share in (0.25, 0.5, 0.75):
        assert abs((length < eps * share ** (1 / dimensions)).mean() - share) < 0.015
    # No direction is preferred: the mean vanishes and each coordinate has variance eps²/(d+2).
    assert np.abs(delta.mean(0)).max() < 0.015
    np.testing.assert_allclose(delta.var(0), eps**2 / (dimensions + 2), rtol=0.05)


def test_linf_random_start_is_uniform_in_each_pixel() -> None:
    noise = torch.rand(5000, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = random_start(torch.full_like(noise, 0.5), "Linf", 0.3, noise, torch.zeros(5000))
    np.testing.assert_allclose(start.numpy(), 0.2 + 0.6 * noise.numpy(), rtol=1e-12)


@settings(deadline=None)
@given(data=centers_and_points(), norm=st.sampled_from(NORMS), eps=st.floats(0, 10), seed=st.integers(0, 2**32))
def test_a_random_start_is_in_the_ball_and_the_box(
    data: tuple[Tensor, Tensor], norm: Norm, eps: float, seed: int
) -> None:
    center, _ = data
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn if norm == "L2" else torch.rand)(center.shape, generator=generator, dtype=torch.float64)
    radius = torch.rand(len(center), generator=generator, dtype=torch.float64)
    start = random_start(center, norm, eps, noise, radius)
    assert 0 <= start.min() <= start.max() <= 1
    assert (distances(start, center, norm) <= eps * (1 + 1e-12) + 1e-12).all()


# Every type and shape, against float64 in numpy. Values are rounded to the type first, so that both see the same ones.


@st.composite
def any_shape(draw: st.DrawFn) -> tuple[list[int], torch.dtype, torch.Generator]:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    shape[0] = draw(st.integers(0, 3))
    return shape, draw(st.sampled_from(DTYPES)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))


def rows(x: Tensor) -> np.ndarray:
    return np.asarray(x.double().numpy().reshape(len(x), x.shape[1:].numel()))


def nearest(x: np.ndarray, center: np.ndarray, norm: Norm, eps: float) -> np.ndarray:
    """The definition, one example at a time."""
    result = np.empty_like(x)
    for k in range(len(x)):
        delta = x[k] - center[k]
        length = np.sqrt((delta**2).sum())
        if norm == "Linf":
            delta = np.minimum(np.maximum(delta, -eps), eps)
        elif length > eps:
            delta = delta / length * eps
        result[k] = np.minimum(np.maximum(center[k] + delta, 0), 1)
    return result


@settings(deadline=None)
@given(
    data=any_shape(),
    norm=st.sampled_from(NORMS),
    eps=any_radius,
    far=st.sampled_from([0.0, 1e-3, 1.0, 100.0, 3e4]),
)
def test_a_projection_is_the_nearest_point_to_the_precision_of_its_type(
    data: tuple[list[int], torch.dtype, torch.Generator], norm: Norm, eps: float, far: float
) -> None:
    shape, dtype, generator = data
    center = (torch.rand(shape, generator=generator) * 1.4 - 0.2).clamp(0, 1).to(dtype)
    x = (center + far * (2 * torch.rand(shape, generator=generator) - 1)).to(dtype)
    projected = project(x, center, norm, eps)
    assert (projected.dtype, projected.shape) == (dtype, x.shape)
    unit = torch.finfo(dtype).eps
    np.testing.assert_allclose(rows(projected), nearest(rows(x), rows(center), norm, eps), rtol=0, atol=4 * unit)
    assert ((projected >= 0) & (projected <= 1)).all()
    size = rows(x).shape[1]
    slack = unit * (np.sqrt(size) if norm == "L2" else 1.0)
    assert (distances(projected.double(), center.double(), norm) <= eps * (1 + 4 * unit) + slack).all()
    if eps == 0:
        assert torch.equal(projected, center)


@settings(deadline=None)
@given(data=any_shape(), norm=st.sampled_from(NORMS), exponent=st.integers(-40, 18), zeros=st.booleans())
def test_a_step_is_the_definition_to_the_precision_of_its_type(
    data: tuple[list[int], torch.dtype, torch.Generator], norm: Norm, exponent: int, zeros: bool
) -> None:
    """Gradients from 1e-40, which is nothing in most types, to 1e18, which float16 cannot hold."""
    shape, dtype, generator = data
    limit = torch.finfo(dtype).max
    gradient = (10.0**exponent * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-limit, limit)
    gradient = gradient.to(dtype)
    if zeros:
        gradient[: len(gradient) // 2] = 0
    step = steepest_step(gradient, norm)
    assert (step.dtype, step.shape) == (dtype, gradient.shape)
    expected = rows(gradient)
    if norm == "L2":
        length = np.sqrt((expected**2).sum(1, keepdims=True))
        # The constant has no say below 1e-8: largest values are 1 there.
        expected = expected / np.where(length == 0, 1, np.where(length < 1e-8, length, length + 1e-10))
    tolerance = 4 * torch.finfo(dtype).eps + 1e-10
    np.testing.assert_allclose(rows(step), np.sign(expected) if norm == "Linf" else expected, rtol=0, atol=tolerance)
    assert step[: len(gradient) // 2].eq(0).all() or not zeros


@settings(deadline=None)
@given(data=any_shape(), norm=st.sampled_from(NORMS), eps=any_radius)
def test_a_nan_stays_in_its_example_and_is_seen(
    data: tuple[list[int], torch.dtype, torch.Generator], norm: Norm, eps: float
) -> None:
    shape, dtype, generator = data
    shape[0] = 3
    center, gradient = (torch.rand(shape, generator=generator).to(dtype) for _ in range(2))
    bad = gradient.clone()
    bad[1].view(-1)[-1] = float("nan")
    for found, good in (
        (steepest_step(bad, norm), steepest_step(gradient, norm)),
        (project(bad, center, norm, eps), project(gradient, center, norm, eps)),
    ):
        assert torch.equal(found[[0, 2]], good[[0, 2]])
        flat, reference = found[1].reshape(-1), good[1].reshape(-1)
        assert flat[-1].isnan()
        # In the Linf geometry, and without a ball, each pixel is on its own.
        apart = torch.equal(flat[:-1], reference[:-1])
        assert apart or (norm == "L2" and flat.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_an_infinite_gradient_is_defined(norm: Norm, dtype: torch.dtype) -> None:
    """Linf has its sign; L2 has no direction, which shows."""
    gradient = torch.tensor([[float("inf"), 1.0], [-2.0, 1.0]], dtype=dtype)
    step = steepest_step(gradient, norm)
    if norm == "Linf":
        assert step.tolist() == [[1, 1], [-1, 1]]
    else:
        assert step[0].isnan().any()
        assert step[1].isfinite().all()


@settings(deadline=None)
@given(data=any_shape(), norm=st.sampled_from(NORMS), eps=st.sampled_from([0.0, 1e-12, 0.3, 5.0]))
def test_a_random_start_of_any_type_is_in_the_ball_and_the_box(
    data: tuple[list[int], torch.dtype, torch.Generator], norm: Norm, eps: float
) -> None:
    shape, dtype, generator = data
    center = torch.rand(shape, generator=generator).to(dtype)
    noise = (torch.randn if norm == "L2" else torch.rand)(shape, generator=generator).to(dtype)
    start = random_start(center, norm, eps, noise, torch.rand(shape[0], generator=generator).to(dtype))
    assert (start.dtype, start.shape) == (dtype, center.shape)
    assert ((start >= 0) & (start <= 1)).all()
    unit, size = torch.finfo(dtype).eps, rows(center).shape[1]
    slack = unit * (np.sqrt(size) if norm == "L2" else 1.0)
    assert (distances(start.double(), center.double(), norm) <= eps * (1 + 4 * unit) + slack).all()
