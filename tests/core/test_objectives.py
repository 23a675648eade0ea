import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_lightning.core import Objective, cross_entropy, distance_to_uniform, negative_marginal_energy, targeted_logit

Definition = Callable[[list[float], int], float]
Derivative = Callable[[np.ndarray, np.ndarray], np.ndarray]


def posterior(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def divergence_from_uniform(row: list[float], label: int) -> float:
    k = len(row)
    return sum(1 / k * math.log(1 / k / p) for p in posterior(row))


DEFINITIONS: list[tuple[Objective, Definition, Derivative]] = [
    (cross_entropy, lambda row, label: -math.log(posterior(row)[label]), lambda p, one_hot: p - one_hot),
    (targeted_logit, lambda row, label: row[label], lambda p, one_hot: one_hot),
    (negative_marginal_energy, lambda row, label: math.log(sum(map(math.exp, row))), lambda p, one_hot: p),
    (distance_to_uniform, divergence_from_uniform, lambda p, one_hot: p - 1 / p.shape[1]),
]


def random_logits(num_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    logits = 2 * torch.randn(5, num_classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(True), torch.randint(num_classes, (5,), generator=generator)


@pytest.mark.parametrize("num_classes", [1, 3, 10])
@pytest.mark.parametrize(("objective", "definition", "derivative"), DEFINITIONS)
def test_an_objective_has_the_values_and_the_gradient_of_its_definition(
    objective: Objective, definition: Definition, derivative: Derivative, num_classes: int
) -> None:
    logits, y = random_logits(num_classes)
    values = objective(logits, y)
    rows, labels = logits.tolist(), y.tolist()
    expected = [definition(row, label) for row, label in zip(rows, labels, strict=True)]
    np.testing.assert_allclose(values.detach().numpy(), expected, rtol=1e-12, atol=1e-12)

    (gradient,) = torch.autograd.grad(values.sum(), logits)
    p, one_hot = np.array([posterior(row) for row in rows]), np.eye(num_classes)[labels]
    np.testing.assert_allclose(gradient.numpy(), derivative(p, one_hot), rtol=1e-12, atol=1e-12)


def test_distance_to_uniform_vanishes_for_equal_logits_alone() -> None:
    logits = torch.tensor([[7.0, 7.0, 7.0], [7.0, 7.0, 7.1]], dtype=torch.float64)
    distance = distance_to_uniform(logits, torch.tensor([0, 0]))
    assert abs(float(distance[0])) < 1e-15
    assert distance[1] > 1e-4
