"""``python -m dat_lightning.studies STUDY.yaml --out DIR``: trains, tests and tells all runs of a study."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dat_lightning.studies.running import list_plan, run_study


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m dat_lightning.studies",
        description="Trains and tests every run of a study, and writes study.json, study.html, table.md and plots."
        " Runs that have ended are kept, interrupted ones go on.",
        allow_abbrev=False,
    )
    result.add_argument("study", type=Path, help="the YAML of the study")
    result.add_argument("--out", type=Path, required=True, help="folder of the results")
    result.add_argument(
        "--runs", type=Path, help="folder of the runs, which studies may share; by default runs beside the results"
    )
    result.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    result.add_argument("--list", action="store_true", help="show what there is to run, and run nothing")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program.

    Args:
        argv: Arguments instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: With a sentence, if the study cannot be read or written, or with status 1 if a run failed.
    """
    options = parser().parse_args(argv)
    runs = options.out.parent / "runs" if options.runs is None else options.runs
    try:
        if options.list:
            sys.stdout.write(list_plan(options.study, runs))
            return
        failed = run_study(options.study, options.out, runs, options.jobs, _say)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"dat_lightning.studies: error: {error}")
    except KeyboardInterrupt:
        sys.exit("dat_lightning.studies: interrupted; the same command goes on")
    if failed:
        sys.exit(f"dat_lightning.studies: error: {failed} runs failed; what the others gave is in {options.out}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
