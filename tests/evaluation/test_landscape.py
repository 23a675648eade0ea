"""Energies over the square: divergence and scale against scipy, and the picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from scipy import optimize  # type: ignore[import-untyped]
from torch import Tensor

from dat_lightning import Landscape, PlaneDataModule, RareDigitsDataModule
from dat_lightning.core.errors import InputError
from dat_lightning.data import plane_density
from dat_lightning.evaluation.landscape import best_scale
from dat_lightning.results import Measurement
from tests import tiny
from tests.evaluation.planes import examples_of, plane_module, points


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
    x, y = examples_of(data)
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
    x, y = examples_of(data)
    middles = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    log_p = data.log_density(torch.cartesian_prod(middles, middles).view(-1, 2, 1, 1), torch.zeros(10_000))
    low, high = np.quantile(data.log_density(x, y).numpy(), 0.01), float(log_p.max())
    band = np.floor(32 * (0 - low) / (high - low)) / 31
    green = np.interp(band, np.linspace(0, 1, 5), [1, 82, 145, 201, 253])
    pixels = np.asarray(Image.open(path)).astype(int)
    flat = (np.abs(pixels[..., 1] - green) < 0.51) & (pixels.sum(2) < 600)
    assert flat.sum(0).max() >= 100  # a column of the right square
    assert (flat.sum(0) >= 100).sum() >= 99


class Untouched(LightningModule):
    """Says so if a batch reaches it."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError

    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError


def test_other_data_are_refused_before_the_first_batch(tmp_path: Path) -> None:
    """Those of rare digits know a density as well, but of digits."""
    for data in (tiny.digits(), RareDigitsDataModule("ink", num_ood=50, num_held_out=50)):
        with pytest.raises(InputError, match=f"Landscape needs a PlaneDataModule, .*, got {type(data).__name__}"):
            measured(tmp_path, Untouched(), data)


def test_the_density_is_asked_for_points_and_classes(tmp_path: Path) -> None:
    """Integers, one for each, as of any batch."""
    data, asked = points("moons"), []

    def log_density(x: Tensor, y: Tensor) -> Tensor:
        asked.append((tuple(x.shape[1:]), y.dtype, y.shape == x.shape[:1]))
        return plane_density("moons").log_prob(x)

    data.log_density = log_density  # type: ignore[method-assign]
    measured(tmp_path, Known(1.0), data, cells=150)  # more than one part
    assert set(asked) == {((2, 1, 1), torch.int64, True)}


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cells must be at least 1, got 0"):
        Landscape(cells=0)
    with pytest.raises(InputError, match="Landscape needs finite logits"):
        measured(tmp_path, Known(float("nan")), points("moons"), cells=10)
