"""The page ``comparison.html``: a table of runs and figures, protocols, and the trade-off plot."""

import html
import string
from pathlib import Path

from dat_lightning.pages.comparison import Column, Comparison, Way
from dat_lightning.pages.drawing import write_png
from dat_lightning.pages.page import html_page, number, plot
from dat_lightning.pages.style import BASE, REPORT
from dat_lightning.pages.trade_off import trade_off_figure
from dat_lightning.results.evaluation_file import write_text


def write_comparison(path: Path, comparison: Comparison, x: Column | None, y: Column | None) -> list[Path]:
    """Writes the page, and the trade-off plot beside it as PNG; returns what was written.

    Args:
        path: The page.
        comparison: What it shows.
        x: Figure on the horizontal axis of the plot; without one there is no plot.
        y: Figure on the vertical axis.
    """
    sections = [_heading(comparison), _table(comparison), _plot(comparison, x, y), _protocols(comparison)]
    write_text(path, html_page(f"Comparison of {len(comparison.runs)} runs", sections, BASE + REPORT))
    if x is None or y is None:
        return [path]
    picture = path.with_suffix(".png")
    write_png(picture, lambda: trade_off_figure(comparison, x, y))
    return [path, picture]


def way_letter(group: int) -> str:
    """Returns the letter of a way of measuring: a, b, … z, aa, ab, …."""
    letters = string.ascii_lowercase
    first, last = divmod(group, len(letters))
    return (letters[first - 1] if first else "") + letters[last]


def _heading(comparison: Comparison) -> str:
    notes = [
        f'<p class="note"><b>{html.escape(run)}</b> is incomplete: its test stopped before its end.'
        f" {html.escape(failure)}</p>"
        for run, failure in zip(comparison.runs, comparison.failures, strict=True)
        if failure is not None
    ]
    differing: dict[tuple[str, ...], list[str]] = {}
    for column in comparison.columns:
        if not column.comparable:
            differing.setdefault(column.differing, []).append(f"<b>{html.escape(column.name)}</b>")
    for parts, names in differing.items():
        notes.append(
            f'<p class="note">The runs did not measure {", ".join(names)} in the same way: they differ in'
            f" {html.escape(', '.join(parts))}. Letters mark who did what, the ways are below, and no run is called"
            " best there.</p>"
        )
    return (
        f'<p class="kicker">Comparison</p><h1>{len(comparison.runs)} runs</h1>'
        '<p class="lead">A figure is compared where protocol, images and everything else that it was measured with'
        f' agree; the best run is <span class="best">marked</span>.</p>{"".join(notes)}'
    )


def _table(comparison: Comparison) -> str:
    heads = "".join(
        f"<th>{html.escape(column.name)}<small>{f'{column.direction} is better' if column.direction else ''}</small>"
        "</th>"
        for column in comparison.columns
    )
    rows = "".join(
        f"<tr><td>{html.escape(run)}{'' if failure is None else '<small>incomplete</small>'}</td>"
        f"{''.join(_cell(column, k) for column in comparison.columns)}</tr>"
        for k, (run, failure) in enumerate(zip(comparison.runs, comparison.failures, strict=True))
    )
    left_out = ", ".join(html.escape(name) for name in comparison.left_out)
    why = "one run alone has it, it belongs to one step count of a sweep, or it was not asked for"
    rest = f"<figcaption>Not in the table ({why}): {left_out}.</figcaption>"
    return (
        f'<figure><div class="wide"><table class="runs"><thead><tr><th>Run</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{rest if left_out else ''}</figure>"
    )


def _cell(column: Column, k: int) -> str:
    entry, group = column.entries[k], column.groups[k]
    if entry is None or group is None:
        return "<td>–</td>"
    text = number(entry.value)
    if column.best[k]:
        text = f'<span class="best">{text}</span>'
    return f"<td>{text}{'' if column.comparable else f'<sup>{way_letter(group)}</sup>'}</td>"


def _plot(comparison: Comparison, x: Column | None, y: Column | None) -> str:
    if x is None or y is None:
        return ""
    flagged = [html.escape(column.name) for column in (x, y) if not column.comparable]
    caption = "A point for each run that has both figures."
    if flagged:
        caption += (
            f" <b>Shapes differ where {' and '.join(flagged)} was measured in another way:</b> compare equal ones."
        )
    drawn = plot(lambda: trade_off_figure(comparison, x, y), f"{y.name} against {x.name}", caption)
    title = f"{html.escape(y.name)} against {html.escape(x.name)}"
    return f'<h2>{title}</h2><div class="narrow">{drawn}</div>'


def _protocols(comparison: Comparison) -> str:
    rows = "".join(
        f"<dt>{html.escape(column.name)}{'' if column.comparable else f'<sup>{way_letter(group)}</sup>'}</dt>"
        f"<dd>{html.escape(way.protocol)} ({way.num_samples} images){_measured_with(column, way)}</dd>"
        for column in comparison.columns
        for group, way in enumerate(column.ways)
    )
    return f"<h2>How it was measured</h2><dl>{rows}</dl>"


def _measured_with(column: Column, way: Way) -> str:
    """What a way was measured with besides its protocol, and what others were and this one does not say."""
    named = dict(way.measured_with)
    missing = [name for name in column.differing if name not in way.parts()]
    parts = [f"{name} {value}" for name, value in named.items()] + [f"{name} not recorded" for name in missing]
    return f"; {html.escape(', '.join(parts))}" if parts else ""
