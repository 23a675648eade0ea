"""What is told and shown of counterfactuals: numbers with their settings, distances by class, pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.evaluation.class_distances import ClassDistances, Target
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.picture_grids import Tile, captioned_grid, signed_difference

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


class Judge(NamedTuple):
    """An independent classifier: which it is, and its accuracy on the originals."""

    identity: str
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
            told["plausibility"] = (words, {"judge_accuracy_on_originals": judge.accuracy}, {"judge": judge.identity})
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


def drawn_counterfactuals(
    search: Search,
    x: Tensor,
    y: Tensor,
    changed: Tensor,
    targets: Tensor,
    confidence: Tensor,
    read: Tensor | None,
) -> Image.Image:
    """Returns a picture: originals, counterfactuals, and their signed difference around grey.

    Args:
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
    return captioned_grid(rows, title, names)
