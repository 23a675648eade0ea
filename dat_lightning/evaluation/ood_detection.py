"""Out-of-distribution detection: how well a score of the logits tells test images from others, also under attack."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.ascent import ascend
from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import RandomPermutation
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.data.batches import check_pixels, stacked
from dat_lightning.data.draws import EvaluationBatches
from dat_lightning.data.entries import SizedDataset
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.evaluation.ood_scores import OBJECTIVES, Score, auroc, detection_scores, false_positive_rates
from dat_lightning.results.digests import image_digests, set_identity
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.progress import is_silent

Transform = Callable[[Any], Tensor]


class HeldOutSeeds:
    """The first seeds of a DataModule's ``held_out_seeds()`` as a data set, for those that name no data set itself."""

    def __init__(self, seeds: Callable[[int], Any], size: int) -> None:
        self.seeds = seeds
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.seeds(index)


def ood_datasets(
    trainer: Trainer,
    given: Mapping[str, SizedDataset] | None,
    transform: Transform | None,
    count: int,
    who: str,
) -> dict[str, tuple[SizedDataset, Transform]]:
    """Returns OOD data by name, each with its transform: those given, or else the DataModule's held-out ones, or none.

    Args:
        trainer: Has the DataModule.
        given: Name → data set.
        transform: For images of a data set; by default the DataModule's for evaluation, or else none.
        count: Images that are wanted, for a DataModule that has ``held_out_seeds()`` alone: these are endless.
        who: Who asks, for messages.

    Raises:
        InputError: If a given data set is empty, or its name cannot be part of a figure's and of a file's.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if transform is None:
        own = getattr(data, "evaluation_transform", None)
        transform = own() if callable(own) else _unchanged
    if given is None:
        source, seeds = (getattr(data, name, None) for name in ("out_of_distribution", "held_out_seeds"))
        if not callable(source) and callable(seeds):
            # They are images in [0, 1] already.
            return {"held_out": (HeldOutSeeds(seeds(), count), _unchanged)}
        held_out = source("held_out") if callable(source) else None
        return {} if held_out is None or len(held_out) == 0 else {"held_out": (held_out, transform)}
    for name, dataset in given.items():
        if not re.fullmatch(r"\w+", name):
            raise InputError(f"{who}.datasets: a name must consist of letters, digits and underscores, got {name!r}")
        if len(dataset) == 0:
            raise InputError(f"{who}.datasets: {name!r} has no images")
    return {name: (dataset, transform) for name, dataset in given.items()}


def choose(size: int, count: int, seed: int, name: str) -> list[int]:
    """Returns ``count`` different indices below ``size`` in an order that seed and name determine, or all of them."""
    permutation = RandomPermutation(size, seed, "evaluated images", name)
    return [permutation[k] for k in range(min(size, count))]


def evaluate_images(
    evaluator: Evaluator,
    trainer: Trainer,
    pl_module: LightningModule,
    part: str,
    dataset: SizedDataset,
    transform: Transform,
    indices: Sequence[int],
    batch_size: int,
    compute: Callable[[Mapping[str, Tensor]], Values],
) -> tuple[Values, int]:
    """Returns the values of a data set's images, sorted by index, and how many images were corrupt.

    Beside the values is a number that tells images apart, under ``digest``. The indices are dealt to the ranks in turn;
    every rank must call it, and gets everything.

    Args:
        evaluator: Remembers what was computed.
        trainer: The Trainer.
        pl_module: The module that is tested.
        part: Name of the set; it begins the names of files.
        dataset: Entries are images, or pairs that begin with one.
        transform: Maps an image to a tensor (C, H, W) in [0, 1].
        indices: Which entries; corrupt ones are left out.
        batch_size: Images per batch and rank.
        compute: Maps a batch with ``x`` and ``index`` to values per example.

    Raises:
        InputError: If the transform gives something else, or no image can be read.
    """
    mine = list(indices)[trainer.global_rank :: trainer.world_size]
    dtype = next((p.dtype for p in pl_module.parameters() if p.is_floating_point()), torch.float32)
    values: list[Values] = []
    firsts, reader = range(0, len(mine), batch_size), EvaluationBatches(dataset, transform)
    for first in tqdm(firsts, desc=f"{type(evaluator).__name__}: {part}", leave=False, disable=is_silent(trainer)):
        read = reader.read(mine[first : first + batch_size])
        if read:
            kept, images, _ = zip(*read, strict=True)
            x = stacked(images, f"the images of {part!r}")
            check_pixels(x, f"the images of {part!r}, after their transform,")
            batch = {"x": x.to(pl_module.device, dtype), "index": torch.tensor(kept)}
            with torch.no_grad():
                found = evaluator.remember(pl_module, batch, compute, part)
            digests = image_digests(batch["x"], torch.zeros(len(x)))
            values.append({"index": batch["index"], "digest": digests, **found})
    found = gather(values, f"no image of {part!r} could be read: {reader.images.last}")
    return found, len(indices) - len(found["index"])


class OODDetection(Evaluator):
    """Measures how well scores of the logits tell the test images from out-of-distribution ones.

    Scores are logsumexp f(x) = −E(x), the largest logit and the largest softmax; high means in-distribution. For each
    data set and score there are, also after an attack on the OOD images that climbs that score (for the softmax, its
    log-odds, whose gradient does not vanish):

    | figure | definition |
    |---|---|
    | ``ood_auroc_{data}_{score}`` | area under the ROC curve, ties counted half |
    | ``ood_fpr95_{data}_{score}`` | share of OOD images at or above the threshold that 95 % of test images reach |
    | ``{…}_attacked`` | the same with attacked OOD images; test images stay clean |

    The figures' ``details["roc"]`` have the curve at a hundred shares of accepted test images.

    Args:
        datasets: Name → OOD images, any data set of images, or of pairs that begin with one; by default the
            DataModule's held-out seeds, under the name ``held_out``.
        scores: Which scores.
        num_ood: OOD images of each data set, at most; a seeded choice, corrupt ones among it are left out.
        attack: The attack; ``None`` leaves it out. The default is for 32×32; for 224×224 and above ε 3, 10 steps of 1.
        transform: Maps an entry's image to a tensor (C, H, W) in [0, 1]; by default the DataModule's for evaluation.
        batch_size: OOD images per batch and rank.
        seed: Seed of the choice and of random starts.
        dirpath: See :class:`Evaluator`.

    Raises:
        InputError: If an argument is outside its range; in a test, if there are no OOD images, or they are not in
            [0, 1] after the transform, or a score is NaN.

    Source: DAT (arXiv 2510.13872), on OOD detection; Augustin et al. 2020 (arXiv 2003.09461) for the attack; Hendrycks
    & Gimpel 2017 (arXiv 1610.02136) for the largest softmax; Liu et al. 2020 (arXiv 2010.03759) for logsumexp.
    """

    def __init__(
        self,
        datasets: Mapping[str, SizedDataset] | None = None,
        scores: Sequence[Score] = ("logsumexp", "max_logit", "max_softmax"),
        num_ood: int = 1024,
        attack: ThreatModel | None = ThreatModel(norm="L2", eps=1.0, step_size=0.1, num_steps=20),
        transform: nn.Module | Transform | None = None,
        batch_size: int = 256,
        seed: int = 0,
        dirpath: str | None = None,
    ) -> None:
        super().__init__(dirpath)
        if not scores or set(scores) - set(get_args(Score)):
            raise InputError(f"scores must be some of {get_args(Score)}, got {list(scores)}")
        for name, value in (("num_ood", num_ood), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if datasets is not None and not datasets:
            raise InputError("datasets must name at least one data set, got none")
        self.datasets = datasets
        self.scores = tuple(scores)
        self.num_ood = num_ood
        self.attack = attack
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed

    @override
    def settings(self) -> dict[str, Any]:
        """Returns scores, attack and seed."""
        return {"scores": self.scores, "attack": self.attack, "seed": self.seed}

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there are OOD images."""
        super().on_test_start(trainer, pl_module)
        if not self._data(trainer):
            raise InputError(
                "OODDetection has no out-of-distribution images: give it datasets, or use a DataModule with"
                " out_of_distribution() or held_out_seeds(), as PairedDataModule has them"
            )

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns the scores of test images."""
        return self._scores(pl_module, batch["x"])

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns the figures of all data sets and scores, clean before attacked."""
        measured: list[Measurement] = []
        for name, (dataset, transform) in self._data(trainer).items():
            chosen = choose(len(dataset), self.num_ood, self.seed, name)
            compute = partial(self._ood_values, pl_module)
            found, skipped = evaluate_images(
                self, trainer, pl_module, name, dataset, transform, chosen, self.batch_size, compute
            )
            images = set_identity(found["digest"])
            for attack in (None, self.attack) if self.attack is not None else (None,):
                for score in self.scores:
                    settings = {
                        "data": f"{name} {images}",
                        "num_ood": len(found["index"]),
                        "score": score,
                        "attack": None if attack is None else asdict(attack),
                    }
                    details = {"seed": self.seed, "num_skipped": skipped}
                    scores = found[score if attack is None else f"{score}_attacked"]
                    measured += _measured(f"{name}_{score}", values[score], scores, settings, details)
        return measured

    def _data(self, trainer: Trainer) -> dict[str, tuple[SizedDataset, Transform]]:
        return ood_datasets(trainer, self.datasets, self.transform, self.num_ood, "OODDetection")

    def _scores(self, pl_module: LightningModule, x: Tensor) -> Values:
        with torch.no_grad():
            found = detection_scores(pl_module(x))
        return {score: found[score] for score in self.scores}

    def _ood_values(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Scores of OOD images, and each score after the attack on it."""
        x, values = batch["x"], self._scores(pl_module, batch["x"])
        if self.attack is not None:
            y = torch.zeros(len(x), dtype=torch.long, device=x.device)  # no objective looks at it
            for score in self.scores:
                objective = OBJECTIVES[score]
                x_adv = ascend(pl_module, x, y, objective, self.attack, draws=batch["index"], seed=self.seed)
                values[f"{score}_attacked"] = self._scores(pl_module, x_adv)[score]
        return values


def _measured(
    name: str, inside: Tensor, outside: Tensor, settings: Mapping[str, Any], more: Mapping[str, Any]
) -> list[Measurement]:
    """AUROC and FPR@95 of one score on one data set."""
    accepted = [k / 100 for k in range(1, 101)]
    rates = false_positive_rates(inside, outside, accepted)
    rate, threshold = rates[accepted.index(0.95)]
    details = {
        **more,
        "threshold": threshold,
        "mean_score_test": float(inside.mean()),
        "mean_score_ood": float(outside.mean()),
        "roc": {"tpr": accepted, "fpr": [fpr for fpr, _ in rates]},
    }
    clean = settings["attack"] is None
    end, which = ("", "OOD images") if clean else ("_attacked", "OOD images that were attacked to raise the score")
    total = len(inside) + len(outside)
    area = f"area under the ROC curve of test images against {which}"
    reach = f"share of {which} at or above the score that 95 % of test images reach"
    return [
        Measurement(f"ood_auroc_{name}{end}", auroc(inside, outside), area, total, details, "higher", settings),
        Measurement(f"ood_fpr95_{name}{end}", rate, reach, total, details, "lower", settings),
    ]


def _unchanged(image: Tensor) -> Tensor:
    return image
