"""Gathers what the runs of a study have left: figures, sweeps over steps, curves, and their means over seeds."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dat_lightning.core.errors import InputError
from dat_lightning.results.evaluation_file import (
    Evaluation,
    is_of_one_step_count,
    primitive,
    read_evaluation,
    restored,
    write_text,
)
from dat_lightning.studies.execution import Outcome, command, shown, state_of
from dat_lightning.studies.planning import Plan, Task
from dat_lightning.version import __version__

FORMAT = "dat_lightning study"
SCHEMA_VERSION = 1

Curve = dict[str, list[float]]


@dataclass(frozen=True)
class Result:
    """What a variant with one seed has given.

    Attributes:
        variant: Its name.
        seed: The seed.
        value: The number that is varied.
        done: Whether training and test have ended well.
        error: Why not.
        folders: Of the training and of the test.
        commands: That were run for them.
        seconds: That they took.
        config_sha256: Hashes of both configurations, the first 16 digits; they name the folders.
        figures: Name → number.
        sweeps: Figure → ``steps`` and ``values`` over the number of sampling steps.
        curves: Logged scalar → ``steps`` and ``values`` over training.
        protocols: Figure → how it was measured.
        provenance: Versions, device, hashes of the checkpoint and its weights.
    """

    variant: str
    seed: int
    value: float | None
    done: bool
    error: str
    folders: dict[str, str]
    commands: list[str]
    seconds: dict[str, float]
    config_sha256: dict[str, str]
    figures: dict[str, float] = field(default_factory=dict)
    sweeps: dict[str, Curve] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


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


def collect(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[Result]:
    """Returns the result of each variant and seed; curves also of trainings that failed."""
    values = {variant.name: variant.value for variant in plan.study.variants}
    results = []
    for member in plan.members:
        training, test = plan.tasks[member.training], plan.tasks[member.test]
        ended = [outcomes[task.key] for task in (training, test)]
        errors = [f"{task.name}: {o.error}" for task, o in zip((training, test), ended, strict=True) if not o.done]
        curves = read_curves(training.folder, plan.study.curves)
        done = not errors
        evaluation = read_evaluation(test.result) if done else Evaluation("", [])
        results.append(
            Result(
                variant=member.variant,
                seed=member.seed,
                value=values[member.variant],
                done=done,
                error=errors[0] if errors else "",
                folders={"training": training.folder.as_posix(), "test": test.folder.as_posix()},
                commands=[_command(task) for task in (training, test)],
                seconds={"training": round(ended[0].seconds, 1), "test": round(ended[1].seconds, 1)},
                config_sha256={"training": training.key, "test": test.key},
                figures={**_curve_figures(curves), **figures_of(evaluation)} if done else {},
                sweeps=sweeps_of(evaluation),
                curves=curves,
                protocols={e.name: e.protocol for e in evaluation.entries if not is_of_one_step_count(e.name)},
                provenance={
                    name: evaluation.provenance.get(name)
                    for name in ("versions", "python", "device", "checkpoint", "weights_sha256")
                    if name in evaluation.provenance
                },
            )
        )
    return results


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


def sweeps_of(evaluation: Evaluation) -> dict[str, Curve]:
    """Returns figure → values over the number of sampling steps."""
    return {
        entry.name: {"steps": list(entry.details["sweep_steps"]), "values": list(entry.details["sweep"])}
        for entry in evaluation.entries
        if "sweep" in entry.details and "sweep_steps" in entry.details
    }


def read_curves(folder: Path, names: Sequence[str]) -> dict[str, Curve]:
    """Returns the logged scalars of a training, over all its lives; of a step logged twice, the later value."""
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    logs = sorted({path.parent for path in folder.glob("logs/version_*/events*")}, key=_number)
    for log in logs:
        events = EventAccumulator(str(log), size_guidance={"scalars": 0})
        events.Reload()
        for name in set(names) & set(events.Tags()["scalars"]):
            points = events.Scalars(name)
            # A life that went on from a checkpoint begins before the last one's end.
            first = min((point.step for point in points), default=0)
            found[name] = {step: value for step, value in found[name].items() if step < first}
            # What was logged is float32, which has no more digits.
            found[name].update({point.step: float(f"{point.value:.7g}") for point in points})
    return {
        name: {"steps": [float(step) for step in points], "values": list(points.values())}
        for name, points in found.items()
        if points
    }


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


def write_results(out: Path, plan: Plan, results: Sequence[Result]) -> Path:
    """Writes ``study.json``, and returns where."""
    study = plan.study
    contents = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "note": "NaN, Infinity and -Infinity are written as strings; sd is that of a sample, over seeds",
        "title": study.title,
        "question": study.question,
        "file": study.path.as_posix(),
        "seeds": study.seeds,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "variants": [
            {
                "name": variant.name,
                "value": variant.value,
                "figures": {name: asdict(each) for name, each in summaries(results, variant.name).items()},
            }
            for variant in study.variants
        ],
        "protocols": {name: text for result in results for name, text in result.protocols.items()},
        "runs": [{name: value for name, value in asdict(result).items() if name != "protocols"} for result in results],
    }
    path = out / "study.json"
    write_text(path, json.dumps(primitive(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_results(path: Path) -> dict[str, Any]:
    """Returns the contents of a ``study.json``.

    Raises:
        FileNotFoundError: If there is none.
        InputError: If it is damaged or no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no study.json at {path}")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise InputError(f"{path} is no result of a study")
    if contents.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {contents.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    whole: dict[str, Any] = restored(contents)
    return whole


def previous_runs(out: Path) -> dict[tuple[str, int, str], Path]:
    """Returns (variant, seed, training or test) → folder of the last call; nothing if there was none."""
    try:
        runs = read_results(out / "study.json")["runs"]
    except (OSError, ValueError):
        return {}
    return {(r["variant"], r["seed"], what): Path(folder) for r in runs for what, folder in r["folders"].items()}


def _command(task: Task) -> str:
    """The command that was run; what would be run if that is not known."""
    return str(state_of(task).get("command") or shown(command(task)))


def _curve_figures(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Last and largest value of each curve."""
    figures: dict[str, float] = {}
    for name, curve in curves.items():
        figures[name] = curve["values"][-1]
        figures[f"max {name}"] = max(curve["values"])
    return figures


def _number(log: Path) -> int:
    number = log.name.rpartition("_")[2]
    return int(number) if number.isdecimal() else -1
