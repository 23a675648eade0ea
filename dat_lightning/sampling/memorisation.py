"""Memorisation: are generated samples nearer to training images than real images that the network never saw?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.data.batches import EvaluationEntry, only_loader
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.features.layers import extract_features
from dat_lightning.features.neighbours import NeighbourMetric, nearest_neighbours
from dat_lightning.results.digests import image_digests, set_identity
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.pictures import pictures_wanted, show_picture
from dat_lightning.results.progress import is_silent
from dat_lightning.sampling.pgd_sampler import SampleConsumer
from dat_lightning.sampling.picture_grids import Shortlist, Tile, captioned_grid
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan, Stage, checked_stages
from dat_lightning.sampling.reference import reference_data, training_features, training_settings
from dat_lightning.sampling.sweep import log_sweep, over_sweep

_LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_MAX_LISTED = 100
_GROUPS = 2


class Memorisation(SampleConsumer):
    """Finds the nearest training images of each generated sample, and flags samples that lie suspiciously near.

    Distances are those of features, which ranks share the work of computing; the search is exact, in float64. A sample
    is flagged if it is nearer to a training image than all but a share ``quantile`` of real test images are: were
    samples as far from the training images as these, about that share would be flagged. Images are rounded to eight
    bits first.

    Every snapshot of the sampler's sweep is searched: bad samples are far from everything, so one number of steps that
    makes bad ones would hide what another has memorised. In memory stay the features of all training images, on every
    rank, and of samples no features, but 16 bytes for each sample, snapshot and neighbour, and the pictures of each
    snapshot.

    Logged: ``{stage}/memorised_share`` and ``{stage}/nearest_training_distance``, the median, both after ``num_steps``
    steps, which are ``{stage}/memorisation_steps``; and with the ending ``_{steps}_steps`` for each snapshot.

    Args:
        extractor: Maps uint8 images (N, 3, H, W) to features, as in :class:`~dat_lightning.sampling.FrechetDistance`.
        num_neighbours: Training images shown and listed beside each sample.
        num_pictures: Samples shown, those nearest to a training image.
        dirpath: Folder for ``{stage}_memorisation_{steps}_steps.png``; ``None`` writes no file. Loggers that take
            images get the picture as ``{stage}/memorisation/{steps}_steps``.
        metric: Euclidean distance, or one minus the cosine.
        quantile: Of the distances of real test images; nearer samples are flagged.
        num_steps: Step count of the snapshot that is pictured and has the figures without ending; by default the one
            with the largest share, of equal ones that with the smallest distance.
        stages: The evaluations that look.
        batch_size: Training images per pass of the extractor.

    Attributes:
        figures: Results of the last evaluation, on every rank; those without ending come first.

    Raises:
        InputError: If a number is outside its range or the metric unknown; when sampling starts, if the sampler takes
            no snapshot at ``num_steps``, training images are too few, or test images are missing or not in [0, 1].
    """

    def __init__(
        self,
        extractor: nn.Module,
        num_neighbours: int = 3,
        num_pictures: int = 16,
        dirpath: str | None = None,
        metric: NeighbourMetric = "L2",
        quantile: float = 0.01,
        num_steps: int | None = None,
        stages: Sequence[Stage] = ("test",),
        batch_size: int = 250,
    ) -> None:
        require_at_least(1, num_neighbours=num_neighbours, num_pictures=num_pictures, batch_size=batch_size)
        if metric not in ("L2", "cosine"):
            raise InputError(f"metric must be 'L2' or 'cosine', got {metric!r}")
        if not 0 < quantile < 1:
            raise InputError(f"quantile must be between 0 and 1, got {quantile}")
        self.extractor = extractor.requires_grad_(False).eval()
        self.num_neighbours = num_neighbours
        self.num_pictures = num_pictures
        self.dirpath = dirpath
        self.metric: NeighbourMetric = metric
        self.quantile = quantile
        self.num_steps = num_steps
        self.stages = checked_stages(stages)
        self.batch_size = batch_size
        self.figures: list[Measurement] = []
        self._training: Values = {}
        self._held_out: Values = {}
        self._settings: dict[str, Any] = {}
        self._found: dict[int, list[Values]] = {}
        self._closest: dict[int, Shortlist] = {}

    @property
    @override
    def logged_names(self) -> set[str]:
        """Names that are logged behind the stage, but for those of single step counts."""
        return {"memorised_share", "nearest_training_distance", "memorisation_steps"}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks for a sampler, and forgets earlier data."""
        super().setup(trainer, pl_module, stage)
        self._training = {}

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Computes the features of training images, and how far from them test images are; once for a Trainer."""
        plan.check_snapshot("Memorisation", self.num_steps)
        self.figures = []
        self._found = {steps: [] for steps in plan.num_steps}
        self._closest = {steps: Shortlist(self.num_pictures) for steps in plan.num_steps}
        self.extractor.to(pl_module.device)
        if not self._training:
            batches = training_features(trainer, pl_module, self.extractor, self.batch_size, "Memorisation")
            training = gather(list(batches), "reference_data() of the DataModule gave no image")
            if len(training["index"]) < self.num_neighbours:
                raise InputError(
                    f"num_neighbours must be at most the number of training images {len(training['index'])}, got"
                    f" {self.num_neighbours}"
                )
            self._held_out = self._held_out_distances(trainer, pl_module, training["features"])
            self._settings = {
                "metric": self.metric,
                **training_settings(trainer, self.extractor, "Memorisation"),
                "test_images": set_identity(self._held_out["digest"]),
            }
            self._training = training

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Finds the neighbours of this batch's samples, and keeps the images of the nearest."""
        labels, indices = batch.labels.cpu(), batch.indices.cpu()
        for steps, images in batch.images.items():
            features = extract_features(self.extractor, images, self.plan.rounding)
            distances, places = nearest_neighbours(
                features, self._training["features"], self.num_neighbours, self.metric
            )
            values = {"distances": distances, "neighbours": self._training["index"][places], "y": labels}
            self._found[steps].append({"index": indices, **values})
            shown = {**values, "image": to_uint8_rgb(images, self.plan.rounding)}
            self._closest[steps].add(distances[:, 0].tolist(), indices.tolist(), shown)

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the ranks together, draws, and logs the figures."""
        found = {steps: gather(values, "no samples were generated") for steps, values in self._found.items()}
        threshold = self._threshold()
        made = {steps: self._pair(found[steps], threshold, steps, [steps]) for steps in found}
        best = self.num_steps
        if best is None:
            best = min(made, key=lambda steps: (-made[steps][0].value, made[steps][1].value, steps))
        # Of the pictures, only these travel between ranks.
        closest = self._closest[best].gathered()
        self._found, self._closest = {}, {}
        picture = None
        if self.dirpath is not None:
            picture = Path(self.dirpath) / f"{self.plan.stage}_memorisation_{best}_steps.png"
        if pictures_wanted(trainer, picture):
            drawn = self._drawn(trainer, closest, threshold, best)
            show_picture(trainer, f"{self.plan.stage}/memorisation/{best}_steps", drawn, picture)
        among = list(found) if self.num_steps is None else [best]
        share, distance = self._pair(found[best], threshold, best, among)
        listed = {"flagged": _listed(found[best], threshold), "pictures": [] if picture is None else [str(picture)]}
        self.figures = over_sweep(made, [replace(share, details={**share.details, **listed}), distance])
        log_sweep(pl_module, self.plan.stage, self.figures, "memorisation_steps", best)

    # Parts.

    def _threshold(self) -> float:
        """The distance below which a sample is flagged."""
        threshold = float(torch.quantile(self._held_out["distance"], self.quantile))
        # Batches composed differently make a copy's features differ in their last bits.
        size = float(self._training["features"].double().norm(dim=1).mean()) if self.metric == "L2" else 1e-4
        if threshold > 1e-5 * size:
            return threshold
        rank_zero_warn(
            "Memorisation: test images are at distance 0 from training images, so that no sample is flagged;"
            " is the test set part of the training set?"
        )
        return 0.0

    def _held_out_distances(self, trainer: Trainer, pl_module: LightningModule, training: Tensor) -> Values:
        """Distances of all test images to their nearest training images, (N,) in float64, and their digests."""
        values = []
        loader = only_loader(trainer.datamodule.test_dataloader(), "Memorisation")  # type: ignore[attr-defined]
        entry = EvaluationEntry("Memorisation", loader, trainer, parts=("x",))
        for batch in map(
            entry, tqdm(loader, desc="Memorisation: test images", leave=False, disable=is_silent(trainer))
        ):
            features = extract_features(self.extractor, batch["x"].to(pl_module.device))
            distances, _ = nearest_neighbours(features, training, 1, self.metric)
            digests = image_digests(batch["x"], batch["index"])
            values.append({"index": batch["index"].cpu(), "distance": distances[:, 0], "digest": digests})
        held_out = gather(values, "test_dataloader() of the DataModule gave no batch")
        count = len(held_out["index"])
        if count * self.quantile < 1:
            rank_zero_warn(
                f"Memorisation: {count} test images are few for the quantile {self.quantile:g}; the threshold"
                " is close to the smallest of their distances"
            )
        return held_out

    def _pair(
        self, found: Values, threshold: float, steps: int, among: Sequence[int]
    ) -> tuple[Measurement, Measurement]:
        """The two figures of a snapshot, which was chosen among several or is the only one."""
        nearest, real = found["distances"][:, 0], self._held_out["distance"]
        levels = torch.tensor(_LEVELS, dtype=torch.float64)
        details = {
            "num_sampling_steps": steps,
            "num_training_images": len(self._training["index"]),
            "num_test_images": len(real),
            "threshold": threshold,
            "quantile_levels": list(_LEVELS),
            "sample_quantiles": torch.quantile(nearest, levels).tolist(),
            "test_image_quantiles": torch.quantile(real, levels).tolist(),
        }
        # A number of steps that results from the sweep stands in the details, so that runs can be compared.
        after = steps if len(among) == 1 else f"those of {', '.join(map(str, among))} with the largest memorised share"
        settings = {
            **self._settings,
            "num_sampling_steps": after,
            **{f"sampling_{k}": v for k, v in self.plan.settings.items()},
            "rounding": self.plan.rounding,
        }
        value, size = float((nearest < threshold).double().mean()), len(nearest)
        share = "share of samples nearer to a training image than a quantile of real test images"
        median = "median distance of samples to the nearest training image"
        nearer = {**settings, "quantile": self.quantile}
        return (
            Measurement("memorised_share", value, share, size, details, "lower", nearer),
            Measurement("nearest_training_distance", float(nearest.median()), median, size, details, None, settings),
        )

    def _drawn(self, trainer: Trainer, closest: Values, threshold: float, steps: int) -> Image.Image:
        data = reference_data(trainer, "Memorisation compares with training images:")
        batch = data[sorted(set(closest["neighbours"].flatten().tolist()))]
        images = dict(zip(batch["index"].tolist(), to_uint8_rgb(batch["x"]), strict=True))
        labels = dict(zip(batch["index"].tolist(), batch["y"].tolist(), strict=True))
        groups: list[list[Tile | None]] = []
        for row, index in enumerate(closest["index"].tolist()):
            distances: list[float] = closest["distances"][row].tolist()
            near = distances[0] < threshold
            group: list[Tile | None] = [
                Tile(closest["image"][row], f"sample {index}\nclass {int(closest['y'][row])}", near)
            ]
            for neighbour, distance in zip(closest["neighbours"][row].tolist(), distances, strict=True):
                group.append(Tile(images[neighbour], f"training {labels[neighbour]}\n{distance:.3g}"))
            groups.append(group)
        rows = []
        for first in range(0, len(groups), _GROUPS):
            parted = [[*group, None] for group in groups[first : first + _GROUPS]]
            rows.append([tile for group in parted for tile in group][:-1])
        where = f"{self.metric}, in features of {type(self.extractor).__name__}"
        title = (
            f"The {len(groups)} samples nearest to training images after {steps} steps, closest first, row by row, each"
            f" with its {self.num_neighbours} nearest, their classes and distances ({where}).\n"
            f"Red frame: nearer than {threshold:.3g}, the {self.quantile:g} quantile of real test images."
        )
        return captioned_grid(rows, title)


def _listed(found: Values, threshold: float) -> list[dict[str, Any]]:
    """Flagged samples, nearest first, with their neighbours."""
    nearest = found["distances"][:, 0]
    order = nearest.argsort(stable=True)[: min(_MAX_LISTED, int((nearest < threshold).sum()))].tolist()
    return [
        {
            "sample": int(found["index"][i]),
            "class": int(found["y"][i]),
            "distances": found["distances"][i].tolist(),
            "training_images": found["neighbours"][i].tolist(),
        }
        for i in order
    ]
