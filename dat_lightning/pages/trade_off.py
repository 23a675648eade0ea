"""The trade-off plot: two figures of several runs against each other, a labelled point for each run."""

import math
import re
from typing import Any

from dat_lightning.pages.comparison import Column, Comparison
from dat_lightning.pages.drawing import PALETTE, label, require_matplotlib, write_beside

_MARKERS = "osD^vP*X"
# The number of steps in a name such as robust_accuracy_L2_0.5_10x0.1.
_STEPS = re.compile(r"_(\d+)x[\d.e+-]+(?:_random)?$")


def default_axes(comparison: Comparison) -> tuple[str | None, str | None]:
    """Returns the figures that the plot shows if nobody chooses: distance of samples, and accuracy under attack.

    The latter is that under AutoAttack, or else what the module logs as ``robust_accuracy``, or else the one under the
    attack of the most steps, the first of several. Attacks that may go anywhere are no threat model, and left out.
    """
    names = [column.name for column in comparison.columns]
    x = next((name for name in ("fid", *names) if name in names and name.startswith("fid")), None)
    robust = [name for name in names if name.startswith(("autoattack", "robust_accuracy")) and "_inf_" not in name]
    return x, max(robust, key=_strength, default=None)


def _strength(name: str) -> tuple[bool, bool, int]:
    """Orders accuracies under attack by how far they can be trusted."""
    steps = _STEPS.search(name)
    return name.startswith("autoattack"), name == "robust_accuracy", int(steps[1]) if steps else 0


def trade_off_figure(comparison: Comparison, x: Column, y: Column) -> Any:
    """Returns the plot of column ``y`` against column ``x``; runs that lack either are left out.

    Runs whose numbers cannot be compared, because they were measured in another way, have markers of another shape.
    """
    figure, axes = require_matplotlib().subplots(figsize=(7.2, 4.8), layout="constrained")
    axes.margins(0.18)
    points: list[tuple[float, float]] = []
    labels: list[str] = []
    ways: list[tuple[int | None, int | None]] = []
    for k, run in enumerate(comparison.runs):
        one, other = x.entries[k], y.entries[k]
        if one is None or other is None or not (math.isfinite(one.value) and math.isfinite(other.value)):
            continue
        points.append((one.value, other.value))
        labels.append(run.replace("$", r"\$"))
        ways.append((x.groups[k], y.groups[k]))
    order = list(dict.fromkeys(ways))
    for (across, up), way in zip(points, ways, strict=True):
        place = order.index(way)
        marker, color = _MARKERS[place % len(_MARKERS)], PALETTE[place % len(PALETTE)]
        axes.plot(across, up, marker, color=color, ms=8, markeredgewidth=0)
    axes.set(xlabel=axis_label(x), ylabel=axis_label(y))
    write_beside(figure, axes, points, labels)
    return figure


def axis_label(column: Column) -> str:
    """Returns the name of a figure and what is better."""
    better = "" if column.direction is None else f" ({column.direction} is better)"
    return label(column.name) + better
