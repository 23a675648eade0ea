"""Editing: degraded test images restored by the ascent, compared with the originals, judged and pictured."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.ascent import Ascent, no_trace, unbounded_ascent
from dat_lightning.core.energy import first_weight
from dat_lightning.core.errors import InputError, require_counts, require_kind
from dat_lightning.core.objectives import Objective, negative_marginal_energy, targeted_logit
from dat_lightning.core.random_streams import stream_seed
from dat_lightning.core.update_rules import STEEPEST, UpdateRule
from dat_lightning.data.batches import logits_of, require_finite
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.evaluation.label_agreement import check_independent, classes_read
from dat_lightning.evaluation.restorations import Denoising, Inpainting, Restoration, SuperResolution
from dat_lightning.results.digests import network_digest, network_identity
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement, primitives
from dat_lightning.results.pictures import pictures_wanted, show_picture
from dat_lightning.results.progress import is_silent
from dat_lightning.sampling.picture_grids import Shortlist, Tile, captioned_grid

Knowledge = Literal["known", "unknown"]

_OBJECTIVES: Mapping[Knowledge, tuple[Objective, str]] = {
    "known": (targeted_logit, "f(x)[y]"),
    "unknown": (negative_marginal_energy, "logsumexp f(x)"),
}
# Rounding to eight bits has 59 dB. Without a bound one image that comes back exactly would make the mean infinite.
_MOST_DECIBELS = 60.0
# The windows of the structural similarity are 11 pixels wide, and images reflected at their border.
_LEAST_SIDE = 6


class Editing(Evaluator):
    """Degrades test images, restores them by the ascent, and measures how near the results come to the originals.

    For each task, with the class of an image known (f(x)[y] is climbed) and unknown (logsumexp f(x) is):

    - ``psnr``: mean over images of the peak signal-to-noise ratio of the whole image, in decibels, of each at most 60:
      eight-bit images so near are equal;
    - ``ssim``: mean structural similarity;
    - ``agreement``: share that the judge reads as their label, if there is a judge.

    Logged: ``test/edit_{task}_{measure}_{known or unknown}``; to compare with, ``…_degraded`` of the degraded images,
    and ``…_simple`` of what can be made of them without a network. Details have the figures after each number of steps,
    and the judge's of the originals. Figures depend neither on batches nor on the number of ranks: images are gathered,
    sorted, and cut in parts of ``batch_size``.

    Turning an image into another class is what :class:`~dat_lightning.Counterfactuals` measures.

    Args:
        tasks: What to undo, each with steps of its own.
        labels: Whether classes are known; a network of one logit has none, and takes ``["unknown"]`` alone.
        rule: How steps are made.
        judge: An independent classifier, images to logits.
        max_images: Edit only as many, chosen by a hash of (seed, index), whatever order the data have.
        num_pictures: Images shown, the first of those.
        picture_dirpath: Folder for ``edit_{task}.png``; ``None`` writes no files. Loggers that take images get the
            pictures as ``test/edit_{task}``.
        seed: Seed of noise and choice.
        dirpath: See :class:`Evaluator`.
        batch_size: Images per pass.

    Raises:
        InputError: If an argument is outside its range; in a test, if images are too small or their sides no multiple
            of a factor, known labels do not fit the network's classes, or the judge is part of the network or gives
            NaN.

    Source: Santurkar et al. 2019 (arXiv 1906.09453), inpainting and super-resolution by a robust classifier; Wang et
        al. 2004 for the structural similarity.
    """

    def __init__(
        self,
        tasks: Sequence[Restoration] = (
            Inpainting(region="center"),
            Inpainting(region="bottom"),
            Denoising(),
            SuperResolution(),
        ),
        labels: Sequence[Knowledge] = ("known", "unknown"),
        rule: UpdateRule = STEEPEST,
        judge: nn.Module | None = None,
        max_images: int = 1000,
        num_pictures: int = 8,
        picture_dirpath: str | None = None,
        seed: int = 0,
        dirpath: str | None = None,
        batch_size: int = 100,
    ) -> None:
        super().__init__(dirpath)
        for number, task in enumerate(tasks):
            require_kind(Restoration, **{f"tasks[{number}]": task})
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise InputError(f"tasks must be different ones, at least one, got {names}")
        if not labels or set(labels) - set(get_args(Knowledge)):
            raise InputError(f"labels must be some of {get_args(Knowledge)}, got {list(labels)}")
        require_kind(UpdateRule, rule=rule)
        require_counts(1, max_images=max_images, num_pictures=num_pictures, batch_size=batch_size)
        self.tasks = tuple(tasks)
        self.labels: tuple[Knowledge, ...] = tuple(dict.fromkeys(labels))
        self.rule = rule
        self.judge = None if judge is None else judge.requires_grad_(False).eval()
        self.max_images = max_images
        self.num_pictures = num_pictures
        self.picture_dirpath = picture_dirpath
        self.seed = seed
        self.batch_size = batch_size
        self._chosen = Shortlist(max_images)

    # What is computed of an image.

    def restored(
        self,
        pl_module: LightningModule,
        task: Restoration,
        known: Knowledge,
        degraded: Tensor,
        y: Tensor,
        index: Tensor,
    ) -> dict[int, Tensor]:
        """Returns the states of the walk from degraded images after 0, 1, … steps, each (N, C, H, W).

        Args:
            pl_module: Climbed.
            task: What is to be undone.
            known: Whether the walk may look at the labels.
            degraded: Shape (N, C, H, W).
            y: Labels, (N,).
            index: Indices, (N,).
        """
        climb = Ascent(_OBJECTIVES[known][0], unbounded_ascent(task.step_size, task.num_steps), self.rule)
        steps = range(task.num_steps + 1)
        return task.edit(degraded).snapshots(pl_module, y, climb, steps, draws=index, seed=self.seed)

    def measure(self, images: Tensor, x: Tensor, y: Tensor) -> Values:
        """Returns how near images come to the originals, ``psnr``, ``ssim`` and ``agreement``, (N,) on the CPU."""
        # In float64, similarities would take longer than walks.
        found, true = images.detach().float(), x.float()
        ratios = peak_signal_noise_ratio(found, true, data_range=1.0, reduction="none", dim=(1, 2, 3))
        values: Values = {
            "psnr": ratios.clamp_max(_MOST_DECIBELS),
            # One tensor, as nothing else is asked for.
            "ssim": structural_similarity_index_measure(found, true, data_range=1.0, reduction="none"),  # type: ignore[dict-item]
        }
        if self.judge is not None:
            values["agreement"] = self.read(images, y) == y
        return {name: value.cpu() for name, value in values.items()}

    def read(self, images: Tensor, y: Tensor) -> Tensor:
        """Returns the classes (N,) that the judge reads in images (N, C, H, W) in [0, 1] with labels ``y`` (N,).

        Raises:
            RuntimeError: If there is no judge.
            InputError: If its logits are not finite, or a label is none of its classes.
        """
        if self.judge is None:
            raise RuntimeError("there is no judge")
        return classes_read(self.judge, images, y, "Editing.judge")

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns what :meth:`measure` does, (N,) as ``{task}_{degraded or simple}_{measure}``.

        Of what became of them it is (N, T + 1), after each number of steps, as ``{task}_{known or unknown}_{measure}``.
        """
        x, y, index = batch["x"], batch["y"], batch["index"]
        with torch.no_grad(), no_trace(pl_module):
            logits = logits_of(pl_module, x, "Editing")
        if "known" in self.labels:
            self.check_logits(logits, y)
        else:
            require_finite(logits, "Editing")
        values: Values = {} if self.judge is None else {"original_agreement": self.read(x, y) == y}
        for task in self.tasks:
            degraded = task.degraded(x, index.tolist(), self.seed)
            for name, images in (("degraded", degraded), ("simple", task.simple(degraded))):
                found = self.measure(images, x, y)
                values |= {f"{task.name}_{name}_{measure}": value for measure, value in found.items()}
            for known in self.labels:
                states = self.restored(pl_module, task, known, degraded, y, index)
                measured = [self.measure(states[step], x, y) for step in range(task.num_steps + 1)]
                for measure in measured[0]:
                    values[f"{task.name}_{known}_{measure}"] = torch.stack([each[measure] for each in measured], 1)
        return values

    @override
    def settings(self) -> dict[str, Any]:
        """Returns what the values depend on."""
        judge = None if self.judge is None else network_digest(self.judge)
        return {"tasks": self.tasks, "labels": self.labels, "rule": self.rule, "seed": self.seed, "judge": judge}

    # Lightning's hooks.

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings the judge to the network, and starts anew."""
        if self.judge is not None:
            check_independent(self.judge, pl_module)
            self.judge.to(pl_module.device)
        super().on_test_start(trainer, pl_module)
        self._chosen = Shortlist(self.max_images)

    @override
    def add_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> None:
        """Keeps those images that are chosen; they are edited after the last batch."""
        x, indices = batch["x"], batch["index"].tolist()
        if x.dim() != 4 or min(x.shape[2:]) < _LEAST_SIDE:
            raise InputError(
                f"Editing needs images of at least {_LEAST_SIDE}×{_LEAST_SIDE} pixels, got {tuple(x.shape)}"
            )
        for task in self.tasks:
            # What does not fit a task is refused now, not after the last batch.
            task.degraded(x[:1], indices[:1], self.seed)
        keys = [stream_seed(self.seed, "edited image", index) for index in indices]
        self._chosen.add(keys, indices, {"x": x, "y": batch["y"]})

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Edits this rank's share of the images, and makes the figures of all."""
        chosen = self._chosen.gathered()
        like = first_weight(pl_module, chosen["x"])
        chosen = {"x": chosen["x"].to(like), **{name: chosen[name].to(like.device) for name in ("y", "index")}}
        parts = zip(*(value.split(self.batch_size) for value in chosen.values()), strict=True)
        mine = list(parts)[trainer.global_rank :: trainer.world_size]
        for part in tqdm(mine, desc="Editing", leave=False, disable=is_silent(trainer)):
            super().add_batch(pl_module, dict(zip(chosen, part, strict=True)))
        super().on_test_epoch_end(trainer, pl_module)
        self._chosen = Shortlist(self.max_images)
        shown = {name: value[: self.num_pictures] for name, value in chosen.items()}
        for task in self.tasks:
            path = None if self.picture_dirpath is None else Path(self.picture_dirpath) / f"edit_{task.name}.png"
            if pictures_wanted(trainer, path):
                show_picture(trainer, f"test/edit_{task.name}", self._drawn(pl_module, task, **shown), path)

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns all figures: of degraded images, and of what became of them."""
        return [figure for task in self.tasks for figure in self._figures(task, values)]

    def _figures(self, task: Restoration, values: Values) -> list[Measurement]:
        measures = {
            "psnr": "mean peak signal-to-noise ratio of the whole image, in dB",
            "ssim": "mean structural similarity",
            "agreement": "share that an independent classifier reads as the label",
        }
        found = []
        for measure, words in measures.items():
            name = f"edit_{task.name}_{measure}"
            settings: dict[str, Any] = {"task": primitives({"": task})[""], "seed": self.seed}
            reference: dict[str, Any] = {}
            if measure == "agreement":
                if self.judge is None:
                    continue
                settings["judge"] = network_identity(self.judge)
                reference["of_originals"] = float(values["original_agreement"].double().mean())
            made = partial(Measurement, num_samples=len(values["index"]), better="higher")
            plain = {
                kind: float(values[f"{task.name}_{kind}_{measure}"].double().mean()) for kind in ("degraded", "simple")
            }
            for kind, what in (("degraded", ""), ("simple", ", restored without a network")):
                told = f"{words}; test images {task.words}{what}"
                found.append(made(f"{name}_{kind}", plain[kind], told, details=reference, settings=settings))
            picture = None if self.picture_dirpath is None else f"{self.picture_dirpath}/edit_{task.name}.png"
            for known in self.labels:
                curve = values[f"{task.name}_{known}_{measure}"].double().mean(0).tolist()
                told = f"{words}; ascent on {_OBJECTIVES[known][1]} from test images {task.words}"
                details = {**reference, **plain, "after_each_step": curve, "pictures": [picture] if picture else []}
                climbed = {**settings, "climbs": _OBJECTIVES[known][1], **primitives({"rule": self.rule})}
                found.append(made(f"{name}_{known}", curve[-1], told, details=details, settings=climbed))
        return found

    def _drawn(self, pl_module: LightningModule, task: Restoration, x: Tensor, y: Tensor, index: Tensor) -> Image.Image:
        """A picture: originals, what was left of them, and what was made of that."""
        degraded = task.degraded(x, index.tolist(), self.seed)
        rows = {"original": x, "degraded": degraded, "simple": task.simple(degraded)}
        for known in self.labels:
            rows[f"class {known}"] = self.restored(pl_module, task, known, degraded, y, index)[task.num_steps]
        tiles = [self._row(images, x, y, "class" if name == "original" else "psnr") for name, images in rows.items()]
        title = f"Test images {task.words}, and restored by {task.num_steps} steps of {task.step_size:g}."
        if self.judge is not None:
            title += " Red frame: the judge reads another class than the label."
        return captioned_grid(tiles, title, list(rows))

    def _row(self, images: Tensor, x: Tensor, y: Tensor, caption: Literal["class", "psnr"]) -> list[Tile]:
        measured = self.measure(images, x, y)
        read = None if self.judge is None else self.read(images, y).tolist()
        row = []
        for i, image in enumerate(to_uint8_rgb(images).cpu()):
            lines = [f"class {int(y[i])}" if caption == "class" else f"{float(measured['psnr'][i]):.1f} dB"]
            lines += [] if read is None else [f"judge: {read[i]}"]
            row.append(Tile(image, "\n".join(lines), read is not None and read[i] != int(y[i])))
        return row
