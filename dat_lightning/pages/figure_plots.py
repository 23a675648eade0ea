"""Plots of what figures keep in their details: reliability, histograms, curves."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

from markupsafe import Markup

from dat_lightning.pages.drawing import NEUTRAL, PALETTE, label, require_matplotlib
from dat_lightning.pages.rendering import Plot, number, plot
from dat_lightning.results.measurement import Measurement

Numbers = Sequence[float]

_RADIUS = re.compile(r"(.+)_eps(\d+(?:\.\d+)?)")
_PANEL = (4.3, 3.0)
_MOST_LABELS = 8
_DIAGONAL: Any = {"color": NEUTRAL, "lw": 1, "ls": (0, (4, 3))}


def evaluation_plots(entries: Sequence[Measurement]) -> list[Plot]:
    """Returns the plots of all figures, each once, and those over the radii of figures named ``{name}_eps{ε}``.

    Figures of one source may share what there is to draw; the first then stands for all.
    """
    plots: list[Plot] = []
    seen: set[str] = set()
    for entry in entries:
        for title, part in _parts(entry):
            key = f"{entry.source} {part}"
            if key not in seen:
                plots += _plots(title, part)
            seen.add(key)
    for name, points in _over_radii(entries).items():
        eps, values, _ = zip(*sorted(points), strict=True)
        plots += _plots(name, {"eps": list(eps), name: list(values)})
    return plots


def names_over_radii(entries: Sequence[Measurement]) -> set[str]:
    """Returns the names of those figures that differ from others in the radius alone."""
    return {name for points in _over_radii(entries).values() for _, _, name in points}


def _over_radii(entries: Sequence[Measurement]) -> dict[str, list[tuple[float, float, str]]]:
    """What a figure is → radius, value and whole name, where there are several radii."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for entry in entries:
        named = _RADIUS.fullmatch(entry.name)
        if named is not None:
            found.setdefault(named[1], []).append((float(named[2]), entry.value, entry.name))
    return {name: points for name, points in found.items() if len(points) > 1}


def _parts(entry: Measurement) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Title and contents of whatever in a figure's details may be a plot."""
    yield entry.name, entry.details
    for place, part in _mappings(entry.details):
        yield f"{entry.name}: {place}", part
    if _lists(entry.details, "sweep_steps", "sweep"):
        yield entry.name, {"steps": entry.details["sweep_steps"], entry.name: entry.details["sweep"]}


def _plots(title: str, part: Mapping[str, Any]) -> Iterator[Plot]:
    """The plots of lists of numbers under these names.

    * ``confidence``, ``accuracy`` and ``count``: a reliability diagram;
    * ``fpr`` and ``tpr``: a ROC curve;
    * ``edges`` and a mapping ``counts`` from names of sets to lists one shorter: histograms;
    * ``steps`` or ``eps`` and further lists: curves.
    """
    if _lists(part, "confidence", "accuracy", "count"):
        caption = Markup("<b>{}</b>: accuracy against confidence; dashed is perfect. Bars: how many images.")
        draw = partial(reliability_diagram, part["confidence"], part["accuracy"], part["count"])
        yield plot(draw, title, caption.format(title))
    if _lists(part, "fpr", "tpr"):
        caption = Markup("<b>{}</b>: ROC curve; dashed is chance.").format(title)
        yield plot(partial(roc_curve, part["fpr"], part["tpr"]), title, caption)
    edges, counts = part.get("edges"), part.get("counts")
    if _numbers(edges) and isinstance(counts, Mapping):
        sets = {name: each for name, each in counts.items() if _numbers(each) and len(each) == len(edges) - 1}
        caption = Markup("<b>{}</b>: share of each set's images per bin.").format(title)
        if sets:
            yield plot(partial(histogram, edges, sets), title, caption, broad=True)
    for axis, against in (("steps", "the number of steps"), ("eps", "the radius")):
        x = part.get(axis)
        if not _numbers(x) or len(x) < 2:
            continue
        curves = {name: y for name, y in part.items() if name != axis and _numbers(y) and len(y) == len(x)}
        for name, y in curves.items():
            whose = "" if name == title else Markup("<b>{}</b>: ").format(title)
            caption = whose + Markup("<b>{}</b> against {}.").format(name, against)
            yield plot(partial(curve, x, y, axis, name), f"{title}: {name} against {against}", caption)


def reliability_diagram(confidence: Numbers, accuracy: Numbers, count: Numbers) -> Any:
    """Returns accuracy against mean confidence per bin, above the number of images in each."""
    plt = require_matplotlib()
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(_PANEL[0], 3.8), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    filled = [k for k, n in enumerate(count) if n > 0]
    top.plot([0, 1], [0, 1], **_DIAGONAL)
    top.plot([confidence[k] for k in filled], [accuracy[k] for k in filled], "o-", color=PALETTE[0])
    top.set(ylabel="accuracy", xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    width = 0.8 / max(1, len(count))
    bottom.bar([confidence[k] for k in filled], [count[k] for k in filled], width=width, color=PALETTE[0], alpha=0.6)
    bottom.set(xlabel="confidence", ylabel="images")
    bottom.locator_params(axis="y", nbins=3)
    return figure


def roc_curve(fpr: Numbers, tpr: Numbers) -> Any:
    """Returns the true positive rate against the false positive rate."""
    figure, axes = require_matplotlib().subplots(figsize=(_PANEL[0], 3.4), layout="constrained")
    axes.plot([0, 1], [0, 1], **_DIAGONAL)
    axes.plot(fpr, tpr, color=PALETTE[0])
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    return figure


def histogram(edges: Numbers, counts: Mapping[str, Numbers]) -> Any:
    """Returns histograms of several sets over the same bins, each as shares of its own set."""
    figure, axes = require_matplotlib().subplots(figsize=(9.6, 3.4), layout="constrained")
    for k, (name, values) in enumerate(counts.items()):
        shares = [value / max(1, sum(values)) for value in values]
        color = PALETTE[k % len(PALETTE)]
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.18)
        axes.stairs(shares, edges, color=color, lw=1.6, label=label(name))
    axes.set(ylabel="share of images")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def curve(x: Numbers, y: Numbers, x_name: str, y_name: str) -> Any:
    """Returns one curve over step counts or radii."""
    figure, axes = require_matplotlib().subplots(figsize=_PANEL, layout="constrained")
    axes.plot(x, y, "o-", color=PALETTE[0], markeredgewidth=0)
    axes.set(xlabel={"steps": "steps", "eps": "radius ε"}[x_name], ylabel=label(y_name))
    axes.margins(x=0.1, y=0.16)
    if len(x) <= _MOST_LABELS:
        axes.set_xticks(x, [f"{across:g}" for across in x])
        for across, up in zip(x, y, strict=True):
            axes.annotate(number(up), (across, up), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    return figure


def _mappings(details: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping inside, with the names that lead to it."""
    for name, value in details.items():
        if isinstance(value, Mapping):
            place = f"{prefix}{name}".replace("_", " ")
            yield place, value
            yield from _mappings(value, f"{place}, ")


def _numbers(value: Any) -> TypeGuard[Numbers]:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(each, int | float) for each in value)
    )


def _lists(part: Mapping[str, Any], *names: str) -> bool:
    """Whether all of them are lists of numbers, equally long."""
    return all(_numbers(part.get(name)) for name in names) and len({len(part[name]) for name in names}) == 1
