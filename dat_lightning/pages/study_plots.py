"""The plots of a study: means over seeds, with their standard deviation, their extent, or each seed."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dat_lightning.core.errors import InputError
from dat_lightning.pages.drawing import PALETTE, label, require_matplotlib, write_beside
from dat_lightning.pages.study_file import Plot, PlotKind, Study
from dat_lightning.pages.study_results import Result, Summary, summaries, summary

_SIZE = (7.2, 4.2)
# Once a study has used up the colours, what comes next has another marker and another line.
_MARKERS = "os^D"
_DASHES = ("-", "--", ":", "-.")
# What stands at the horizontal axis, if the study does not say.
_X: Mapping[PlotKind, str] = {
    "steps": "sampling steps",
    "scatter": "",
    "curve": "training step",
    "radii": "radius ε",
    "values": "",
}

Seed = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Line:
    """What a variant shows in a plot.

    Attributes:
        name: The variant.
        x: Places on the horizontal axis.
        y: Means over the seeds.
        low: A standard deviation below; the mean for one seed. Of ``values`` and ``scatter`` the least seed.
        high: A standard deviation above, or the largest seed.
        single: Of each seed, if it is drawn too, its places and values.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    single: tuple[Seed, ...] = ()


def draw(study: Study, plot: Plot, results: Sequence[Result]) -> Any:
    """Returns the figure of a plot.

    Raises:
        InputError: If no run has what it shows.
    """
    shown = lines(study, plot, results)
    if not shown:
        raise InputError(f"plot {plot.name!r}: no run has {plot.figure!r}")
    figure, axes = require_matplotlib().subplots(figsize=_SIZE, layout="constrained")
    if plot.log:
        axes.set_yscale("log")
    if plot.log_x:
        axes.set_xscale("log")
    if plot.kind == "scatter":
        _scatter(figure, axes, study, plot, results)
    elif plot.kind == "values":
        _values(axes, shown[0])
    else:
        _lines(axes, shown, [variant.name for variant in study.variants], with_markers=plot.kind != "curve")
    said = {name: each for result in results for name, each in result.better.items()}
    if plot.kind == "radii":
        said = {name.partition("_eps")[0]: each for name, each in said.items()}
    better = said.get(plot.figure)
    words = plot.words or label(plot.figure)
    axes.set(xlabel=plot.x_words or _X[plot.kind], ylabel=f"{words} ({better} is better)" if better else words)
    _plain_numbers(axes, plot)
    return figure


def lines(study: Study, plot: Plot, results: Sequence[Result]) -> list[Line]:
    """Returns what each variant shows in a plot; ``values`` is one line through all variants with a value.

    On a logarithmic vertical axis means and deviations of curves are those of the logarithms: the mean of seeds that
    differ tenfold is else that of the largest, and a deviation below it has no place on the axis. ``values`` and
    ``scatter`` keep the mean that the table has; the least and the largest seed have a place on every axis.
    """
    names = plot.variants or [variant.name for variant in study.variants]
    if plot.kind in ("values", "scatter"):
        return _line_of_values(study, plot, results, names)
    found = []
    for name in names:
        points: dict[float, list[float]] = {}
        single = []
        for result in results:
            if result.variant == name:
                mine = dict(_points(plot, result))
                if mine:
                    single.append((tuple(mine), tuple(mine.values())))
                for x, y in mine.items():
                    points.setdefault(x, []).append(y)
        if points:
            places = sorted(points)
            each = [_interval(points[x], plot.log) for x in places]
            found.append(_line(name, places, each, tuple(single) if plot.kind == "curve" else ()))
    return found


def _interval(values: Sequence[float], of_logarithms: bool) -> tuple[float, float, float]:
    """Mean, and a standard deviation below and above it."""
    if not of_logarithms:
        return _around(summary(values))
    found = summary([math.log(value) if value > 0 else math.nan for value in values])
    mean, low, high = map(math.exp, _around(found))
    return mean, low, high


def _around(found: Summary) -> tuple[float, float, float]:
    sd = found.sd or 0.0
    return found.mean, found.mean - sd, found.mean + sd


def _line(
    name: str,
    places: Sequence[float],
    each: Sequence[tuple[float, float, float]],
    single: tuple[Seed, ...] = (),
) -> Line:
    mean, low, high = zip(*each, strict=True)
    return Line(name, tuple(places), mean, low, high, single)


def _line_of_values(study: Study, plot: Plot, results: Sequence[Result], names: Sequence[str]) -> list[Line]:
    """Variants as points, at their value or at the figure ``x``."""
    places, each = [], []
    for variant in study.variants:
        figures = summaries(results, variant.name)
        at = variant.value if plot.kind == "values" else figures[plot.x].mean if plot.x in figures else None
        if variant.name in names and at is not None and plot.figure in figures:
            places.append(at)
            each.append(_extent(figures[plot.figure]))
    return [_line("", places, each)] if places else []


def _extent(found: Summary) -> tuple[float, float, float]:
    """Mean, and the least and the largest seed; the mean of equal numbers may be rounded past them."""
    return found.mean, min(found.mean, *found.values), max(found.mean, *found.values)


def _bars(y: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """How far they reach below and above, as matplotlib takes it."""
    return [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]


def _style(number: int) -> tuple[str, str, str]:
    """Colour, marker and line of the ``number``-th of a study's variants or groups."""
    lap, place = divmod(number, len(PALETTE))
    return PALETTE[place], _MARKERS[lap % len(_MARKERS)], _DASHES[lap % len(_DASHES)]


def _points(plot: Plot, result: Result) -> Iterator[tuple[float, float]]:
    if plot.kind == "radii":
        for name, value in result.figures.items():
            match = re.fullmatch(re.escape(plot.figure) + r"_eps(\d+(?:\.\d+)?)", name)
            if match:
                yield float(match[1]), value
        return
    curve = (result.curves if plot.kind == "curve" else result.sweeps).get(plot.figure)
    if curve is not None:
        yield from zip(curve["steps"], curve["values"], strict=True)


def _lines(axes: Any, shown: Sequence[Line], order: Sequence[str], with_markers: bool) -> None:
    for line in shown:
        color, marker, dashes = _style(order.index(line.name))
        axes.plot(line.x, line.y, dashes, marker=marker if with_markers else "", color=color, label=label(line.name))
        if line.single:
            for places, values in line.single:
                axes.plot(places, values, color=color, lw=0.8, alpha=0.4)
        elif line.low != line.high:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, lw=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _values(axes: Any, line: Line) -> None:
    x, y, low, high = zip(*sorted(zip(line.x, line.y, line.low, line.high, strict=True)), strict=True)
    axes.errorbar(x, y, yerr=_bars(y, low, high), fmt="o-", color=PALETTE[0], capsize=3)
    axes.set_xticks(x, [f"{place:g}" for place in x])
    axes.minorticks_off()
    if axes.get_yscale() == "linear" and min(y) >= 0:
        # A small difference shall look small.
        axes.set_ylim(bottom=0)


def _scatter(figure: Any, axes: Any, study: Study, plot: Plot, results: Sequence[Result]) -> None:
    names, points, colors = [], [], []
    groups: dict[str, list[tuple[float, float]]] = {}
    order = list(dict.fromkeys(variant.group or variant.name for variant in study.variants))
    for variant in study.variants:
        figures = summaries(results, variant.name)
        if plot.x in figures and plot.figure in figures and variant.name in (plot.variants or [variant.name]):
            x, y = figures[str(plot.x)], figures[plot.figure]
            if math.isfinite(x.mean) and math.isfinite(y.mean):
                color, marker, _ = _style(order.index(variant.group or variant.name))
                across, up = (_bars(*([value] for value in _extent(each))) for each in (x, y))
                axes.errorbar(x.mean, y.mean, up, across, fmt=marker, color=color, ms=7, lw=1, capsize=2)
                if variant.group is not None:
                    groups.setdefault(variant.group, []).append((x.mean, y.mean))
                    continue
                colors.append(color)
                names.append(label(variant.name))
                points.append((x.mean, y.mean))
    for name, places in groups.items():
        color, _, dashes = _style(order.index(name))
        axes.plot(*zip(*sorted(places), strict=True), dashes, color=color, lw=1.5, label=label(name))
    if groups:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.margins(0.15)
    write_beside(figure, axes, points, names, colors)


def _plain_numbers(axes: Any, plot: Plot) -> None:
    """Numbers such as 20 and 50 on logarithmic axes, in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    chosen: list[tuple[bool, Callable[[], tuple[float, float]], Any]] = [
        (plot.log, axes.get_ylim, axes.yaxis),
        (plot.log_x and plot.kind != "values", axes.get_xlim, axes.xaxis),
    ]
    for is_log, limits, axis in chosen:
        if is_log:
            low, high = limits()
            few = (1.0,) if high / max(low, 1e-300) > 1e3 else (1.0, 2.0, 5.0)
            axis.set_major_locator(LogLocator(subs=few))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
