"""Counterfactuals: real images turned into other classes inside an L2 ball, measured, judged and pictured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.attack import ascend
from dat_lightning.core.energy import first_weight
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.losses import is_right
from dat_lightning.core.objectives import targeted_logit
from dat_lightning.core.random_streams import stream_generator, stream_seed
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.data.batches import check_classes, logits_of, require_finite
from dat_lightning.evaluation.class_distances import Target, class_distances
from dat_lightning.evaluation.counterfactual_figures import Judge, Search, drawn_counterfactuals
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.evaluation.label_agreement import check_independent, classes_read
from dat_lightning.features.layers import extract_features
from dat_lightning.results.digests import network_digest, network_identity
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.pictures import pictures_wanted, show_picture
from dat_lightning.results.progress import is_silent
from dat_lightning.sampling.picture_grids import Shortlist
from dat_lightning.sampling.reference import training_features, training_settings


class Counterfactuals(Evaluator):
    """Climbs f(x)[target] from real images inside L2 balls, and measures where that leads.

    For each radius ε and each way to choose a target, ``test/counterfactual_{what}_{targets}_eps{ε}`` with

    - ``success``: share of the images that the network now classifies as the target;
    - ``confidence``: mean of p(target|x);
    - ``l2``, ``linf``: mean distance from the original;
    - ``changed_pixels`` (sparsity): share of pixels of which some channel moved by more than ``changed_level``/255;
    - ``plausibility``: share that the judge reads as the target, if there is a judge;
    - ``fid``: mean over target classes of the Fréchet distance to their training images, if there is an extractor.
      Classes with fewer than ``min_class_images`` on either side are left out and named in the details. Distances of
      few images are too large, so that only those of as many images compare.

    Override points: :meth:`choose_targets` and :meth:`change` (the walk).

    Args:
        eps: Radii of the balls, in units of [0, 1] pixels.
        num_steps: Steps of the walk.
        step_size: L2 length of a step, for all radii; by default 2.5 ε / ``num_steps``.
        targets: How targets are chosen: ``next``, the most likely class other than the label; ``uniform``, one of the
            other classes, a pure function of seed and index; ``all``, each of the other K − 1 in turn.
        judge: An independent classifier, images to logits.
        extractor: Maps uint8 images (N, 3, H, W) to features, as in :class:`~dat_lightning.sampling.FrechetDistance`.
            Features of all counterfactuals are held in memory.
        min_class_images: Images that a class needs for its Fréchet distance.
        changed_level: From which change on a pixel counts as changed, in levels of 255.
        num_pictures: Images shown, chosen by the seed.
        picture_dirpath: Folder for ``counterfactuals_{targets}_eps{ε}.png``; ``None`` writes no files. Loggers that
            take images get the pictures as ``test/counterfactuals_{targets}_eps{ε}``.
        seed: Seed of targets and pictures.
        dirpath: See :class:`Evaluator`.
        batch_size: Training images per pass of the extractor.

    Raises:
        InputError: If an argument is outside its range; in a test, if images are outside [0, 1], labels do not fit the
            network's classes, or the judge is part of the network.

    Source: DAT (arXiv 2510.13872), on counterfactuals; Augustin et al. 2020 (arXiv 2003.09461).
    """

    def __init__(
        self,
        eps: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
        num_steps: int = 20,
        step_size: float | None = None,
        targets: Sequence[Target] = ("next", "uniform"),
        judge: nn.Module | None = None,
        extractor: nn.Module | None = None,
        min_class_images: int = 32,
        changed_level: int = 8,
        num_pictures: int = 8,
        picture_dirpath: str | None = None,
        seed: int = 0,
        dirpath: str | None = None,
        batch_size: int = 250,
    ) -> None:
        super().__init__(dirpath)
        if not eps or not all(0 < e < math.inf for e in eps) or len({f"{e:g}" for e in eps}) < len(eps):
            raise InputError(f"eps must be different finite radii above 0, got {list(eps)}")
        require_at_least(1, num_steps=num_steps, num_pictures=num_pictures, batch_size=batch_size)
        if step_size is not None and not max(eps) <= step_size * num_steps < math.inf:
            raise InputError(
                f"step_size must be at least max(eps) / num_steps = {max(eps) / num_steps:g}, or the walk cannot reach"
                f" the rim of the ball, got {step_size}"
            )
        if not targets or set(targets) - set(get_args(Target)):
            raise InputError(f"targets must be some of {get_args(Target)}, got {list(targets)}")
        if min_class_images < 2:
            raise InputError(f"min_class_images must be at least 2, as a covariance needs, got {min_class_images}")
        if not 0 <= changed_level < 255:
            raise InputError(f"changed_level must be in 0 … 254, got {changed_level}")
        self.eps = tuple(sorted(eps))
        self.num_steps = num_steps
        self.step_size = step_size
        self.targets: tuple[Target, ...] = tuple(dict.fromkeys(targets))
        self.judge = None if judge is None else judge.requires_grad_(False).eval()
        self.extractor = None if extractor is None else extractor.requires_grad_(False).eval()
        self.min_class_images = min_class_images
        self.changed_level = changed_level
        self.num_pictures = num_pictures
        self.picture_dirpath = picture_dirpath
        self.seed = seed
        self.batch_size = batch_size
        self._shown = Shortlist(num_pictures)
        self._silent = True

    # What is computed of an image.

    def threat_model(self, eps: float) -> ThreatModel:
        """Returns ball and steps for a radius."""
        step_size = 2.5 * eps / self.num_steps if self.step_size is None else self.step_size
        return ThreatModel(norm="L2", eps=eps, step_size=step_size, num_steps=self.num_steps)

    def choose_targets(self, targets: Target, logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Returns the classes to turn images into, (N, T).

        Args:
            targets: How to choose.
            logits: Of the originals, (N, K).
            y: Labels, (N,).
            index: Indices of the images, (N,).
        """
        classes = logits.shape[1]
        if targets == "next":
            return logits.scatter(1, y.unsqueeze(1), -torch.inf).argmax(1, keepdim=True)
        if targets == "all":
            return (y.unsqueeze(1) + torch.arange(1, classes, device=y.device)) % classes
        streams = [stream_generator(self.seed, "counterfactual target", i) for i in index.tolist()]
        offsets = torch.stack([torch.randint(1, classes, (1,), generator=stream) for stream in streams])
        return (y.unsqueeze(1) + offsets.to(y.device)) % classes

    def change(self, pl_module: LightningModule, x: Tensor, targets: Tensor, eps: float) -> Tensor:
        """Returns the counterfactuals of images (N, C, H, W) for targets (N,), inside the ball of radius ``eps``."""
        return ascend(pl_module, x, targets, targeted_logit, self.threat_model(eps))

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns what :meth:`measure` does, (N, T, ε, …), under ``{targets}_{name}``, and the targets (N, T)."""
        x, y = batch["x"], batch["y"]
        logits = _logits(pl_module, x)
        check_classes(y, logits, "Counterfactuals")
        chosen = {kind: self.choose_targets(kind, logits, y, batch["index"]) for kind in self.targets}
        values: Values = {} if self.judge is None else {"original_read": self.read(x, y) == y}
        total = len(self.eps) * sum(targets.shape[1] for targets in chosen.values())
        with tqdm(total=total, desc="Counterfactuals", leave=False, disable=self._silent) as progress:
            for kind, targets in chosen.items():
                values |= {
                    f"{kind}_target": targets,
                    f"{kind}_success_before": logits.argmax(1, keepdim=True) == targets,
                }
                parts = []
                for column in targets.unbind(1):
                    for eps in self.eps:
                        changed = self.change(pl_module, x, column, eps)
                        parts.append(self.measure(_logits(pl_module, changed), x, changed, column))
                        progress.update()
                for name in parts[0]:
                    stacked = torch.stack([part[name] for part in parts], 1)
                    values[f"{kind}_{name}"] = stacked.unflatten(1, (targets.shape[1], len(self.eps)))
        return values

    def measure(self, logits: Tensor, x: Tensor, changed: Tensor, targets: Tensor) -> Values:
        """Returns values per example, (N,) or (N, D), on the CPU.

        Args:
            logits: Of the counterfactuals, (N, K).
            x: Originals, (N, C, H, W).
            changed: Counterfactuals, likewise.
            targets: Shape (N,).
        """
        delta = changed.cpu().double() - x.cpu().double()
        probabilities = logits.cpu().double().softmax(1)
        # Halfway between two levels: rounding errors of a change by exactly changed_level do not count.
        moved = delta.abs().amax(1) > (self.changed_level + 0.5) / 255
        values = {
            "success": is_right(logits, targets).cpu(),
            "confidence": probabilities.gather(1, targets.cpu().unsqueeze(1)).squeeze(1),
            "l2": delta.flatten(1).norm(dim=1),
            "linf": delta.flatten(1).abs().amax(1),
            "changed_pixels": moved.flatten(1).double().mean(1),
        }
        if self.judge is not None:
            values["plausibility"] = (self.read(changed, targets) == targets).cpu()
        if self.extractor is not None:
            values["features"] = extract_features(self.extractor, changed).float().cpu()
        return values

    def read(self, images: Tensor, wanted: Tensor) -> Tensor:
        """Returns the classes (N,) that the judge reads in images (N, C, H, W) in [0, 1] meant to show ``wanted`` (N,).

        Raises:
            RuntimeError: If there is no judge.
            InputError: If its logits are not finite, or a class wanted is none of its classes.
        """
        if self.judge is None:
            raise RuntimeError("there is no judge")
        return classes_read(self.judge, images, wanted, "Counterfactuals.judge")

    @override
    def settings(self) -> dict[str, Any]:
        """Returns what the values depend on."""
        parts = {"judge": self.judge, "extractor": self.extractor}
        return {
            "eps": list(self.eps),
            "step_sizes": [self.threat_model(eps).step_size for eps in self.eps],
            "num_steps": self.num_steps,
            "targets": list(self.targets),
            "changed_level": self.changed_level,
            "seed": self.seed,
            **{name: None if part is None else network_digest(part) for name, part in parts.items()},
        }

    # Lightning's hooks.

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings judge and extractor to the network, and starts anew."""
        if self.judge is not None:
            check_independent(self.judge, pl_module)
        for part in (self.judge, self.extractor):
            if part is not None:
                part.to(pl_module.device)
        super().on_test_start(trainer, pl_module)
        self._shown = Shortlist(self.num_pictures)
        self._silent = is_silent(trainer)

    @override
    def add_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> None:
        """Evaluates the batch, and keeps those of its originals that may be shown."""
        super().add_batch(pl_module, batch)
        indices = batch["index"].tolist()
        keys = [stream_seed(self.seed, "counterfactual picture", index) for index in indices]
        self._shown.add(keys, indices, {"x": batch["x"], "y": batch["y"]})

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns all figures, and draws."""
        shown = self._shown.gathered()
        searches = {
            (kind, place): Search(kind, eps, self.num_steps, self.threat_model(eps).step_size, self.seed)
            for kind in self.targets
            for place, eps in enumerate(self.eps)
        }
        distances, used = {}, {}
        if self.extractor is not None:
            chosen = {kind: values[f"{kind}_target"] for kind in self.targets}
            features = {key: values[f"{key[0]}_features"][:, :, key[1]] for key in searches}
            batches = training_features(trainer, pl_module, self.extractor, self.batch_size, "Counterfactuals")
            distances = class_distances(trainer, pl_module, batches, chosen, features, self.min_class_images)
            used = training_settings(trainer, self.extractor, "Counterfactuals")
        found: list[Measurement] = []
        for (kind, place), search in searches.items():
            picture = None if self.picture_dirpath is None else Path(self.picture_dirpath) / f"{search.name}.png"
            if pictures_wanted(trainer, picture):
                show_picture(trainer, f"test/{search.name}", self._drawn(pl_module, search, shown), picture)
            judge = None
            if self.judge is not None:
                share = float(values["original_read"].double().mean())
                judge = Judge(network_identity(self.judge), share)
            measured = {
                name.removeprefix(f"{kind}_"): value[:, :, place] if value.dim() > 2 else value
                for name, value in values.items()
                if name.startswith(f"{kind}_")
            }
            found += search.figures(measured, self.changed_level, judge, picture)
            if (kind, place) in distances:
                found += search.fid(*distances[kind, place], self.min_class_images, used)
        return found

    def _drawn(self, pl_module: LightningModule, search: Search, shown: Values) -> Image.Image:
        """Walks from the images shown once more: values are kept of all images, counterfactuals of none."""
        like = first_weight(pl_module, shown["x"])
        x, y = shown["x"].to(like), shown["y"].to(pl_module.device)
        targets = self.choose_targets(search.targets, _logits(pl_module, x), y, shown["index"])
        # Of "all", each image shows another one.
        places = torch.arange(len(x), device=x.device) % targets.shape[1]
        targets = targets.gather(1, places.unsqueeze(1)).squeeze(1)
        changed = self.change(pl_module, x, targets, search.eps)
        confidence = _logits(pl_module, changed).double().softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
        read = None if self.judge is None else self.read(changed, targets)
        return drawn_counterfactuals(search, x, y, changed, targets, confidence, read)


def _logits(pl_module: LightningModule, x: Tensor) -> Tensor:
    with torch.no_grad(), no_trace(pl_module):
        logits = logits_of(pl_module, x, "Counterfactuals", least=2)
    require_finite(logits, "Counterfactuals")
    return logits
