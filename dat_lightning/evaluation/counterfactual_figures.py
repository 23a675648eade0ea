"""What is told and shown of counterfactuals: numbers with their settings, distances by class, pictures."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.picture_grids import Tile, signed_difference, write_captioned_grid
from dat_lightning.sampling.training_features import class_gaussians, frechet_distances

Target = Literal["next", "uniform", "all"]

_TARGETS: Mapping[Target, str] = {
    "next": "the most likely class other than the label",
    "uniform": "a class drawn uniformly from those other than the label",
    "all": "each class other than the label in turn",
}
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_COLUMNS = 8

# Distances say how far a walk went: an image that did not move has the least, and is no counterfactual.
_BETTER: Mapping[str, Literal["higher", "lower"]] = {
    "success": "higher",
    "confidence": "higher",
    "plausibility": "higher",
    "fid": "lower",
}

ClassDistances = dict[int, tuple[float, int, int]]
"""Class → Fréchet distance, number of counterfactuals, number of training images."""


class Judge(NamedTuple):
    """An independent classifier: which it is, what images it takes, and its accuracy on the originals."""

    identity: str
    input: str
    accuracy: float


@dataclass(frozen=True)
class Search:
    """One way to look for counterfactuals, which figures are about.

    Attributes:
        targets: How target classes are chosen.
        eps: Radius of the L2 ball.
        num_steps: Steps of the walk.
        step_size: Their L2 length.
        seed: Seed of targets and pictures.
    """

    targets: Target
    eps: float
    num_steps: int
    step_size: float
    seed: int

    @property
    def name(self) -> str:
        """Tells it from others, in names of files."""
        return f"counterfactuals_{self.targets}_eps{self.eps:g}"

    def measurement(
        self, name: str, value: float, words: str, count: int, details: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> Measurement:
        """Returns a number about the images of this search."""
        whole = f"counterfactual_{name}_{self.targets}_eps{self.eps:g}"
        words = f"{words}; targeted ascent on f(x)[target] from real test images inside an L2 ball"
        search = {
            "target": _TARGETS[self.targets],
            "eps": self.eps,
            "num_steps": self.num_steps,
            "step_size": self.step_size,
            "seed": self.seed if self.targets == "uniform" else None,
        }
        return Measurement(whole, value, words, count, details, _BETTER.get(name), {**search, **settings})

    def figures(
        self, values: Values, changed_level: int, judge: Judge | None, picture: Path | None
    ) -> list[Measurement]:
        """Returns the figures of this search but for the Fréchet distance.

        Args:
            values: What was measured, (N, T) each.
            changed_level: From which change on a pixel counted as changed, in levels of 255.
            judge: The independent classifier, if there is one.
            picture: Where some of the images are shown.
        """
        before = float(values["success_before"].double().mean())
        pictures = [] if picture is None else [str(picture)]
        told: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
            "success": (
                "share that the network classifies as the target",
                {"share_before": before, "pictures": pictures},
                {},
            ),
            "confidence": ("mean of p(target|x)", {}, {}),
            "l2": ("mean L2 distance from the original", {}, {}),
            "linf": ("mean Linf distance from the original", {}, {}),
            "changed_pixels": (
                "mean share of pixels of which some channel moved by more levels of 255 than the changed level",
                {},
                {"changed_level": changed_level},
            ),
        }
        if judge is not None:
            words = "share that an independent classifier reads as the target"
            settings = {"judge": judge.identity, "judge_input": judge.input}
            told["plausibility"] = (words, {"judge_accuracy_on_originals": judge.accuracy}, settings)
        found = []
        for name, (words, details, settings) in told.items():
            column = values[name].flatten().double()
            if values[name].dtype != torch.bool:
                quantiles = torch.quantile(column, torch.tensor(_QUANTILES, dtype=column.dtype)).tolist()
                details = {"quantile_levels": list(_QUANTILES), "quantiles": quantiles, **details}
            found.append(self.measurement(name, float(column.mean()), words, len(column), details, settings))
        return found

    def fid(
        self, distances: ClassDistances, left_out: list[int], min_images: int, settings: Mapping[str, Any]
    ) -> list[Measurement]:
        """Returns the mean distance over classes; nothing if there is no class.

        Args:
            distances: Of the classes.
            left_out: Target classes with fewer images than ``min_images``.
            min_images: Images that a class needed.
            settings: Extractor and training images.
        """
        if not distances:
            return []
        rows = [
            {"class": label, "fid": fid, "num_counterfactuals": count, "num_training_images": real}
            for label, (fid, count, real) in distances.items()
        ]
        words = "mean over target classes of the Fréchet distance to the training images of that class"
        value = sum(fid for fid, _, _ in distances.values()) / len(distances)
        count = sum(n for _, n, _ in distances.values())
        # Which classes have enough images is part of what was measured.
        settings = {**settings, "min_class_images": min_images, "target_classes": list(distances)}
        return [self.measurement("fid", value, words, count, {"classes": rows, "left_out": left_out}, settings)]


def class_distances(
    trainer: Trainer,
    pl_module: LightningModule,
    batches: Iterator[Values],
    targets: Mapping[Target, Tensor],
    features: Mapping[tuple[Target, int], Tensor],
    min_images: int,
) -> dict[tuple[Target, int], tuple[ClassDistances, list[int]]]:
    """Returns, for each search, the Fréchet distance of each target class to its training images, and what is left out.

    Every rank must call it, with the same targets and features.

    Args:
        trainer: Deals the distances to the ranks.
        pl_module: Names the device.
        batches: This rank's training features.
        targets: How they were chosen → targets (N, T).
        features: How targets were chosen, and number of the radius → features (N, T, D).
        min_images: Images that a class needs on both sides.
    """
    counts = {kind: Counter(column.flatten().tolist()) for kind, column in targets.items()}
    wanted = {label for count in counts.values() for label, n in count.items() if n >= min_images}
    dim = next(iter(features.values())).shape[-1]
    real = class_gaussians(batches, wanted, dim, pl_module.device) if wanted else {}
    real = {label: gaussian for label, gaussian in real.items() if gaussian.num_samples >= min_images}
    classes = {kind: [label for label in sorted(real) if count[label] >= min_images] for kind, count in counts.items()}
    jobs = [(key, label) for key in features for label in classes[key[0]]]
    values = frechet_distances(trainer, [(real[label], features[key][targets[key[0]] == label]) for key, label in jobs])
    found: dict[tuple[Target, int], tuple[ClassDistances, list[int]]] = {
        key: ({}, sorted(counts[key[0]].keys() - set(classes[key[0]]))) for key in features
    }
    for (key, label), value in zip(jobs, values, strict=True):
        found[key][0][label] = (value, counts[key[0]][label], real[label].num_samples)
    for kind, count in counts.items():
        missing = sorted(count.keys() - set(classes[kind]))
        if missing:
            rank_zero_warn(
                f"Counterfactuals: {len(missing)} of {len(count)} target classes ({kind}) have fewer than"
                f" min_class_images={min_images} images and no Fréchet distance, the first: {missing[:10]}"
            )
    return found


def draw_counterfactuals(
    path: Path,
    search: Search,
    x: Tensor,
    y: Tensor,
    changed: Tensor,
    targets: Tensor,
    confidence: Tensor,
    read: Tensor | None,
) -> None:
    """Writes a picture: originals, counterfactuals, and their signed difference around grey.

    Args:
        path: The PNG file.
        search: How they were found.
        x: Originals, (N, C, H, W).
        y: Their labels, (N,).
        changed: Counterfactuals, (N, C, H, W).
        targets: Their classes, (N,).
        confidence: p(target|x), (N,).
        read: What the judge reads, (N,); those that it does not read as the target get a red frame.
    """
    scale = max(float((changed - x).abs().max()), 1 / 255)
    images = [to_uint8_rgb(x).cpu(), to_uint8_rgb(changed).cpu(), signed_difference(changed, x, scale).cpu()]
    lengths = (changed - x).double().flatten(1).norm(dim=1).tolist()
    rows: list[list[Tile | None]] = []
    for first in range(0, len(x), _COLUMNS):
        columns = range(first, min(first + _COLUMNS, len(x)))
        rows.append([Tile(images[0][i], f"class {int(y[i])}") for i in columns])
        captions = [f"as {int(targets[i])}: p {float(confidence[i]):.2f}" for i in columns]
        marks = [read is not None and bool(read[i] != targets[i]) for i in columns]
        if read is not None:
            captions = [f"{caption}\njudge: {int(read[i])}" for i, caption in zip(columns, captions, strict=True)]
        told = zip(columns, captions, marks, strict=True)
        rows.append([Tile(images[1][i], caption, mark) for i, caption, mark in told])
        rows.append([Tile(images[2][i], f"L2 {lengths[i]:.2f}") for i in columns])
    title = (
        f"Counterfactuals inside L2 balls of radius {search.eps:g}; target: {_TARGETS[search.targets]}.\n"
        f"Difference: grey 0, white +{scale:.2f}, black -{scale:.2f}."
    )
    if read is not None:
        title += " Red frame: the judge reads another class than the target."
    names = ["original", "counterfactual", "difference"] * (len(rows) // 3)
    write_captioned_grid(path, rows, title, names)
