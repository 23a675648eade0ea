"""Energies over the unit square beside a density that is known there: a picture, a divergence."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.data.batches import logits_of, require_finite
from dat_lightning.data.plane import PlaneDataModule
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.pictures import pictures_wanted, show_picture
from dat_lightning.sampling.picture_grids import Tile, captioned_grid

# From dark blue over green to yellow: lightness rises all the way.
_RAMP = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)
_BANDS = 32
# Where log p is below this quantile of it over points of p is off the support.
_LEFT_OUT = 0.01
# Scales between which the best is looked for.
_LOWEST_SCALE, _HIGHEST_SCALE = 1e-3, 1e3


class Landscape(Evaluator):
    """Measures how far exp(−s E(x)) is from a density of the unit square, and pictures both.

    | figure | definition |
    |---|---|
    | ``kl`` | Kullback–Leibler divergence of exp(−s E)/Z from p, in nats, at the best s |
    | ``energy_scale`` | that s: nats of log p for a unit of energy; near 0 if E has nothing to say |
    | ``mass_off_support`` | share of exp(−s E)/Z where log p is below its 1 % quantile of test points; of p it is 1 % |

    p is that of :class:`~dat_lightning.data.PlaneDataModule`. The mean over p is that over the test points, Z the sum
    over the middles of a grid. The uniform density, which s = 0 is, has the ``kl`` in ``details["kl_uniform"]``.

    Logged: ``test/{figure}``. The picture shows log p and −s E − log Z over the square in the same colours: bands of
    equal height, from that quantile, below which all is dark, to the largest log p on the grid. Loggers that take
    images get it as ``test/landscape``.

    Args:
        cells: Cells of the grid in each direction.
        picture: PNG file of the picture; ``None`` writes none.
        dirpath: See :class:`Evaluator`.

    Raises:
        InputError: If the grid has no cell; in a test, if the DataModule is none of the plane, or logits are not
            finite.
    """

    def __init__(self, cells: int = 400, picture: str | None = None, dirpath: str | None = None) -> None:
        super().__init__(dirpath)
        require_at_least(1, cells=cells)
        self.cells = cells
        self.picture = None if picture is None else Path(picture)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the DataModule, and forgets the last evaluation."""
        plane_of(trainer, type(self).__name__)
        super().on_test_start(trainer, pl_module)

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns −E(x)."""
        return {"score": scores(pl_module, batch["x"])}

    @override
    def known_values(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns log p(x)."""
        data = plane_of(pl_module.trainer, type(self).__name__)
        return {"log_density": data.log_density(batch["x"], batch["y"]).cpu()}

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns divergence and scale, and draws the picture."""
        middles = (torch.arange(self.cells, dtype=torch.float64) + 0.5) / self.cells
        grid = torch.cartesian_prod(middles, middles).view(-1, 2, 1, 1)
        on_grid = torch.cat([scores(pl_module, part.float().to(pl_module.device)) for part in grid.split(20_000)])
        at_points = values["score"]
        scale = best_scale(at_points, on_grid)
        scaled = scale * on_grid
        log_z = log_mean_exp(scaled)
        kl = float(values["log_density"].mean() - scale * at_points.mean() + log_z)
        data = plane_of(trainer, type(self).__name__)
        no_class = torch.zeros(len(grid), dtype=torch.int64)
        parts = zip(grid.split(20_000), no_class.split(20_000), strict=True)
        log_p = torch.cat([data.log_density(*part) for part in parts])
        lowest = values["log_density"].quantile(_LEFT_OUT)
        off_support = float(scaled.softmax(0)[log_p < lowest].sum())
        pictures = []
        if pictures_wanted(trainer, self.picture):
            low, high = float(lowest), float(log_p.max())
            told = (
                (log_p, f"log p, {low:.1f} to {high:.1f} nats"),
                (scaled - log_z, f"-sE - log Z, s = {scale:.3g}"),
            )
            tiles = [Tile(_painted(each, self.cells, low, high), words) for each, words in told]
            show_picture(trainer, "test/landscape", captioned_grid([tiles], type(pl_module).__name__), self.picture)
            pictures = [] if self.picture is None else [str(self.picture)]
        details = {"kl_uniform": float(values["log_density"].mean()), "pictures": pictures}
        words = "Kullback–Leibler divergence of exp(−s E)/Z from p at the best s, in nats"
        settings = {"cells": self.cells}
        return [
            Measurement("kl", kl, words, len(at_points), details, "lower", settings),
            Measurement("energy_scale", scale, "the s of the least divergence", len(at_points), {}, None, settings),
            Measurement(
                "mass_off_support",
                off_support,
                f"share of exp(−s E)/Z where log p is below its {_LEFT_OUT:g}-quantile of test points",
                len(at_points),
                {"threshold": float(lowest)},
                "lower",
                settings,
            ),
        ]


def plane_of(trainer: Trainer, who: str) -> PlaneDataModule:
    """Returns the Trainer's DataModule.

    Raises:
        InputError: If its density is none of the plane.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, PlaneDataModule):
        raise InputError(f"{who} needs a PlaneDataModule, or a subclass of it, got {type(data).__name__}")
    return data


def scores(pl_module: LightningModule, x: Tensor) -> Tensor:
    """Returns −E(x), (N,), float64, on the CPU."""
    with torch.no_grad():
        logits = logits_of(pl_module, x, "Landscape").cpu().double()
    require_finite(logits, "Landscape")
    return -marginal_energy(logits)


def best_scale(at_points: Tensor, on_grid: Tensor) -> float:
    """Returns the s of the least mean of −s·score + log Z(s) over points, between 0.001 and 1 000, by bisection.

    The mean is convex in s, and its slope is the mean score under exp(s·score)/Z less that over the points.

    Args:
        at_points: Scores −E of points of the data, (N,).
        on_grid: Those of the whole space, (M,), in cells of equal size.
    """
    low, high, mean = _LOWEST_SCALE, _HIGHEST_SCALE, at_points.mean()
    for _ in range(60):
        middle = math.sqrt(low * high)
        expected = ((middle * on_grid).softmax(0) * on_grid).sum()
        low, high = (middle, high) if expected < mean else (low, middle)
    return math.sqrt(low * high)


def log_mean_exp(values: Tensor) -> Tensor:
    """Returns log of the mean of exp, a scalar: log Z over a box of volume one."""
    return values.logsumexp(0) - math.log(len(values))


def _painted(values: Tensor, cells: int, low: float, high: float) -> Tensor:
    """Values on the grid, (cells²,), as a picture in bands from ``low`` to ``high``, uint8 (3, cells, cells)."""
    share = ((values.nan_to_num(low) - low) / max(high - low, 1e-12)).clamp(0, 1)
    band = (_BANDS * share).floor().clamp_max(_BANDS - 1).long()
    places, ends = np.linspace(0, 1, _BANDS), np.linspace(0, 1, len(_RAMP))
    colors = np.stack([np.interp(places, ends, channel) for channel in _RAMP.T]).round().astype(np.uint8)
    # The first coordinate goes to the right, the second upwards.
    return torch.from_numpy(colors)[:, band].view(3, cells, cells).transpose(1, 2).flip(1)
