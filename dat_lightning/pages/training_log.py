"""What a training run logged for TensorBoard, over all its lives."""

from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass(frozen=True)
class Curve:
    """One logged scalar.

    Attributes:
        steps: Training steps, ascending.
        values: What was logged there.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class TrainingLog:
    """The scalars of a run.

    Attributes:
        curves: Name → curve.
        seconds: How long its lives logged, together.
    """

    curves: dict[str, Curve]
    seconds: float


def read_training_log(folder: Path) -> TrainingLog:
    """Returns what the folder of a TensorBoardLogger holds, ``version_0``, ``version_1``, … in turn.

    A life that goes on from a checkpoint logs the steps behind it once more; the later life counts. Versions without a
    scalar ``train/…`` are evaluations, and left out. Empty, if there is nothing.
    """
    found: dict[str, dict[int, float]] = {}
    seconds = 0.0
    versions = sorted({path.parent for path in folder.glob("version_*/events*")}, key=_number)
    for version in versions:
        events = EventAccumulator(str(version), size_guidance={"scalars": 0})
        events.Reload()
        scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
        training = [name for name in scalars if name.startswith("train/")]
        if not training:
            continue
        # The same for all scalars: what is logged seldom may not have come again yet.
        first = min(point.step for name in training for point in scalars[name])
        for name in found:
            found[name] = {step: value for step, value in found[name].items() if step < first}
        for name, points in scalars.items():
            # What was logged is float32, which has no more digits.
            found.setdefault(name, {}).update({point.step: float(f"{point.value:.7g}") for point in points})
        times = [point.wall_time for points in scalars.values() for point in points]
        seconds += max(times) - min(times)
    curves = {name: Curve(tuple(points), tuple(points.values())) for name, points in found.items() if points}
    return TrainingLog(curves, seconds)


def _number(version: Path) -> int:
    number = version.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1
