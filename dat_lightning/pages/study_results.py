"""What the runs of a study have left: figures, sweeps over sampling steps, curves, and their means over seeds."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dat_lightning.pages.study_file import Study
from dat_lightning.pages.training_log import Curve, TrainingLog, read_training_log
from dat_lightning.results.evaluation_file import (
    Evaluation,
    is_of_one_step_count,
    primitive,
    read_evaluation,
    write_text,
)
from dat_lightning.version import __version__

FORMAT = "dat_lightning study"
SCHEMA_VERSION = 2

Points = dict[str, list[float]]


@dataclass(frozen=True)
class Result:
    """What a variant with one seed has given.

    Attributes:
        variant: Its name.
        seed: The seed.
        value: The number that is varied.
        folder: Of the run.
        done: Whether it has been tested.
        figures: Name → number.
        sweeps: Figure → ``steps`` and ``values`` over the number of sampling steps, or of an edit's.
        curves: Logged scalar → ``steps`` and ``values`` over training.
        provenance: Versions, device, hashes of the checkpoint and its weights.
        better: Figure → what is better, ``higher`` or ``lower``, as far as its evaluator says it.
    """

    variant: str
    seed: int
    value: float | None
    folder: str
    done: bool
    figures: dict[str, float] = field(default_factory=dict)
    sweeps: dict[str, Points] = field(default_factory=dict)
    curves: dict[str, Points] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    better: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A figure over the seeds of a variant.

    Attributes:
        mean: Over the seeds.
        sd: Standard deviation of a sample; ``None`` for one seed.
        values: Of each seed.
    """

    mean: float
    sd: float | None
    values: tuple[float, ...]


def collect(study: Study, out: Path) -> list[Result]:
    """Returns the result of each variant and seed; curves also of trainings that have not been tested."""
    results = []
    for variant in study.variants:
        for seed in study.seeds_of(variant):
            folder = out / study.folder(variant.folder, seed)
            file = folder / "evaluation.json"
            evaluation = read_evaluation(file) if file.is_file() else _UNTESTED
            done = evaluation.failure is None
            if not done:  # what a test that failed has measured is no part of a mean
                evaluation = _UNTESTED
            log = read_training_log(folder / "logs")
            curves = {name: _points(log.curves[name]) for name in study.curves if name in log.curves}
            figures = {**_ends_of(curves), **_time_of(log), **figures_of(evaluation)} if done else {}
            known = {name: evaluation.provenance[name] for name in _PROVENANCE if name in evaluation.provenance}
            better = {entry.name: str(entry.better) for entry in evaluation.entries if entry.better is not None}
            shown, sweeps = folder.relative_to(out).as_posix(), sweeps_of(evaluation)
            run = Result(variant.name, seed, variant.value, shown, done, figures, sweeps, curves, known, better)
            results.append(run)
    return results


_UNTESTED = Evaluation("", [], failure="there was no test")
_PROVENANCE = ("versions", "python", "device", "checkpoint", "weights_sha256")


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """Returns name → number of all figures but those of single step counts; ``{name} num_steps`` is the best count."""
    figures: dict[str, float] = {}
    for entry in evaluation.entries:
        if is_of_one_step_count(entry.name):
            continue
        figures[entry.name] = entry.value
        if "sweep" in entry.details and "num_steps" in entry.details:
            figures[f"{entry.name} num_steps"] = float(entry.details["num_steps"])
    return figures


def sweeps_of(evaluation: Evaluation) -> dict[str, Points]:
    """Returns figure → values over the number of sampling steps, or of an edit's steps, from none on."""
    sweeps: dict[str, Points] = {}
    for entry in evaluation.entries:
        if "sweep" in entry.details and "sweep_steps" in entry.details:
            sweeps[entry.name] = {"steps": list(entry.details["sweep_steps"]), "values": list(entry.details["sweep"])}
        elif entry.details.get("after_each_step"):
            values = list(entry.details["after_each_step"])
            sweeps[entry.name] = {"steps": [float(step) for step in range(len(values))], "values": values}
    return sweeps


def summaries(results: Sequence[Result], variant: str) -> dict[str, Summary]:
    """Returns figure → its mean and standard deviation over the seeds of a variant that have it."""
    found: dict[str, list[float]] = {}
    for result in results:
        if result.variant == variant:
            for name, value in result.figures.items():
                found.setdefault(name, []).append(value)
    return {name: summary(values) for name, values in found.items()}


def summary(values: Sequence[float]) -> Summary:
    """Returns mean and standard deviation (of a sample, n − 1) of numbers; not finite if one of them is not."""
    if not all(math.isfinite(value) for value in values):
        return Summary(math.nan, math.nan, tuple(values))
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))


def write_results(path: Path, study: Study, results: Sequence[Result]) -> None:
    """Writes all numbers of a study as JSON."""
    contents = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "note": "NaN, Infinity and -Infinity are written as strings; sd is that of a sample, over seeds",
        "title": study.title,
        "question": study.question,
        "file": study.path.as_posix(),
        "seeds": study.seeds,
        "version": __version__,
        "variants": [
            {
                "name": variant.name,
                "value": variant.value,
                "figures": {name: asdict(each) for name, each in summaries(results, variant.name).items()},
            }
            for variant in study.variants
        ],
        "runs": [asdict(result) for result in results],
    }
    write_text(path, json.dumps(primitive(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _time_of(log: TrainingLog) -> dict[str, float]:
    return {"train/seconds": log.seconds} if log.curves else {}


def _points(curve: Curve) -> Points:
    return {"steps": list(map(float, curve.steps)), "values": list(curve.values)}


def _ends_of(curves: Mapping[str, Points]) -> dict[str, float]:
    """Last and largest value of each curve."""
    last = {name: curve["values"][-1] for name, curve in curves.items()}
    return last | {f"max {name}": max(curve["values"]) for name, curve in curves.items()}
