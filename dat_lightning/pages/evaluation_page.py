"""The page ``evaluation.html``: figures with their protocols, plots, pictures, and where they come from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dat_lightning.pages.figure_plots import evaluation_plots, names_over_radii
from dat_lightning.pages.rendering import Picture, picture, write_page
from dat_lightning.results.evaluation_file import Evaluation, is_of_one_step_count
from dat_lightning.results.measurement import Measurement

# Shown elsewhere on the page.
_APART = ("pictures", "captions", "warnings")


class _Row(NamedTuple):
    """A figure in the table: with the ends of its confidence interval, if it has one, and what unfolds below it."""

    entry: Measurement
    interval: Sequence[float]
    details: Mapping[str, Any]


def write_evaluation_page(path: Path, evaluation: Evaluation, pictures: Mapping[str, str] | None = None) -> None:
    """Writes the page of an evaluation, one file that needs no other.

    Args:
        path: The file.
        evaluation: What the JSON file holds; pictures with relative paths are looked for in the folder of ``path``.
        pictures: Paths of further PNG files → captions.
    """
    entries = evaluation.entries
    steps = [entry for entry in entries if is_of_one_step_count(entry.name)]
    radii = [entry for entry in entries if entry.name in names_over_radii(entries)]
    folded = {"radii, plotted below": radii, "numbers of sampling steps": steps}
    known = {"checkpoint": None, **evaluation.provenance}
    write_page(
        path,
        "evaluation.html.j2",
        title=f"Evaluation of {evaluation.name}",
        evaluation=evaluation,
        lead=_lead(evaluation),
        warnings=list(dict.fromkeys((entry.source, text) for entry in entries for text in _warned(entry))),
        shown=[_row(entry) for entry in entries if entry not in steps and entry not in radii],
        folded=[(what, [_row(entry) for entry in some]) for what, some in folded.items()],
        plots=evaluation_plots(entries),
        pictures=_pictures(evaluation, path.parent, pictures or {}),
        classes={name: known.pop(name) for name in ("module", "data") if known.get(name)},
        provenance=known,
    )


def _lead(evaluation: Evaluation) -> str:
    """How many figures, when, in what time and where."""
    known = evaluation.provenance
    parts = [f"{len(evaluation.entries)} figures"]
    if known.get("date"):
        parts.append(f"measured on {known['date'][:10]}")
    if known.get("seconds") is not None:
        parts.append(f"in {_duration(float(known['seconds']))}")
    if known.get("device"):
        processes = int(known.get("num_processes") or 1)
        parts.append(f"on {known['device']}" + (f" with {processes} processes" if processes > 1 else ""))
    return " ".join(parts)


def _warned(entry: Measurement) -> list[str]:
    texts = entry.details.get("warnings", [])
    return [texts] if isinstance(texts, str) else [str(text) for text in texts]


def _row(entry: Measurement) -> _Row:
    details = {name: value for name, value in entry.details.items() if name not in _APART}
    interval = details.get("confidence_interval")
    # Sentences have no digests.
    details |= {name: value for name, value in entry.settings.items() if "sha256:" in str(value)}
    return _Row(entry, interval if isinstance(interval, Sequence) and len(interval) == 2 else (), details)


def _pictures(evaluation: Evaluation, folder: Path, further: Mapping[str, str]) -> list[Picture]:
    captions: dict[str, str] = {}
    for entry in evaluation.entries:
        names = [str(name) for name in entry.details.get("pictures", [])]
        said: list[Any] = list(entry.details.get("captions", []))
        said += [f"{entry.name}: {Path(name).stem.replace('_', ' ')}" for name in names[len(said) :]]
        for name, caption in zip(names, said, strict=False):
            captions.setdefault(name, str(caption))
    return [picture(folder / name, caption) for name, caption in {**captions, **further}.items()]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
