"""Energies over the square: divergence and scale against scipy, the picture, and where samples are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from scipy import optimize  # type: ignore[import-untyped]
from torch import Tensor

from dat_lightning import Landscape, PGDSampler, PlaneDataModule, SampleConsumer, SampleSupport
from dat_lightning.core.errors import InputError
from dat_lightning.data import plane_density
from dat_lightning.evaluation.landscape import best_scale
from dat_lightning.results import Measurement
from tests import tiny
from tests.evaluation.test_relative_density import plane_module, points, test_examples


class Known(LightningModule):
    """−E = a · log p of a density, in both of two classes, less log 2, which logsumexp adds."""

    def __init__(self, a: float, density: Any = "moons") -> None:
        super().__init__()
        self.a, self.density = a, density

    def forward(self, x: Tensor) -> Tensor:
        log_p = plane_density(self.density).log_prob(x).clamp_min(-200)
        logits: Tensor = (self.a * log_p - np.log(2)).float().unsqueeze(1).expand(-1, 2)
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> None: ...


def measured(path: Path, module: LightningModule, data: Any, **arguments: Any) -> dict[str, Measurement]:
    evaluator = Landscape(**arguments)
    tiny.trainer(path, [evaluator]).test(module, datamodule=data, verbose=False)
    return {figure.name: figure for figure in evaluator.figures}


@pytest.mark.parametrize("a", [1.0, 0.2])
def test_an_energy_that_is_log_p_over_a_scale_has_no_divergence_at_that_scale(a: float, tmp_path: Path) -> None:
    found = measured(tmp_path, Known(a), PlaneDataModule("moons", 64, 5000), cells=200)
    # Test points are a sample, whose best scale is not quite that of p.
    assert found["energy_scale"].value == pytest.approx(1 / a, rel=0.03)
    assert abs(found["kl"].value) < 2e-3
    assert found["kl"].details["kl_uniform"] > 1.5
    assert found["mass_off_support"].value == pytest.approx(0.01, abs=0.003)


def test_kept_values_are_none_of_the_density_s_own(tmp_path: Path) -> None:
    """Points are kept by their places; what is dense there, another density says otherwise."""
    first, then = PlaneDataModule("moons", 64, 100), PlaneDataModule("moons", 64, 100)
    then.log_density = lambda x, y: torch.zeros(len(x), dtype=torch.float64)  # type: ignore[method-assign]
    found = []
    for data in (first, then):
        evaluator = Landscape(cells=20, dirpath=str(tmp_path / "kept"))
        tiny.trainer(tmp_path, [evaluator]).test(Known(1.0), datamodule=data, verbose=False)
        found.append(evaluator.figures[0].details["kl_uniform"])
    assert found[0] != 0
    assert found[1] == 0


def test_divergence_and_scale_are_those_of_scipy(tmp_path: Path) -> None:
    data, module = points("gaussians"), plane_module(8)
    found = measured(tmp_path, module, data, cells=60)
    x, y = test_examples(data)
    middles = (np.arange(60) + 0.5) / 60
    grid = torch.tensor([[a, b] for a in middles for b in middles], dtype=torch.float32).view(-1, 2, 1, 1)
    with torch.no_grad():
        at_points, on_grid = (module.eval()(part).double().logsumexp(1).numpy() for part in (x, grid))
    log_p = data.log_density(x, y).numpy()

    def divergence(log_s: float) -> float:
        s = np.exp(log_s)
        return float(log_p.mean() - s * at_points.mean() + np.log(np.mean(np.exp(s * on_grid))))

    best = optimize.minimize_scalar(divergence, bounds=(np.log(1e-3), np.log(1e3)), method="bounded")
    assert found["kl"].value == pytest.approx(best.fun, abs=1e-4)
    assert found["energy_scale"].value == pytest.approx(np.exp(best.x), rel=0.05)

    weights = np.exp(found["energy_scale"].value * on_grid)
    off = data.log_density(grid, grid).numpy() < np.quantile(log_p, 0.01)
    assert 0.05 < found["mass_off_support"].value < 0.95
    assert found["mass_off_support"].value == pytest.approx(weights[off].sum() / weights.sum(), rel=1e-6)


def test_an_energy_that_says_nothing_has_no_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    on_grid = torch.rand(1000, generator=generator, dtype=torch.float64)
    assert best_scale(on_grid[:100] - 1, on_grid) == pytest.approx(1e-3, rel=1e-6)


def test_the_picture_shows_high_values_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "landscape.png"
    found = measured(tmp_path, Known(1.0, "gaussians"), points("gaussians"), cells=100, picture=str(path))
    assert found["kl"].details["pictures"] == [str(path)]
    pixels = np.asarray(Image.open(path)).astype(int)
    # Two squares of 100, side by side; green is brightest where values are large.
    top = next(r for r in range(len(pixels)) if (pixels[r] == [68, 1, 84]).all(1).sum() > 50)
    left = [c for c in range(pixels.shape[1]) if (pixels[top + 50, c] == [68, 1, 84]).all()]
    first, second = left[0], next(c for c in left if c > left[0] + 100)
    squares = [pixels[top : top + 100, c : c + 100, 1] for c in (first, second)]
    for square in squares:
        # The most common Gaussian is on the right, at (0.85, 0.5); the third, less bright, on top.
        row, column = (places.mean() for places in np.nonzero(square == square.max()))
        assert abs(row - 49.5) <= 1
        assert abs(column - 84.5) <= 1
        assert square[15, 50] > square[85, 50] > square[50, 50] == 1
    assert np.abs(squares[0] - squares[1]).max() <= 13  # a band
    assert 20 < len(np.unique(squares[0])) <= 32


def test_both_squares_of_the_picture_have_the_same_colours(tmp_path: Path) -> None:
    """An energy that says nothing is the uniform density, whose logarithm is 0 nats everywhere."""
    path, data = tmp_path / "landscape.png", points("gaussians")
    measured(tmp_path, Known(0.0, "gaussians"), data, cells=100, picture=str(path))
    x, y = test_examples(data)
    middles = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    log_p = data.log_density(torch.cartesian_prod(middles, middles).view(-1, 2, 1, 1), torch.zeros(10_000))
    low, high = np.quantile(data.log_density(x, y).numpy(), 0.01), float(log_p.max())
    band = np.floor(32 * (0 - low) / (high - low)) / 31
    green = np.interp(band, np.linspace(0, 1, 5), [1, 82, 145, 201, 253])
    pixels = np.asarray(Image.open(path)).astype(int)
    flat = (np.abs(pixels[..., 1] - green) < 0.51) & (pixels.sum(2) < 600)
    assert flat.sum(0).max() >= 100  # a column of the right square
    assert (flat.sum(0) >= 100).sum() >= 99


class Kept(SampleConsumer):
    """Keeps samples."""

    stages = ("test",)

    def on_samples_batch(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        self.images = batch.images


def test_the_share_of_samples_on_the_support(tmp_path: Path) -> None:
    data, support, kept = points("moons"), SampleSupport(left_out=0.2), Kept()
    sampler = PGDSampler(num_samples=30, num_steps=[0, 30], step_size=0.05)
    tiny.trainer(tmp_path, [sampler, support, kept]).test(plane_module(2), datamodule=data, verbose=False)
    x, _ = test_examples(data)
    threshold = np.quantile(data.log_density(x, x).numpy(), 0.2)
    expected = {n: float((data.log_density(s, s) >= threshold).double().mean()) for n, s in kept.images.items()}
    found = {figure.name: figure for figure in support.figures}
    assert {n: found[f"sample_support_{n}_steps"].value for n in (0, 30)} == pytest.approx(expected)
    assert found["sample_support"].value == max(expected.values())
    assert found["sample_support"].details["sweep"] == list(expected.values())


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cells must be at least 1, got 0"):
        Landscape(cells=0)
    with pytest.raises(InputError, match=r"left_out must lie in \(0, 1\), got 1.0"):
        SampleSupport(left_out=1.0)
    with pytest.raises(InputError, match="Landscape needs a DataModule with group_names"):
        measured(tmp_path, tiny.stage1(), tiny.digits())
    with pytest.raises(InputError, match="Landscape needs finite logits"):
        measured(tmp_path, Known(float("nan")), points("moons"), cells=10)
