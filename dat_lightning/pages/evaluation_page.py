"""The page ``evaluation.html``: figures with their protocols, plots, pictures, and where they come from."""

import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dat_lightning.pages.figure_plots import evaluation_plots, names_over_radii
from dat_lightning.pages.page import breakable, html_page, number, picture, settings
from dat_lightning.pages.style import BASE, REPORT
from dat_lightning.results.evaluation_file import Entry, Evaluation, is_of_one_step_count, write_text

# Shown elsewhere on the page.
_APART = ("pictures", "captions", "warnings")


def write_evaluation_page(path: Path, evaluation: Evaluation, pictures: Mapping[str, str] | None = None) -> None:
    """Writes the page of an evaluation, one file that needs no other.

    Args:
        path: The file.
        evaluation: What the JSON file holds; pictures with relative paths are looked for in the folder of ``path``.
        pictures: Paths of further PNG files → captions.
    """
    sections = [
        _heading(evaluation),
        _failure(evaluation),
        _warnings(evaluation),
        _table(evaluation),
        _plots(evaluation),
        _pictures(evaluation, path.parent, pictures or {}),
        _provenance(evaluation),
    ]
    write_text(path, html_page(f"Evaluation of {evaluation.name}", sections, BASE + REPORT))


def _heading(evaluation: Evaluation) -> str:
    known = evaluation.provenance
    parts = [f"{len(evaluation.entries)} figures"]
    if known.get("date"):
        parts.append(f"measured on {known['date'][:10]}")
    if known.get("seconds") is not None:
        parts.append(f"in {_duration(float(known['seconds']))}")
    if known.get("device"):
        processes = int(known.get("num_processes") or 1)
        parts.append(f"on {known['device']}" + (f" with {processes} processes" if processes > 1 else ""))
    checkpoint = known.get("checkpoint")
    if checkpoint:
        weights = f"The weights are those of <code>{html.escape(str(checkpoint['path']))}</code>."
    else:
        weights = "The weights come from no checkpoint file: they were in memory when the test began, or are random."
    return (
        f'<p class="kicker">Evaluation</p><h1>{html.escape(evaluation.name)}</h1>'
        f'<p class="lead">{html.escape(" ".join(parts))}.</p><p>{weights}</p>'
    )


def _failure(evaluation: Evaluation) -> str:
    if evaluation.failure is None:
        return ""
    return (
        '<p class="note"><b>Incomplete.</b> The test stopped before its end; what was measured by then is below.'
        f" {html.escape(evaluation.failure)}</p>"
    )


def _warnings(evaluation: Evaluation) -> str:
    found: dict[str, None] = {}
    for entry in evaluation.entries:
        found |= dict.fromkeys(f"<b>{html.escape(entry.source)}.</b> {html.escape(text)}" for text in _warned(entry))
    return "".join(f'<p class="note">{text}</p>' for text in found)


def _warned(entry: Entry) -> list[str]:
    texts = entry.details.get("warnings", [])
    return [texts] if isinstance(texts, str) else [str(text) for text in texts]


def _table(evaluation: Evaluation) -> str:
    many = names_over_radii(evaluation.entries)
    steps = [entry for entry in evaluation.entries if is_of_one_step_count(entry.name)]
    radii = [entry for entry in evaluation.entries if entry.name in many]
    shown = [entry for entry in evaluation.entries if entry not in steps and entry not in radii]
    folded = [
        f"<details><summary>{len(entries)} figures of single {what}</summary>{_rows(entries)}</details>"
        for entries, what in ((radii, "radii, plotted below"), (steps, "numbers of sampling steps"))
        if entries
    ]
    return f"<h2>Figures</h2>{_rows(shown) if shown else ''}{''.join(folded)}"


def _rows(entries: Sequence[Entry]) -> str:
    rows: list[str] = []
    for source, group in groupby(entries, key=lambda entry: entry.source):
        rows.append(f'<tr class="source"><th colspan="4">{html.escape(source)}</th></tr>')
        rows += [_row(entry) for entry in group]
    heads = '<th>Figure</th><th class="value">Value</th><th class="value">Images</th><th>How it was measured</th>'
    return f'<table class="figures"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _row(entry: Entry) -> str:
    rest = {name: value for name, value in entry.details.items() if name not in _APART}
    interval = rest.get("confidence_interval")
    ends = ""
    if isinstance(interval, Sequence) and len(interval) == 2:
        ends = f"<small>{number(interval[0])} … {number(interval[1])}</small>"
    if entry.measured_with:
        rest["measured with"] = entry.measured_with
    more = f"<details><summary>Details</summary>{settings(rest)}</details>" if rest else ""
    return (
        f'<tr><td class="name">{breakable(entry.name)}</td><td class="value">{number(entry.value)}{ends}</td>'
        f'<td class="value samples">{entry.num_samples}</td>'
        f'<td class="protocol">{html.escape(entry.protocol)}{more}</td></tr>'
    )


def _plots(evaluation: Evaluation) -> str:
    plots = "".join(evaluation_plots(evaluation.entries))
    return f'<h2>Plots</h2><div class="panels">{plots}</div>' if plots else ""


def _pictures(evaluation: Evaluation, folder: Path, further: Mapping[str, str]) -> str:
    captions: dict[str, str] = {}
    for entry in evaluation.entries:
        names = [str(name) for name in entry.details.get("pictures", [])]
        said: list[Any] = list(entry.details.get("captions", []))
        said += [f"{entry.name}: {Path(name).stem.replace('_', ' ')}" for name in names[len(said) :]]
        for name, caption in zip(names, said, strict=False):
            captions.setdefault(name, str(caption))
    shown = [picture(folder / name, caption) for name, caption in {**captions, **further}.items()]
    return f'<h2>Pictures</h2><div class="pictures">{"".join(shown)}</div>' if shown else ""


def _provenance(evaluation: Evaluation) -> str:
    known = dict(evaluation.provenance)
    long = {name: known.pop(name) for name in ("module", "data") if known.get(name)}
    folded = "".join(
        f"<details><summary>{name.capitalize()}: {html.escape(str(part.get('class', '')))}</summary>"
        f"{settings(part.get('hyperparameters') or {'hyperparameters': None})}</details>"
        for name, part in long.items()
    )
    return (
        f"<h2>Where these figures come from</h2>{settings(known)}{folded}"
        "<footer>The same figures are in the JSON file beside this page. Several of those files become one table with"
        " <code>python -m dat_lightning.pages.compare A.json B.json</code>.</footer>"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
