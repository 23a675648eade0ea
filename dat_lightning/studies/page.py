"""What a study is told as: ``study.html``, ``table.md`` for pages in Markdown, and a PNG for each plot."""

import html
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dat_lightning.pages.drawing import write_png
from dat_lightning.pages.page import html_page, number, picture, plot, settings
from dat_lightning.pages.style import BASE, REPORT
from dat_lightning.results.evaluation_file import write_text
from dat_lightning.studies.collection import Result, Summary, summaries
from dat_lightning.studies.plots import draw, lines
from dat_lightning.studies.study_file import Column, Plot, Study


def write_page(out: Path, study: Study, results: Sequence[Result]) -> list[Path]:
    """Writes the page, the table and the plots; returns what was written.

    Plots that no run has numbers for are left out, as the page says.
    """
    drawn = [each for each in study.plots if lines(study, each, results)]
    files = [out / "study.html", out / "table.md"]
    sections = [
        f'<p class="kicker">Study</p><h1>{html.escape(study.title)}</h1>'
        f'<p class="lead">{html.escape(study.question)}</p>{_notes(study, drawn, results)}',
        f"<h2>Results</h2>{table_html(study, results)}",
        *(_plot(study, each, results) for each in drawn),
        _pictures(study, results),
        _runs(results),
        _provenance(results),
    ]
    write_text(files[0], html_page(study.title, sections, BASE + REPORT))
    write_text(files[1], table_markdown(study, results))
    for each in drawn:
        files.append(out / f"{each.name}.png")
        write_png(files[-1], partial(draw, study, each, results), dots_per_inch=120)
    return files


def table_markdown(study: Study, results: Sequence[Result]) -> str:
    """Returns the table as Markdown."""
    heads = ["", *(column.words for column in study.columns)]
    rows = [[name, *cells] for name, cells in _rows(study, results)]
    rule = ["---"] * len(heads)
    return "".join(f"| {' | '.join(_piped(cell) for cell in row)} |\n" for row in [heads, rule, *rows])


def table_html(study: Study, results: Sequence[Result]) -> str:
    """Returns the table as HTML."""
    heads = "".join(f"<th>{html.escape(column.words)}</th>" for column in study.columns)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in _rows(study, results)
    )
    return (
        f'<figure><div class="wide"><table class="runs"><thead><tr><th>Run</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div><figcaption>Mean ± standard deviation over"
        f" seeds {', '.join(map(str, study.seeds))}; no ± where one seed has the figure.</figcaption></figure>"
    )


def cell(column: Column, found: Mapping[str, Summary]) -> str:
    """Returns the text of a cell."""
    if column.figure not in found:
        return "–"
    mean, sd = found[column.figure].mean, found[column.figure].sd
    if not math.isfinite(mean):
        return "not finite"
    if column.percent:
        text = f"{100 * mean:.1f}"
        return f"{text} %" if sd is None else f"{text} ± {100 * sd:.1f} %"
    if sd is None:
        return number(mean)
    # As many decimals as the deviation has digits that say something.
    decimals = max(0, 1 - math.floor(math.log10(sd))) if sd > 0 else 0
    if sd == 0 and mean == int(mean):
        return number(mean)
    decimals = min(decimals, 4) if sd > 0 else 3
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}".replace("-", "−")


def _rows(study: Study, results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    rows = []
    for variant in study.variants:
        found = summaries(results, variant.name)
        rows.append((variant.name, [cell(column, found) for column in study.columns]))
    return rows


def _piped(text: str) -> str:
    return text.replace("|", "\\|")


def _notes(study: Study, drawn: Sequence[Plot], results: Sequence[Result]) -> str:
    missing = [f"{each.variant}, seed {each.seed} is missing: {each.error}" for each in results if not each.done]
    missing += [f"plot {each.name} is missing: no run has {each.figure}" for each in study.plots if each not in drawn]
    return "".join(f'<p class="note">{html.escape(text)}</p>' for text in missing)


def _plot(study: Study, each: Plot, results: Sequence[Result]) -> str:
    words = each.words or each.figure
    seeds = ", ".join(map(str, study.seeds))
    caption = f"<b>{html.escape(words)}</b>: mean over seeds {seeds}; bands and bars are standard deviations."
    return plot(partial(draw, study, each, results), f"{each.name}: {words}", caption, broad=True)


def _pictures(study: Study, results: Sequence[Result]) -> str:
    shown = []
    for variant in study.variants:
        first = next((result for result in results if result.variant == variant.name and result.done), None)
        for name in study.pictures if first is not None else []:
            path = Path(first.folders["test"]) / f"{name}.png"  # type: ignore[union-attr]
            shown.append(picture(path, f"{variant.name}: {name.replace('_', ' ')}"))
    return f'<h2>Pictures</h2><div class="pictures">{"".join(shown)}</div>' if shown else ""


def _runs(results: Sequence[Result]) -> str:
    items = "".join(
        f"<details><summary>{html.escape(result.variant)}, seed {result.seed}:"
        f" {'done' if result.done else html.escape(result.error)}</summary>"
        f"<pre>{html.escape(chr(10).join(result.commands))}</pre>"
        f"{settings({'seconds': result.seconds, 'configuration': result.config_sha256})}</details>"
        for result in results
    )
    return f"<h2>Runs</h2>{items}"


def _provenance(results: Sequence[Result]) -> str:
    known = next((result.provenance for result in results if result.provenance), {})
    protocols = next((result.protocols for result in results if result.protocols), {})
    told = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in protocols.items()
    )
    table = f"<details><summary>How figures were measured</summary><table>{told}</table></details>" if told else ""
    shown: dict[str, Any] = {name: known[name] for name in ("versions", "python", "device") if name in known}
    return (
        f"<h2>Where these figures come from</h2>{settings(shown)}{table}"
        "<footer>All numbers are in study.json beside this page, each run's own page in its folder.</footer>"
    )
