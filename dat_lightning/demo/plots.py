"""The report's diagrams, with one colour per stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

try:
    import matplotlib.pyplot as plt
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the demo draws with matplotlib: pip install 'dat-lightning[demo]'") from error

from dat_lightning.demo.evaluation import ATTACK, ATTACK_STEPS, Evaluation
from dat_lightning.demo.judge import Quality
from dat_lightning.demo.training import STAGES, Curve, History, Stage

COLORS: Mapping[Stage, str] = {"stage1": "#c2701c", "stage2": "#1f5fae"}
NAMES: Mapping[Stage, str] = {"stage1": "Stage 1: robust classifier", "stage2": "Stage 2: DAT"}
REAL_COLOR = "#64748b"

# Batches that a training curve is averaged over, out of those logged.
_SMOOTHING = 5


def sweep_figure(evaluations: Mapping[Stage, Evaluation], real: Quality) -> Any:
    """Returns the quality of samples against the number of sampling steps, a panel per figure."""
    panels = {
        "fid": "Fréchet distance (lower is better)",
        "precision": "Precision",
        "recall": "Recall",
        "label_agreement": "Label agreement",
    }
    figure, all_axes = plt.subplots(1, 4, figsize=(10.8, 2.9), layout="constrained")
    for axes, (name, title) in zip(all_axes, panels.items(), strict=True):
        for stage in STAGES:
            evaluation = evaluations[stage]
            steps = list(evaluation.sweep)
            values = [getattr(quality, name) for quality in evaluation.sweep.values()]
            axes.plot(steps, values, "o-", color=COLORS[stage], markeredgewidth=0)
            best = evaluation.best_steps
            axes.plot(
                best, getattr(evaluation.best, name), "o", ms=10, mfc="none", mec=COLORS[stage], mew=1.5, zorder=5
            )
        axes.axhline(getattr(real, name), color=REAL_COLOR, lw=1, ls=(0, (4, 3)))
        axes.set(title=title, xlabel="sampling steps", xlim=(0, None))
        if name == "fid":
            axes.set_yscale("log")
            axes.grid(which="minor", visible=False)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(0, 1.03)
    return figure


def robustness_figure(evaluations: Mapping[Stage, Evaluation]) -> Any:
    """Returns accuracy against the number of attack steps and against the radius."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.8, 3.0), layout="constrained", sharey=True)
    for stage in STAGES:
        attacked = evaluations[stage].robustness
        left.plot(
            list(attacked.by_steps), list(attacked.by_steps.values()), "o-", color=COLORS[stage], label=NAMES[stage]
        )
        right.plot(list(attacked.by_radius), list(attacked.by_radius.values()), "o-", color=COLORS[stage])
    left.axhline(0.1, color=REAL_COLOR, lw=1, ls=(0, (4, 3)))
    right.axhline(0.1, color=REAL_COLOR, lw=1, ls=(0, (4, 3)))
    right.text(0.02, 0.115, "guessing", color=REAL_COLOR, fontsize=8.5)
    left.set(title=f"At radius ε = {ATTACK.eps:g}, longer and longer attacks", xlabel="attack steps")
    left.set(ylabel="accuracy on test digits", ylim=(0, 1.03))
    right.set(title=f"{ATTACK.num_steps} steps, larger and larger radius", xlabel="radius ε (L2, pixels in [0, 1])")
    left.legend(loc=(0.45, 0.18))
    left.set_xticks(ATTACK_STEPS)
    return figure


def history_figure(histories: Mapping[Stage, History], auc_threshold: float) -> Any:
    """Returns the curves of training, on one axis of training steps through both stages."""
    figure, grid = plt.subplots(2, 3, figsize=(10.8, 5.4), layout="constrained")
    first, second = (histories[stage].curves for stage in STAGES)
    begin = 1 + max((step for curve in first.values() for step in curve.steps), default=-1)
    loss, robust, validation, energy, auc, steps = grid.flat
    for stage, curves, offset in (STAGES[0], first, 0), (STAGES[1], second, begin):
        color = COLORS[stage]
        _line(loss, curves.get("train/loss"), color=color, offset=offset, label=NAMES[stage])
        _line(robust, curves.get("train/robust_accuracy"), color=color, offset=offset)
        _points(validation, curves.get("val/accuracy"), "-", color=color, offset=offset)
        _points(validation, curves.get("val/robust_accuracy"), "--", color=color, offset=offset)
    for axes in (loss, robust, validation):
        axes.axvline(begin, color="#cbd5e1", lw=1)
    blue = COLORS["stage2"]
    _line(energy, second.get("train/energy_contrast"), color=REAL_COLOR, offset=begin, label="contrastive samples")
    _line(energy, second.get("train/energy_real"), color=blue, offset=begin, label="real digits")
    _line(auc, second.get("train/auc"), color=blue, offset=begin)
    auc.axhline(auc_threshold, color=REAL_COLOR, lw=1, ls=(0, (4, 3)))
    _line(steps, second.get("train/contrastive_steps"), color=blue, offset=begin, window=1)
    loss.set(title="Training loss")
    loss.margins(y=0.3)
    robust.set(title="Robust accuracy, training batches")
    validation.set(title="Validation: clean (solid), robust (dashed)")
    energy.set(title="Energy in Stage 2")
    auc.set(title="AUC, real against contrastive")
    steps.set(title="Contrastive steps T in Stage 2")
    for axes in (energy, auc, steps):
        axes.set(xlabel="training step")
    if loss.get_legend_handles_labels()[0]:
        loss.legend(loc="upper right")
    if energy.get_legend_handles_labels()[0]:
        energy.legend(loc="upper right")
    return figure


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Returns the mean of each value and up to ``window`` − 1 values around it; the ends have fewer neighbours."""
    half = window // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _line(
    axes: Any, curve: Curve | None, *, color: str, offset: int, label: str | None = None, window: int = _SMOOTHING
) -> None:
    """A training curve: faint as logged, strong averaged."""
    if curve is None:
        return
    steps = [step + offset for step in curve.steps]
    if window > 1:
        axes.plot(steps, curve.values, color=color, alpha=0.22, lw=1)
    axes.plot(steps, smoothed(curve.values, window), color=color, label=label)


def _points(axes: Any, curve: Curve | None, line: str, *, color: str, offset: int) -> None:
    """A validation curve: few points, joined."""
    if curve is not None:
        axes.plot([step + offset for step in curve.steps], curve.values, f"o{line}", color=color)
