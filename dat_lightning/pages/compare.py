"""``python -m dat_lightning.pages.compare A.json B.json``: a table and a trade-off plot of several evaluations."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dat_lightning.core.errors import InputError
from dat_lightning.pages.comparison import Column, Comparison, compare, read_runs
from dat_lightning.pages.comparison_page import write_comparison
from dat_lightning.pages.trade_off import default_axes


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m dat_lightning.pages.compare",
        description="Compares evaluation files, as EvaluationReport writes them: a table of runs and figures, and a"
        " plot of two figures against each other.",
        allow_abbrev=False,
    )
    result.add_argument("files", nargs="+", type=Path, metavar="FILE", help="an evaluation.json; at least two")
    result.add_argument(
        "--output",
        type=Path,
        default=Path("comparison.html"),
        help="the page; the plot goes beside it, with the suffix .png (%(default)s)",
    )
    result.add_argument("--columns", nargs="+", metavar="NAME", help="figures to show; by default all that are shared")
    result.add_argument("--x", metavar="NAME", help="figure on the plot's horizontal axis; by default fid")
    result.add_argument("--y", metavar="NAME", help="figure on its vertical axis; by default the robust accuracy")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program.

    Args:
        argv: Arguments instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: With a sentence, if files cannot be compared.
    """
    options = parser().parse_args(argv)
    try:
        written = run(options.files, options.output, options.columns, options.x, options.y)
    except (InputError, OSError) as error:
        sys.exit(f"dat_lightning.pages.compare: error: {error}")
    sys.stdout.write(f"wrote {' and '.join(path.as_posix() for path in written)}\n")
    if len(written) == 1:
        sys.stdout.write("no plot: the runs do not share two figures for its axes; name them with --x and --y\n")


def run(
    files: Sequence[Path],
    output: Path,
    columns: Sequence[str] | None = None,
    x: str | None = None,
    y: str | None = None,
) -> list[Path]:
    """Compares evaluation files; returns the files written.

    Args:
        files: The evaluation files.
        output: The page.
        columns: Figures to show; by default all that at least two runs have.
        x: Figure on the horizontal axis of the plot.
        y: Figure on the vertical axis.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If a file is damaged, the files cannot be compared, or a figure does not exist.
    """
    if output.suffix not in (".html", ".htm"):
        raise InputError(f"--output must end in .html, got {output}")
    runs = read_runs(files)
    everything = compare(runs)
    shown = everything if columns is None else compare(runs, columns)
    default_x, default_y = default_axes(everything)
    x_column, y_column = _axis(everything, "--x", x, default_x), _axis(everything, "--y", y, default_y)
    return write_comparison(output, shown, x_column, y_column)


def _axis(comparison: Comparison, argument: str, asked: str | None, default: str | None) -> Column | None:
    name = asked if asked is not None else default
    if name is None:
        return None
    column = comparison.column(name)
    if column is None:
        shared = ", ".join(each.name for each in comparison.columns)
        raise InputError(f"{argument}: no two runs share a figure {name!r}; they share {shared}")
    return column


if __name__ == "__main__":
    main()
