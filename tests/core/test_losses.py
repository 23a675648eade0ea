import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dat_lightning.core import (
    energy_bce,
    energy_difference,
    energy_gradient_norm,
    is_right,
    marginal_energy,
    mean_distance_to_uniform,
    r1_penalty,
    robust_cross_entropy,
)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def random_energies(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, dtype=torch.float64, generator=generator)).requires_grad_(True)


class TanhNetwork(nn.Module):
    """K logits, non-linear in images and parameters, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(4, 5, dtype=torch.float64, generator=generator))
        self.outer = nn.Parameter(torch.randn(5, 3, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.inner) @ self.outer


class QuadraticEnergy(nn.Module):
    """E(x) = ½ Σ aᵢ xᵢ², as the one logit −E."""

    def __init__(self, a: list[float]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return -0.5 * (self.a * x.flatten(1).square()).sum(1, keepdim=True)


@pytest.mark.parametrize(("num_real", "num_contrast"), [(4, 4), (1, 1), (5, 2)])
def test_energy_bce_is_the_mean_over_all_logits_of_the_logistic_loss(num_real: int, num_contrast: int) -> None:
    real, contrast = random_energies(num_real, 0), random_energies(num_contrast, 1)
    # p(real | x) = σ(−E(x))
    terms = [-math.log(sigmoid(-e)) for e in real.tolist()] + [-math.log(1 - sigmoid(-e)) for e in contrast.tolist()]
    loss = energy_bce(real, contrast)
    assert math.isclose(loss.item(), sum(terms) / (num_real + num_contrast), rel_tol=1e-12)

    gradient_real, gradient_contrast = torch.autograd.grad(loss, (real, contrast))
    count = num_real + num_contrast
    np.testing.assert_allclose(gradient_real, [sigmoid(e) / count for e in real.tolist()], rtol=1e-12)
    np.testing.assert_allclose(gradient_contrast, [-sigmoid(-e) / count for e in contrast.tolist()], rtol=1e-12)


def test_energy_bce_of_huge_energies_is_finite() -> None:
    real, contrast = torch.tensor([1e4, -1e4]), torch.tensor([1e4, -1e4])
    assert energy_bce(real, contrast).item() == pytest.approx((1e4 + 0 + 0 + 1e4) / 4)


def test_the_difference_of_energies_has_the_gradient_of_the_likelihood() -> None:
    """Three data, and samples of a density over three states, each as often as it is likely."""
    energy = torch.tensor([0.0, math.log(2.0), math.log(4.0)], dtype=torch.float64, requires_grad=True)
    data, samples = [2, 0, 2], [0, 0, 0, 0, 1, 1, 2]  # exp(−E) is as 4 : 2 : 1
    value = energy_difference(energy[data], energy[samples])
    assert value.item() == pytest.approx(2 / 3 * math.log(4) - (2 * math.log(2) + math.log(4)) / 7, rel=1e-12)
    likelihood = -(-energy - (-energy).exp().sum().log())[data].mean()
    gradients = [torch.autograd.grad(v, energy)[0] for v in (value, likelihood)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_the_distance_to_uniform_is_that_by_hand() -> None:
    """½ log(½ / ¾) + ½ log(½ / ¼) of the first, 0 of the second."""
    logits = torch.tensor([[math.log(3.0), 0.0], [5.0, 5.0]], dtype=torch.float64)
    by_hand = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert mean_distance_to_uniform(logits).item() == pytest.approx(by_hand / 2, rel=1e-12)


def test_robust_cross_entropy_is_the_mean_over_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.tensor([2, 0, 1, 1])
    exponentials = np.exp(logits.detach().numpy())
    posterior = exponentials / exponentials.sum(1, keepdims=True)
    loss = robust_cross_entropy(logits, y)
    assert math.isclose(loss.item(), -np.log(posterior[np.arange(4), y.numpy()]).mean(), rel_tol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(gradient, (posterior - np.eye(3)[y.numpy()]) / 4, rtol=1e-12, atol=1e-15)


def test_r1_of_a_quadratic_energy_and_its_parameter_gradient() -> None:
    a = np.array([0.5, -1.0, 2.0, 0.0])
    model = QuadraticEnergy(a.tolist())
    x = torch.rand(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares = x.flatten(1).numpy() ** 2
    # ∇ₓE = a ∘ x
    np.testing.assert_allclose(energy_gradient_norm(model, x), (a**2 * squares).sum(1), rtol=1e-12)
    penalty = r1_penalty(model, x)
    assert math.isclose(penalty.item(), 0.5 * (a**2 * squares).sum(1).mean(), rel_tol=1e-12)
    (gradient,) = torch.autograd.grad(penalty, model.a)
    np.testing.assert_allclose(gradient, (a * squares).mean(0), rtol=1e-12)


def test_energy_gradient_norm_agrees_with_finite_differences_for_several_classes() -> None:
    model, step = TanhNetwork(), 1e-6
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = np.zeros(3)
    with torch.no_grad():
        for pixel in range(4):
            shift = step * torch.eye(4, dtype=torch.float64)[pixel].view(1, 1, 2, 2)
            slope = (marginal_energy(model(x + shift)) - marginal_energy(model(x - shift))) / (2 * step)
            expected += slope.numpy() ** 2
    np.testing.assert_allclose(energy_gradient_norm(model, x), expected, rtol=1e-7)


def test_r1_parameter_gradient_agrees_with_finite_differences() -> None:
    model, step = TanhNetwork(), 1e-5
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = (model.inner, model.outer)
    gradients = torch.autograd.grad(r1_penalty(model, x), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for place in ((0, 0), (3, 2)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[place] += sign * step
                values.append(r1_penalty(model, x).item())
                with torch.no_grad():
                    parameter[place] -= sign * step
            assert math.isclose(gradient[place], (values[0] - values[1]) / (2 * step), rel_tol=1e-6)


def test_energy_gradient_norm_has_a_graph_only_when_asked_and_leaves_the_images_alone() -> None:
    model, x = TanhNetwork(), torch.rand(2, 1, 2, 2, dtype=torch.float64)
    assert not energy_gradient_norm(model, x).requires_grad
    assert energy_gradient_norm(model, x, create_graph=True).requires_grad
    assert not x.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_nan_is_never_right() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[2.0, 1.0], [nan, 1.0], [1.0, nan], [nan, nan], [inf, 0.0], [0.0, 1.0]])
    assert is_right(logits, torch.zeros(6, dtype=torch.long)).tolist() == [True, False, False, False, True, False]
