"""Curves of the two stages of a run, from TensorBoard's event files.

python -m tests.benchmarks.curves STAGE1_LOGS STAGE2_LOGS --output curves.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
from matplotlib import pyplot as plt

PANELS = (
    (0, "Stage 1: loss", ("train/loss",)),
    (0, "Stage 1: robust accuracy in training", ("train/robust_accuracy",)),
    (1, "Stage 2: loss terms", ("train/energy_loss", "train/classification_loss")),
    (1, "Stage 2: contrastive steps T", ("train/contrastive_steps",)),
    (1, "Stage 2: AUC, real against contrastive", ("train/auc",)),
    (1, "Stage 2: energies", ("train/energy_real", "train/energy_contrast")),
)


def scalars(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of a scalar, over all event files below a folder."""
    steps: list[int] = []
    values: list[float] = []
    for file in sorted(folder.rglob("events.out.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        if name in events.Tags()["scalars"]:
            found = events.Scalars(name)
            steps += [event.step for event in found]
            values += [event.value for event in found]
    return steps, values


def smoothed(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """Returns the exponential average, without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + 1 - decay
        result.append(average / weight)
    return result


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(args)
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (stage, title, names) in zip(axes.flat, PANELS, strict=True):
        for k, name in enumerate(names):
            steps, values = scalars(options.logs[stage], name)
            label = name.removeprefix("train/").replace("_", " ")
            # T is a count and needs no average.
            exact = name == "train/contrastive_steps"
            axis.plot(steps, values, color=f"C{k}", alpha=1 if exact else 0.25, linewidth=1)
            if not exact:
                axis.plot(steps, smoothed(values), color=f"C{k}", label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
