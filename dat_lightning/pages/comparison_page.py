"""The page ``comparison.html``: a table of runs and figures, protocols, and the trade-off plot."""

import string
from functools import partial
from pathlib import Path

from markupsafe import Markup

from dat_lightning.pages.comparison import Column, Comparison
from dat_lightning.pages.drawing import write_png
from dat_lightning.pages.rendering import Plot, plot, write_page
from dat_lightning.pages.trade_off import trade_off_figure
from dat_lightning.results.measurement import Measurement, flat


def write_comparison(path: Path, comparison: Comparison, x: Column | None, y: Column | None) -> list[Path]:
    """Writes the page, and the trade-off plot beside it as PNG; returns what was written.

    Args:
        path: The page.
        comparison: What it shows.
        x: Figure on the horizontal axis of the plot; without one there is no plot.
        y: Figure on the vertical axis.
    """
    differing: dict[tuple[str, ...], list[str]] = {}
    for column in comparison.columns:
        if not column.comparable:
            differing.setdefault(column.differing, []).append(column.name)
    write_page(
        path,
        "comparison.html.j2",
        title=f"Comparison of {len(comparison.runs)} runs",
        comparison=comparison,
        runs=list(zip(comparison.runs, comparison.failures, strict=True)),
        differing=differing,
        letter_of=way_letter,
        plot=None if x is None or y is None else _plot(comparison, x, y),
        ways=[
            (column, k, _in_words(column, example))
            for column in comparison.columns
            for k, example in enumerate(column.examples)
        ],
    )
    if x is None or y is None:
        return [path]
    write_png(path.with_suffix(".png"), partial(trade_off_figure, comparison, x, y))
    return [path, path.with_suffix(".png")]


def way_letter(group: int) -> str:
    """Returns the letter of a way of measuring: a, b, … z, aa, ab, …."""
    letters = string.ascii_lowercase
    first, last = divmod(group, len(letters))
    return (letters[first - 1] if first else "") + letters[last]


def _plot(comparison: Comparison, x: Column, y: Column) -> Plot:
    caption = Markup("A point for each run that has both figures.")
    flagged = " and ".join(column.name for column in (x, y) if not column.comparable)
    if flagged:
        told = Markup(" <b>Shapes differ where {} was measured in another way:</b> compare equal ones.")
        caption += told.format(flagged)
    return plot(partial(trade_off_figure, comparison, x, y), f"{y.name} against {x.name}", caption)


def _in_words(column: Column, example: Measurement) -> str:
    """Protocol and number of images of a group, and what it has in the settings in which the groups differ."""
    known = dict(flat(example.compared_by))
    told = [f"{name} {known.get(name, 'not recorded')}" for name in column.differing]
    return "; ".join([f"{example.protocol} ({example.num_samples} images)", *([", ".join(told)] if told else [])])
