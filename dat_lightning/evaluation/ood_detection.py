"""Out-of-distribution detection: how well a score of the logits tells test images from others, also under attack."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.attack import ascend
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.data.batches import check_energy, logits_of
from dat_lightning.data.entries import SizedDataset
from dat_lightning.evaluation.ood_images import OODEvaluator
from dat_lightning.evaluation.ood_scores import OBJECTIVES, Score, auroc, detection_scores, false_positive_rates
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement


class OODDetection(OODEvaluator):
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
        datasets: Name → OOD images, see :class:`OODEvaluator`.
        scores: Which scores.
        num_ood: OOD images of each data set, at most.
        attack: The attack; ``None`` leaves it out. The default is for 32×32; for 224×224 and above ε 3, 10 steps of 1.
        shared: Further arguments of :class:`OODEvaluator`.

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
        **shared: Any,
    ) -> None:
        require_at_least(1, num_ood=num_ood)
        if datasets is not None and not datasets:
            raise InputError("datasets must name at least one data set, got none")
        super().__init__(datasets=datasets, num_images=num_ood, **shared)
        if not scores or set(scores) - set(get_args(Score)):
            raise InputError(f"scores must be some of {get_args(Score)}, got {list(scores)}")
        self.scores = tuple(scores)
        self.num_ood = num_ood
        self.attack = attack

    @override
    def settings(self) -> dict[str, Any]:
        """Returns scores, attack and seed."""
        return {"scores": self.scores, "attack": self.attack, "seed": self.seed}

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there are OOD images."""
        super().on_test_start(trainer, pl_module)
        if not self.ood_images(trainer):
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
        for name, (dataset, transform) in self.ood_images(trainer).items():
            compute = partial(self._ood_values, pl_module)
            found, images, details = self.evaluate_images(trainer, pl_module, name, dataset, transform, compute)
            for attack in (None, self.attack) if self.attack is not None else (None,):
                for score in self.scores:
                    settings = {
                        "data": f"{name} {images}",
                        "num_ood": len(found["index"]),
                        "score": score,
                        "attack": None if attack is None else asdict(attack),
                    }
                    scores = found[score if attack is None else f"{score}_attacked"]
                    measured += _measured(f"{name}_{score}", values[score], scores, settings, details)
        return measured

    def _scores(self, pl_module: LightningModule, x: Tensor) -> Values:
        with torch.no_grad():
            logits = logits_of(pl_module, x, "OODDetection")
        if "logsumexp" in self.scores:
            check_energy(logits, type(pl_module).__name__)
        found = detection_scores(logits)
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
