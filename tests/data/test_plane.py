"""Densities of the plane: they integrate to one, samples have them, and the classes their shares."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import integrate, stats  # type: ignore[import-untyped]

from dat_lightning import PlaneDataModule
from dat_lightning.core.errors import InputError
from dat_lightning.data import PlaneDensity, plane_density
from dat_lightning.data.plane import Plane

NAMES = get_args(Plane)


def cut() -> PlaneDensity:
    """Broad components near the border, a third of whose mass the square cuts off."""
    means = torch.tensor([[0.05, 0.5], [0.9, 0.95], [0.4, 0.1]])
    return PlaneDensity(means, torch.tensor([0.3, 0.2, 0.1]), torch.tensor([5.0, 1.0, 2.0]), torch.tensor([0, 1, 1]))


def class_shares(density: PlaneDensity) -> torch.Tensor:
    return torch.stack([density.shares[density.labels == k].sum() for k in range(density.num_classes)])


def by_hand(density: PlaneDensity, weights: list[float], x: float, y: float) -> float:
    """p, from Gaussians of scipy and their mass in the square by its distribution function."""
    value = mass = 0.0
    for w, mean, sd in zip(weights, density.means.tolist(), density.deviations.tolist(), strict=True):
        axes = [stats.norm(m, sd) for m in mean]
        value += w * axes[0].pdf(x) * axes[1].pdf(y)
        mass += w * math.prod(axis.cdf(1) - axis.cdf(0) for axis in axes)
    return value / mass


def test_the_density_is_that_of_gaussians_cut_to_the_square() -> None:
    density = cut()
    points = torch.rand(20, 2, dtype=torch.float64)
    expected = [math.log(by_hand(density, [5, 1, 2], x, y)) for x, y in points.tolist()]
    np.testing.assert_allclose(density.log_prob(points).numpy(), expected, rtol=1e-6, atol=1e-6)
    total, _ = integrate.dblquad(lambda y, x: float(density.log_prob(torch.tensor([[x, y]])).exp()), 0, 1, 0, 1)
    assert total == pytest.approx(1, abs=1e-6)
    assert density.log_prob(torch.tensor([[1.1, 0.5], [0.5, -0.1]])).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("density", [*NAMES, "cut"])
def test_it_integrates_to_one(density: Any) -> None:
    found = cut() if density == "cut" else plane_density(density)
    n = 400
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    grid = torch.cartesian_prod(middles, middles)
    total = sum(float(found.log_prob(part).exp().sum()) for part in grid.split(20_000)) / n**2
    assert total == pytest.approx(1, abs=1e-5)
    assert float(found.shares.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("density", [*NAMES, "cut"])
def test_samples_have_that_density(density: Any) -> None:
    """A χ² test over squares, each with the integral of p in it; and of the classes."""
    found = cut() if density == "cut" else plane_density(density)
    size, bins, fine = 20_000, 20, 20
    points, labels = found.sample(size, "a test", density)
    assert 0 <= float(points.min()) <= float(points.max()) <= 1
    middles = (torch.arange(bins * fine, dtype=torch.float64) + 0.5) / (bins * fine)
    grid = torch.cartesian_prod(middles, middles)
    p = torch.cat([found.log_prob(part).exp() for part in grid.split(20_000)]).view(bins, fine, bins, fine)
    expected = size * p.sum((1, 3)).flatten().numpy() / (bins * fine) ** 2
    places = (points.double() * bins).long().clamp_max(bins - 1)
    counts = np.bincount((places[:, 0] * bins + places[:, 1]).numpy(), minlength=bins**2)
    few = expected < 5
    counts, expected = np.append(counts[~few], counts[few].sum()), np.append(expected[~few], expected[few].sum())
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3
    shares = np.bincount(labels.numpy(), minlength=found.num_classes)
    assert stats.chisquare(shares, size * class_shares(found).numpy()).pvalue > 1e-3
    # The label is that of the component: the likeliest class of a point is nearly always its own.
    if density != "cut":
        nearest = found.labels[torch.cdist(points.double(), found.means).argmin(1)]
        assert float((nearest == labels).double().mean()) > 0.99


def test_weights_are_unequal_as_the_table_says() -> None:
    shares = {name: class_shares(plane_density(name)) for name in NAMES}
    assert {name: len(share) for name, share in shares.items()} == {"moons": 2, "gaussians": 8, "pinwheel": 5}
    assert float(shares["moons"][0] / shares["moons"][1]) == pytest.approx(10, rel=1e-6)
    for name in ("gaussians", "pinwheel"):
        ratios = shares[name][1:] / shares[name][:-1]
        assert float(shares[name][0] / shares[name][-1]) == pytest.approx(100, rel=1e-3)
        assert float(ratios.max() - ratios.min()) < 1e-3


def test_batches_are_points_of_the_density_and_uniform_seeds() -> None:
    data = PlaneDataModule("pinwheel", num_train=300, num_test=100, num_ood=200, batch_size=32)
    assert data.num_classes == 5
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert {key: tuple(batch[key].shape) for key in ("x_gen", "x_clf", "x_ood")} == dict.fromkeys(
        ("x_gen", "x_clf", "x_ood"), (32, 2, 1, 1)
    )
    density = plane_density("pinwheel")
    assert torch.equal(data.log_density(batch["x_gen"], batch["y_gen"]), density.log_prob(batch["x_gen"].view(-1, 2)))
    assert float(density.log_prob(batch["x_gen"]).mean()) > 1 > float(density.log_prob(batch["x_ood"]).mean())
    assert torch.equal(data.groups(batch["x_gen"], batch["y_gen"]), batch["y_gen"])
    assert data.group_names == ("class_0", "class_1", "class_2", "class_3", "class_4")
    test, again = ([b["x"] for b in d.test_dataloader()] for d in (data, PlaneDataModule("pinwheel", 9, 100, seed=3)))
    assert torch.equal(torch.cat(test), torch.cat(again))
    assert not torch.equal(torch.cat(test)[:32], torch.cat([b["x"] for b in data.val_dataloader()])[:32])


def test_nobody_changes_another_s_points_or_density() -> None:
    """What one DataModule hands out is none of the next one's."""
    found = []
    for _ in range(2):
        data = PlaneDataModule("moons", 30, 20, 10, 10)
        sets: list[Any] = [data.in_distribution("train"), data.out_of_distribution("held_out")]
        tensors = [tensor for each in sets for tensor in each.tensors]
        log_p = data.log_density(*sets[0].tensors)
        found.append([*(tensor.clone() for tensor in tensors), log_p])
        for tensor in [*tensors, plane_density("moons").means]:
            tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PlaneDataModule("rings"), "density must be one of .*, got 'rings'"),  # type: ignore[arg-type]
        (lambda: PlaneDataModule(num_test=0), "num_test must be at least 1, got 0"),
        (
            lambda: PlaneDensity(torch.zeros(1, 2), torch.zeros(1), torch.ones(1), torch.zeros(1).long()),
            "deviations and weights must be positive, got 0.0 and 1.0",
        ),
        (
            lambda: PlaneDensity(torch.full((1, 2), 1.5), torch.ones(1), torch.ones(1), torch.zeros(1).long()),
            r"means must lie in \[0, 1\], got 1.5 … 1.5",
        ),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()
