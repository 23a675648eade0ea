"""What a study is told as: ``study.json``, ``study.html``, ``table.md`` for pages in Markdown, a PNG for each plot.

``python -m dat_lightning.pages.study STUDY.yaml --out FOLDER`` makes them from the runs that are there.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dat_lightning.core.errors import InputError
from dat_lightning.pages.drawing import write_png
from dat_lightning.pages.rendering import Picture, number, picture, plot, write_page
from dat_lightning.pages.study_file import Column, Study, read_study
from dat_lightning.pages.study_plots import draw, lines
from dat_lightning.pages.study_results import Result, Summary, collect, summaries, write_results
from dat_lightning.results.evaluation_file import write_text


def write_study(out: Path, study: Study, results: Sequence[Result]) -> list[Path]:
    """Writes everything into the folder of the study; returns what was written.

    Plots that no run has numbers for are left out, as the page says.
    """
    drawn = [each for each in study.plots if lines(study, each, results)]
    missing = [f"{each.variant}, seed {each.seed} is missing" for each in results if not each.done]
    missing += [f"plot {each.name} is missing: no run has {each.figure}" for each in study.plots if each not in drawn]
    rows = table(study, results)
    folders = {variant.name: variant.folder for variant in study.variants}
    seeds = ", ".join(map(str, study.seeds))
    means = (
        f"mean over those of seeds {seeds} that were run, thin lines single seeds; bands are standard"
        " deviations, of the logarithms where the axis is logarithmic, and bars reach from the least seed to the"
        " largest."
    )
    files = [out / "study.json", out / "table.md"]
    write_results(files[0], study, results)
    write_text(files[1], markdown(study, rows))
    for each in drawn:
        files.append(out / f"{each.name}.png")
        write_png(files[-1], partial(draw, study, each, results), dots_per_inch=120)
    known = next((result.provenance for result in results if result.provenance), {})
    write_page(
        out / "study.html",
        "study.html.j2",
        title=study.title,
        study=study,
        notes=missing,
        rows=rows,
        plots=[
            plot(
                partial(draw, study, each, results),
                f"{each.name}: {each.words or each.figure}",
                f"{each.words or each.figure}: {means}",
                broad=True,
            )
            for each in drawn
        ],
        pictures=_pictures(out, study, results),
        runs=[(r, study.fit_arguments(folders[r.variant], r.seed, out.as_posix())) for r in results],
        provenance={name: known[name] for name in ("versions", "python", "device") if name in known},
    )
    return [*files, out / "study.html"]


def table(study: Study, results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Returns name and cells of each row; the name says so where only some of the seeds were run."""
    rows = []
    for variant in study.variants:
        found = summaries(results, variant.name)
        runs = [result.done for result in results if result.variant == variant.name]
        some = f" ({sum(runs)} of {len(runs)} seeds)" if 0 < sum(runs) < len(runs) else ""
        rows.append((variant.name + some, [cell(column, found) for column in study.columns]))
    return rows


def markdown(study: Study, rows: Sequence[tuple[str, list[str]]]) -> str:
    """Returns the table as Markdown."""
    heads = ["", *(column.words for column in study.columns)]
    texts = [heads, ["---"] * len(heads), *([name, *cells] for name, cells in rows)]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |\n" for row in texts)


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
    if sd == 0:
        return number(mean) if mean == int(mean) else f"{mean:.3f} ± 0.000".replace("-", "−")
    # As many decimals as the deviation has digits that say something.
    decimals = min(max(0, 1 - math.floor(math.log10(sd))), 4)
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}".replace("-", "−")


def _pictures(out: Path, study: Study, results: Sequence[Result]) -> list[Picture]:
    shown = []
    for variant in study.variants:
        first = next((result for result in results if result.variant == variant.name and result.done), None)
        for name in study.pictures if first is not None else []:
            path = out / first.folder / f"{name}.png"  # type: ignore[union-attr]
            shown.append(picture(path, f"{variant.name}: {name.replace('_', ' ')}"))
    return shown


def main(args: Sequence[str] | None = None) -> None:
    """Makes page, table and plots of a study from the runs that are there."""
    parser = argparse.ArgumentParser(prog="python -m dat_lightning.pages.study", description=main.__doc__)
    parser.add_argument("study", type=Path, help="YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    given = parser.parse_args(args)
    try:
        study = read_study(given.study)
        results = collect(study, given.out)
        if not any(result.done for result in results):
            raise InputError(f"no run of {given.study} has been tested below {given.out}")  # noqa: TRY301
        write_study(given.out, study, results)
    except (InputError, FileNotFoundError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
