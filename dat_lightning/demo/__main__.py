"""``python -m dat_lightning.demo``: trains both stages on digits, judges them, and writes a report."""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dat_lightning.core import AUCCurriculum
from dat_lightning.core.errors import InputError
from dat_lightning.data import DigitsDataModule, to_uint8_rgb
from dat_lightning.demo import training
from dat_lightning.demo.evaluation import ATTACK, evaluate
from dat_lightning.demo.judge import Judge, digits_for_testing
from dat_lightning.demo.pictures import write_comparison
from dat_lightning.demo.plots import NAMES
from dat_lightning.demo.report import write_report
from dat_lightning.demo.results import Outcome, write_results
from dat_lightning.demo.training import STAGES, Stage
from dat_lightning.runs.error_sentences import error_sentence


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m dat_lightning.demo",
        description="Trains both stages of Dual Adversarial Training on scikit-learn's digits, judges them by one"
        " protocol, and writes OUT/report.html. Takes about five minutes on 2 CPU cores; nothing is downloaded.",
    )
    result.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of all outputs (%(default)s)")
    result.add_argument(
        "--configs", type=Path, default=Path("configs/digits"), help="folder of stage1.yaml, stage2.yaml (%(default)s)"
    )
    result.add_argument(
        "--skip-training", action="store_true", help="judge the checkpoints that are already below OUT, and report"
    )
    result.add_argument("--quick", action="store_true", help="for tests: a run that is too short to be good")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demonstration.

    Args:
        argv: Arguments instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: With a sentence, if a file is missing or cannot be written.
    """
    options = parser().parse_args(argv)
    try:
        run(options.out, options.configs, train=not options.skip_training, quick=options.quick)
    except Exception as error:
        sentence = error_sentence(error)
        if sentence is None:
            raise
        sys.exit(f"dat_lightning.demo: error: {sentence}")


def run(out: Path, configs: Path, *, train: bool = True, quick: bool = False) -> Outcome:
    """Trains, judges and reports; returns what was found.

    Args:
        out: Folder of all outputs.
        configs: Folder of the configurations.
        train: Whether to train, or to take the checkpoints below ``out``.
        quick: Whether to cut everything short, for a test.

    Raises:
        FileNotFoundError: If a configuration or a checkpoint is missing.
        InputError: If ``out`` cannot be written to.
    """
    check_writable(out)
    settings = {stage: training.read_config(configs, stage, out, quick=quick) for stage in STAGES}
    seconds: dict[str, float] = {}
    for stage in STAGES:
        path = training.write_config(settings[stage], out, stage)
        if train:
            print(f"\n{NAMES[stage]}", flush=True)
            start = time.perf_counter()
            training.train(path, out, stage)
            seconds[stage] = time.perf_counter() - start
    print("\nEvaluation", flush=True)
    judge = Judge()
    outcome = judge_both(out, settings, judge, seconds, quick=quick)
    write_results(out, outcome)
    write_comparison(out / "samples.png", outcome.evaluations)
    write_report(out / "report.html", outcome, judge)
    print(summary(out, outcome))
    return outcome


def judge_both(
    out: Path,
    settings: Mapping[Stage, Mapping[str, Any]],
    judge: Judge,
    seconds: Mapping[str, float],
    *,
    quick: bool = False,
) -> Outcome:
    """Returns the figures of both trained stages, from the same seeds and by the same protocol.

    Args:
        out: Folder with both stages.
        settings: Stage → its configuration, which says how it generates.
        judge: Judges samples.
        seconds: How long the stages trained; for others, what their logs say.
        quick: Whether training was cut short.

    Raises:
        FileNotFoundError: If a stage has not been trained.
        InputError: If the stages are to generate different numbers of samples.
    """
    start = time.perf_counter()
    samplers = {stage: training.sampler(settings[stage]) for stage in STAGES}
    sizes = [samplers[stage].num_samples for stage in STAGES]
    if len(set(sizes)) > 1:
        raise InputError(f"PGDSampler.num_samples is {sizes[0]} in Stage 1 and {sizes[1]} in Stage 2: make them equal")
    modules = {stage: training.load(out, stage) for stage in STAGES}
    seeds = DigitsDataModule().held_out_seeds()
    x, y = digits_for_testing()
    real_images, real_labels = to_uint8_rgb(x), y
    if quick:
        x, y = x[::4], y[::4]
    evaluations = {
        stage: evaluate(
            modules[stage].energy_model, samplers[stage], seeds, x, y, judge, NAMES[stage].partition(":")[0]
        )
        for stage in STAGES
    }
    histories = {stage: training.read_history(out, stage) for stage in STAGES}
    curriculum = next(m for m in modules["stage2"].modules() if isinstance(m, AUCCurriculum))
    durations: dict[str, float] = {stage: seconds.get(stage, histories[stage].seconds) for stage in STAGES}
    return Outcome(
        evaluations=evaluations,
        histories=histories,
        real_images=real_images,
        real=judge.score(real_images, real_labels),
        contrastive_steps=int(curriculum.num_steps),
        auc_threshold=curriculum.auc_threshold,
        seconds={**durations, "evaluation": time.perf_counter() - start},
        quick=quick,
    )


def check_writable(out: Path) -> None:
    """Makes the folder, and tries to write to it before minutes of training.

    Raises:
        InputError: If that fails.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be written to: {error.strerror}") from error


def summary(out: Path, outcome: Outcome) -> str:
    """Returns what the program says in the end."""
    first, second = (outcome.evaluations[stage] for stage in STAGES)
    rows = [
        ("accuracy", *(f"{e.robustness.accuracy:.1%}" for e in (first, second))),
        (f"robust accuracy (L2 {ATTACK.eps:g})", *(f"{e.robustness.robust_accuracy:.1%}" for e in (first, second))),
        ("Fréchet distance", *(f"{e.best.fid:.1f}" for e in (first, second))),
        ("sampling steps", *(str(e.best_steps) for e in (first, second))),
        ("label agreement", *(f"{e.best.label_agreement:.1%}" for e in (first, second))),
        ("precision", *(f"{e.best.precision:.2f}" for e in (first, second))),
        ("recall", *(f"{e.best.recall:.2f}" for e in (first, second))),
        ("contrastive steps T", "", str(outcome.contrastive_steps)),
    ]
    config = (out / "stage2" / "config-input.yaml").as_posix()
    checkpoint = training.checkpoint_path(out, "stage2").as_posix()
    lines = ["", f"{'':24}{'Stage 1':>10}{'Stage 2':>10}"]
    lines += [f"{name:24}{one:>10}{two:>10}" for name, one, two in rows]
    lines += [
        "",
        f"In {out.as_posix()}: report.html, samples.png, results.json, samples_stage1.npz, samples_stage2.npz, and the",
        "checkpoints and logs of the stages in stage1/ and stage2/.",
        "Next:",
        f"  open {(out / 'report.html').as_posix()} in a browser",
        f"  tensorboard --logdir {out.as_posix()}",
        f"  dat-lightning predict --config {config} --ckpt_path {checkpoint}",
        "  README.md: your own data, network and threat model",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
