"""The page of the demonstration, made from what the runs of both stages left: figures, training logs and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dat_lightning.core.errors import InputError
from dat_lightning.data import DigitsDataModule
from dat_lightning.pages.drawing import NEUTRAL, PALETTE, require_matplotlib
from dat_lightning.pages.rendering import Picture, array_uri, picture, plot, write_page
from dat_lightning.pages.training_log import Curve, TrainingLog, read_training_log
from dat_lightning.results import Evaluation, Measurement, read_evaluation

TITLES = {"stage1": "Stage 1: robust classifier", "stage2": "Stage 2: DAT"}
COLORS = {"stage1": PALETTE[1], "stage2": PALETTE[0]}

# The figure of evaluate.yaml that the page tells of counterfactuals.
COUNTERFACTUALS = "counterfactual_plausibility_uniform_eps4"
# Sample 11 k of a grid with ten columns is the k-th of its row, and of class k.
_CHAINS = (0, 2, 3, 4, 7, 8)
# The lines of a sample grid.
_GREY = 128
# Batches that a training curve is averaged over, out of those logged.
_SMOOTHING = 5
_DASHED: Any = {"color": NEUTRAL, "lw": 1, "ls": (0, (4, 3))}


@dataclass(frozen=True)
class Stage:
    """What one stage left in its folder.

    Attributes:
        key: ``stage1`` or ``stage2``.
        folder: Where it is.
        evaluation: Its figures.
        log: Its training curves.
    """

    key: str
    folder: Path
    evaluation: Evaluation
    log: TrainingLog

    @property
    def title(self) -> str:
        """What the page calls it."""
        return TITLES[self.key]

    @property
    def color(self) -> str:
        """Its colour in plots."""
        return COLORS[self.key]

    def entry(self, name: str) -> Measurement:
        """Returns a figure.

        Raises:
            InputError: If the evaluation lacks it.
        """
        found = self.evaluation.entry(name)
        if found is None:
            raise InputError(f"the evaluation in {self.folder} has no figure {name!r}: evaluate.yaml must measure it")
        return found

    def value(self, name: str) -> float:
        """Returns the number of a figure."""
        return self.entry(name).value

    @property
    def best_steps(self) -> int:
        """The number of sampling steps with the smallest Fréchet distance."""
        return int(self.entry("fid").details["num_steps"])

    def sample_grids(self) -> dict[int, Path]:
        """Returns number of sampling steps → the picture that ``SampleGrid`` wrote in the latest test."""
        found = sorted((self.folder / "evaluation" / "samples").glob("test_step*_steps.png"))
        latest = [path for path in found if path.name.split("_")[1] == found[-1].name.split("_")[1]]
        return dict(sorted((int(path.stem.split("_")[2]), path) for path in latest))


def read_stage(folder: Path) -> Stage:
    """Returns what is in the folder of a stage; of several evaluations, the latest.

    Raises:
        FileNotFoundError: If it has not been evaluated.
    """
    found = sorted(folder.glob("evaluation*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise FileNotFoundError(f"no evaluation.json in {folder}")
    return Stage(folder.name, folder, read_evaluation(found[-1]), read_training_log(folder / "logs"))


def write_demo_page(path: Path, stages: Sequence[Stage], runs: Sequence[str]) -> None:
    """Writes the page, one file that needs no other, and the samples of both stages beside it as ``samples.png``.

    Args:
        path: The file.
        stages: Both stages.
        runs: The commands that led to it.
    """
    write_samples(path.with_name("samples.png"), stages)
    second = stages[-1]
    plots = {
        "sweep": (sweep_figure, "quality of samples against sampling steps"),
        "robustness": (robustness_figure, "accuracy against attack steps and radius"),
        "history": (history_figure, "training curves of both stages"),
    }
    panels = {}
    for stage in stages:
        steps, pixels = chains(stage)
        panels[stage.key] = {
            "samples": picture(stage.sample_grids()[stage.best_steps], f"samples of {stage.title}"),
            "chains": (steps, array_uri(pixels)),
            "counterfactuals": counterfactual_picture(stage),
        }
    write_page(
        path,
        "demo.html.j2",
        title="Dual Adversarial Training on digits",
        stages=stages,
        rows=table(stages),
        panels=panels,
        counterfactuals=COUNTERFACTUALS,
        chain_classes=_CHAINS,
        real_digits=array_uri(real_digits()),
        contrastive_steps=contrastive_steps(second),
        auc_threshold=auc_threshold(second),
        runs=runs,
        **{name: plot(partial(draw, stages), words, "") for name, (draw, words) in plots.items()},
    )


def table(stages: Sequence[Stage]) -> list[tuple[str, str, list[str], str]]:
    """Returns the rows of the table: name, remark, the cells of the stages, that of real test digits."""
    second, real = stages[-1], real_values(stages[-1])
    attack = _threat_model(second.entry("robust_accuracy"))
    pgd = f"PGD, {attack['num_steps']} steps of {attack['step_size']:g}, {attack['norm']} radius {attack['eps']:g}"
    measured = {
        "accuracy": ("Accuracy", f"on the {second.entry('accuracy').num_samples} test digits", ".1%"),
        "robust_accuracy": ("Robust accuracy", pgd, ".1%"),
        "fid": (
            "Fréchet distance",
            f"{second.entry('fid').num_samples:,} samples, features of a small digits network; lower is better",
            ".1f",
        ),
        "label_agreement": (
            "Label agreement",
            "samples that a classifier from elsewhere, an SVM, reads as the digit asked for",
            ".1%",
        ),
        "precision": ("Precision", "samples that lie among real digits", ".2f"),
        "recall": ("Recall", "real digits that lie among the samples", ".2f"),
        COUNTERFACTUALS: ("Counterfactuals", "within an L2 distance of 4, that the SVM reads as their target", ".1%"),
    }
    rows = [
        (words, remark, [_cell(stage.value(name), form) for stage in stages], _cell(real.get(name), form))
        for name, (words, remark, form) in measured.items()
    ]
    best = [str(stage.best_steps) for stage in stages]
    rows.insert(3, ("Sampling steps", "where that distance is smallest", best, "–"))
    longest = [_cell(contrastive_steps(stage), "d") for stage in stages]
    durations = [_duration(stage.log.seconds) for stage in stages]
    rows.append(("Contrastive steps T", "at the end of training", longest, "–"))
    rows.append(("Training time", "", durations, "–"))
    return rows


def real_values(stage: Stage) -> dict[str, float]:
    """Returns the figures that real test digits have where they are measured as samples are."""
    judged = stage.entry(COUNTERFACTUALS).details["judge_accuracy_on_originals"]
    return {name: stage.value(f"real_{name}") for name in ("fid", "precision", "recall")} | {"label_agreement": judged}


def contrastive_steps(stage: Stage) -> int | None:
    """Returns T at the last step that was logged."""
    curve = stage.log.curves.get("train/contrastive_steps")
    return None if curve is None else int(curve.values[-1])


def auc_threshold(stage: Stage) -> float | None:
    """Returns the AUC at which T grows, if the configuration says it."""
    found: Any = stage.evaluation.provenance
    for name in ("module", "hyperparameters", "curriculum", "init_args", "auc_threshold"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, float) else None


def real_digits() -> NDArray[np.uint8]:
    """Returns two rows of test digits, with the grey lines that sample grids have."""
    digits = DigitsDataModule().in_distribution("test")
    tiles = [
        np.pad(np.asarray(255 * digits[k][0][0]).round(), ((0, 1), (0, 1)), constant_values=_GREY) for k in range(40)
    ]
    rows = [np.concatenate(tiles[k : k + 20], 1) for k in (0, 20)]
    return np.pad(np.concatenate(rows), ((1, 0), (1, 0)), constant_values=_GREY).astype(np.uint8)


def chains(stage: Stage) -> tuple[list[int], NDArray[np.uint8]]:
    """Returns the steps and a picture of a few samples on their way: a row for a sample, a column for steps."""
    grids = {steps: np.asarray(Image.open(path)) for steps, path in stage.sample_grids().items()}
    # A grid has a column per class, and lines of one pixel around all tiles.
    pitch = (next(iter(grids.values())).shape[1] - 1) // 10
    rows = []
    for row, label in enumerate(_CHAINS):
        top, left = row * pitch, label * pitch
        rows.append(np.concatenate([grid[top : top + pitch, left : left + pitch] for grid in grids.values()], 1))
    edges = ((0, 1), (0, 1), (0, 0))
    return list(grids), np.pad(np.concatenate(rows), edges, constant_values=_GREY)


def counterfactual_picture(stage: Stage) -> Picture:
    """Returns the picture that ``Counterfactuals`` drew."""
    name = COUNTERFACTUALS.replace("_plausibility", "_success")
    (path,) = stage.entry(name).details["pictures"]
    return picture(stage.folder / path, f"counterfactuals of {stage.title}")


def write_samples(path: Path, stages: Sequence[Stage]) -> None:
    """Writes the sample grids of both stages side by side, for documents; their pixels are enlarged alike."""
    from matplotlib.font_manager import findfont

    drawn = [Image.open(stage.sample_grids()[stage.best_steps]) for stage in stages]
    grids = [grid.resize((4 * grid.width, 4 * grid.height), Image.Resampling.NEAREST) for grid in drawn]
    width, height = grids[0].size
    canvas = Image.new("RGB", (2 * width + 96, height + 108), "white")
    pen = ImageDraw.Draw(canvas)
    # Pillow's own font has no é.
    large, small = (ImageFont.truetype(findfont("DejaVu Sans"), size) for size in (24, 17))
    for place, (stage, grid) in enumerate(zip(stages, grids, strict=True)):
        left = 24 + place * (width + 48)
        heading = f"Fréchet distance {stage.value('fid'):.1f} after {stage.best_steps} steps"
        pen.text((left, 18), stage.title, stage.color, large)
        pen.text((left, 52), heading, "#475569", small)
        canvas.paste(grid, (left, 84))
    canvas.save(path)


# Its plots.


def sweep_figure(stages: Sequence[Stage]) -> Any:
    """Returns the quality of samples against the number of sampling steps, a panel per figure."""
    panels = {
        "fid": "Fréchet distance (lower is better)",
        "precision": "Precision",
        "recall": "Recall",
        "label_agreement": "Label agreement",
    }
    figure, row = require_matplotlib().subplots(1, 4, figsize=(10.8, 2.9), layout="constrained")
    real = real_values(stages[-1])
    for axes, (name, title) in zip(row, panels.items(), strict=True):
        for stage in stages:
            sweep = stage.entry(name).details
            axes.plot(sweep["sweep_steps"], sweep["sweep"], "o-", color=stage.color, markeredgewidth=0)
            best = sweep["sweep"][sweep["sweep_steps"].index(stage.best_steps)]
            axes.plot(stage.best_steps, best, "o", ms=10, mfc="none", mec=stage.color, mew=1.5, zorder=5)
        axes.axhline(real[name], **_DASHED)
        axes.set(title=title, xlabel="sampling steps", xlim=(0, None))
        if name == "fid":
            axes.set_yscale("log")
            axes.grid(which="minor", visible=False)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(0, 1.03)
    return figure


def robustness_figure(stages: Sequence[Stage]) -> Any:
    """Returns accuracy against the number of attack steps and against the radius."""
    figure, both = require_matplotlib().subplots(1, 2, figsize=(10.8, 3.0), layout="constrained", sharey=True)
    main = _threat_model(stages[-1].entry("robust_accuracy"))
    panels = {"num_steps": ("eps", "attack steps"), "eps": ("num_steps", "radius ε (L2, pixels in [0, 1])")}
    for axes, (varied, (fixed, label)) in zip(both, panels.items(), strict=True):
        for stage in stages:
            points = {0.0: stage.value("accuracy")}
            for entry in stage.evaluation.entries:
                attack = _threat_model(entry) if entry.name.startswith("robust_accuracy") else {}
                if attack and attack[fixed] == main[fixed] and attack["norm"] == main["norm"]:
                    points[float(attack[varied])] = entry.value
            curve = sorted(points.items())
            axes.plot(*zip(*curve, strict=True), "o-", color=stage.color, label=stage.title)
        axes.axhline(0.1, **_DASHED)
        axes.set(xlabel=label, ylim=(0, 1.03))
        axes.set_xticks([x for x, _ in curve])
    both[0].set(title=f"At radius ε = {main['eps']:g}, longer and longer attacks", ylabel="accuracy on test digits")
    both[1].set(title=f"{main['num_steps']} steps, larger and larger radius")
    both[1].text(0.02, 0.115, "guessing", color=NEUTRAL, fontsize=8.5)
    both[0].legend(loc=(0.5, 0.2))
    return figure


def history_figure(stages: Sequence[Stage]) -> Any:
    """Returns the curves of training, on one axis of training steps through both stages."""
    figure, grid = require_matplotlib().subplots(2, 3, figsize=(10.8, 5.4), layout="constrained")
    loss, robust, validation, energy, auc, steps = grid.flat
    begin = 0
    for stage in stages:
        curves = stage.log.curves
        line = partial(_line, offset=begin, color=stage.color)
        line(loss, curves.get("train/loss"), label=stage.title)
        line(robust, curves.get("train/robust_accuracy"))
        line(validation, curves.get("val/accuracy"), form="o-")
        line(validation, curves.get("val/robust_accuracy"), form="o--")
        line(energy, curves.get("train/energy_contrast"), color=NEUTRAL, label="contrastive samples")
        line(energy, curves.get("train/energy_real"), label="real digits")
        line(auc, curves.get("train/auc"))
        line(steps, curves.get("train/contrastive_steps"), form="-")
        begin += 1 + max((step for curve in curves.values() for step in curve.steps), default=-1)
        if stage is not stages[-1]:
            for axes in (loss, robust, validation):
                axes.axvline(begin, color=NEUTRAL, lw=0.7)
    threshold = auc_threshold(stages[-1])
    if threshold is not None:
        auc.axhline(threshold, **_DASHED)
    titles = ["Training loss", "Robust accuracy, training batches", "Validation: clean (solid), robust (dashed)"]
    titles += ["Energy in Stage 2", "AUC, real against contrastive", "Contrastive steps T in Stage 2"]
    for axes, title in zip(grid.flat, titles, strict=True):
        axes.set(title=title, xlabel="training step" if axes in grid[1] else "")
    for axes in (loss, energy):
        axes.margins(y=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right")
    return figure


def smoothed(values: Sequence[float], window: int = _SMOOTHING) -> list[float]:
    """Returns the mean of each value and up to ``window`` − 1 values around it; the ends have fewer neighbours."""
    half = window // 2
    return [float(np.mean(values[max(0, k - half) : k + half + 1])) for k in range(len(values))]


def _line(axes: Any, curve: Curve | None, offset: int, color: str, form: str = "", label: str | None = None) -> None:
    """A curve, if there is one: in its form, or faint as logged and strong averaged."""
    if curve is None:
        return
    steps = [step + offset for step in curve.steps]
    if not form:
        axes.plot(steps, curve.values, color=color, alpha=0.22, lw=1)
    axes.plot(steps, curve.values if form else smoothed(curve.values), form or "-", color=color, label=label)


def _threat_model(entry: Measurement) -> Mapping[str, Any]:
    attack: Mapping[str, Any] = entry.settings["threat_model"]
    return attack


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("%", " %")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
