"""``python -m dat_lightning.demo``: ``fit``, ``fit``, ``test`` and ``test`` of both stages on digits, and one page.

Every step is a command that a user could give, and is printed as such. A demonstration that was interrupted goes on.
"""

import argparse
import shlex
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from dat_lightning import cli
from dat_lightning.core.errors import InputError
from dat_lightning.pages.demo_page import Stage, read_stage, table, write_demo_page
from dat_lightning.pages.drawing import require_matplotlib

STAGES = ("stage1", "stage2")

# About a run that goes on in its folder, a test without training's callbacks, and names that Lightning's dependencies
# changed.
_EXPECTED_WARNINGS = (
    "Checkpoint directory .* exists and is not empty",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"\s*By default only one JsonargparseDeprecationWarning",
)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m dat_lightning.demo",
        description="Trains and tests both stages of Dual Adversarial Training on scikit-learn's digits, and writes"
        " OUT/report.html. Takes about two minutes on 2 CPU cores; nothing is downloaded. Run again after an"
        " interruption, it goes on; to begin anew, remove OUT.",
        allow_abbrev=False,
    )
    result.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of all outputs (%(default)s)")
    help_text = "folder of stage1.yaml, stage2.yaml and evaluate.yaml (%(default)s)"
    result.add_argument("--configs", type=Path, default=Path("configs/digits"), help=help_text)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demonstration.

    Args:
        argv: Arguments instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: With a sentence, if a file is missing or cannot be written; with the command line's own status, if
            one of its runs fails or is stopped.
    """
    options = parser().parse_args(argv)
    try:
        check(options.configs, options.out)
        for arguments in commands(options.configs, options.out):
            run(arguments)
        stages = [read_stage(options.out / name) for name in STAGES]
        write_demo_page(
            options.out / "report.html", stages, [_in_shell(each) for each in commands(options.configs, options.out)]
        )
    except (InputError, OSError) as error:
        sys.exit(f"dat_lightning.demo: error: {error}")
    print(_summary(options.out, stages))


def check(configs: Path, out: Path) -> None:
    """Looks for what minutes of training would be in vain without.

    Raises:
        FileNotFoundError: If a configuration is missing.
        OSError: If nothing can be written below ``out``.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require_matplotlib("demo")
    for name in (*STAGES, "evaluate"):
        if not (configs / f"{name}.yaml").is_file():
            raise FileNotFoundError(
                f"no configuration at {(configs / name).as_posix()}.yaml: run from the root of a clone of the"
                " repository, or name the folder that has it as --configs"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"--out {out} cannot be written to: {error.strerror}") from error


def commands(configs: Path, out: Path) -> list[list[str]]:
    """Returns the arguments of ``dat-lightning``, of one run after the other."""
    fits, tests = [], []
    checkpoints = {key: (out / key / "checkpoints" / "last.ckpt").as_posix() for key in STAGES}
    for key in STAGES:
        config = ["--config", (configs / f"{key}.yaml").as_posix()]
        folder = ["--trainer.default_root_dir", (out / key).as_posix()]
        start = ["--model.init_from", checkpoints["stage1"]] if key == "stage2" else []
        fits.append(["fit", *config, *folder, *start, "--ckpt_path", "last"])
        protocol = ["--config", (configs / "evaluate.yaml").as_posix()]
        tests.append(["test", *config, *protocol, *folder, "--ckpt_path", checkpoints[key]])
    return fits + tests


def run(arguments: Sequence[str]) -> None:
    """Does in this process what ``dat-lightning`` with these arguments does, so that torch is loaded once."""
    print(f"\n$ {_in_shell(arguments)}", flush=True)
    before = sys.argv
    sys.argv = ["dat-lightning", *arguments]
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            cli.main()
    finally:
        sys.argv = before


def _summary(out: Path, stages: Sequence[Stage]) -> str:
    """Returns what the program says in the end."""
    lines = ["", f"{'':28}{'Stage 1':>10}{'Stage 2':>10}{'real':>10}"]
    lines += [
        f"{name:28}" + "".join(f"{cell:>10}" for cell in [*cells, real]) for name, _, cells, real in table(stages)
    ]
    where = out.as_posix()
    lines += [
        "",
        f"In {where}: report.html, samples.png, and in stage1/ and stage2/ the checkpoints, logs and evaluations.",
        "Next:",
        f"  open {where}/report.html in a browser",
        f"  tensorboard --logdir {where}",
        f"  dat-lightning explore --ckpt_path {where}/stage2/checkpoints/last.ckpt",
        "  README.md: your own data, network and threat model",
    ]
    return "\n".join(lines)


def _in_shell(arguments: Sequence[str]) -> str:
    return shlex.join(["dat-lightning", *arguments])


if __name__ == "__main__":
    main()
