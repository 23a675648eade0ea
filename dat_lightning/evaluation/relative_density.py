"""Relative density: whether −E(x) ranks test images as a density does that the data know, and groups by how rare."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef
from typing_extensions import override

from dat_lightning.core.energy import joint_energy, marginal_energy
from dat_lightning.core.errors import InputError
from dat_lightning.core.losses import is_right
from dat_lightning.data.batches import logits_of
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.evaluation.ood_scores import auroc
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement


@runtime_checkable
class KnownDensity(Protocol):
    """What a DataModule knows of its images' density, such as :class:`~dat_lightning.data.PlaneDataModule`."""

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of groups of images, the most common one first."""

    def groups(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the group of each image, (N,)."""

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log p(x) up to a constant, (N,), float64."""


class RelativeDensity(Evaluator):
    """Compares −E(x) of test images with the logarithm of their density, and with how common their groups are.

    | figure | definition |
    |---|---|
    | ``rank_correlation`` | Spearman's, of −E(x) and log p(x) |
    | ``rank_correlation_balanced`` | the same over equally many images of each group, the first of each |
    | ``rank_correlation_within`` | the mean over groups of the same within each, where log p(x) varies there |
    | ``rarity_auroc_{group}`` | share of pairs with the most common group in which that has the larger −E(x) |
    | ``score_{group}``, ``class_score_{group}`` | means of −E(x), and of −E(x, y) at the true class |
    | ``accuracy_{group}`` | share of images whose class is right, of networks with classes |

    A rank correlation is NaN where all of −E are equal.

    Logged: ``test/{figure}``.

    Args:
        dirpath: See :class:`Evaluator`.

    Raises:
        InputError: In a test, if the DataModule knows no density, logits are not finite, or a group has no test image.

    Source: DAT (arXiv 2510.13872), among its open questions.
    """

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns −E(x), −E(x, y), and whether the class is right, of each image."""
        x, y = batch["x"], batch["y"]
        with torch.no_grad():
            logits = logits_of(pl_module, x, type(self).__name__).cpu().double()
        one_logit = logits.shape[1] == 1
        own = torch.zeros_like(y.cpu()) if one_logit else y.cpu()
        self.check_logits(logits, own, least=1)
        values = {"score": -marginal_energy(logits), "class_score": -joint_energy(logits, own)}
        if not one_logit:
            values["right"] = is_right(logits, own)
        return values

    @override
    def known_values(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns log p and group of each image."""
        data, x, y = density_of(pl_module.trainer, type(self).__name__), batch["x"], batch["y"]
        return {"log_density": data.log_density(x, y).cpu(), "group": data.groups(x, y).cpu()}

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns rank correlations, and the figures of each group."""
        names = density_of(trainer, type(self).__name__).group_names
        places = [torch.nonzero(values["group"] == k).squeeze(1) for k in range(len(names))]
        for name, place in zip(names, places, strict=True):
            if not len(place):
                raise InputError(f"{type(self).__name__}: no test image is of the group {name!r}")
        score, log_density = values["score"], values["log_density"]
        least = min(map(len, places))
        balanced = torch.cat([place[:least] for place in places])
        inside = [(score[p], log_density[p]) for p in places if len(log_density[p].unique()) > 1]
        words = "Spearman's rank correlation of −E(x) and log p(x)"
        found = [
            Measurement("rank_correlation", rank_correlation(score, log_density), words, len(score), {}, "higher"),
            Measurement(
                "rank_correlation_balanced",
                rank_correlation(score[balanced], log_density[balanced]),
                f"{words}, over equally many images of each group",
                len(balanced),
                {"images_per_group": least},
                "higher",
            ),
        ]
        if inside:
            each = [rank_correlation(*pair) for pair in inside]
            mean, more = sum(each) / len(each), {"of_each_group": each}
            what = f"{words} within a group, mean over groups"
            found.append(Measurement("rank_correlation_within", mean, what, len(score), more, "higher"))
        return [*found, *self._of_groups(values, names, places)]

    def _of_groups(self, values: Values, names: tuple[str, ...], places: list[Tensor]) -> list[Measurement]:
        found = []
        for name, place in zip(names, places, strict=True):
            size, told = len(place), name.replace("_", " ")
            if name != names[0]:
                common = values["score"][places[0]]
                words = (
                    f"share of pairs of an image of {names[0].replace('_', ' ')} and one of {told}, in which the first"
                )
                area = auroc(common, values["score"][place])
                found.append(Measurement(f"rarity_auroc_{name}", area, f"{words} has the larger −E(x)", size))
            for quantity, words in (("score", "−E(x)"), ("class_score", "−E(x, y)")):
                mean = float(values[quantity][place].mean())
                found.append(Measurement(f"{quantity}_{name}", mean, f"mean of {words} over {told}", size))
            if "right" in values:
                share = float(values["right"][place].double().mean())
                found.append(Measurement(f"accuracy_{name}", share, f"accuracy over {told}", size, {}, "higher"))
        return found


def rank_correlation(score: Tensor, log_density: Tensor) -> float:
    """Returns Spearman's rank correlation of two rows of numbers, (N,) each; ties have their mean rank."""
    return float(spearman_corrcoef(_ranks(score), _ranks(log_density)))


def _ranks(values: Tensor) -> Tensor:
    """Places among the different values: torchmetrics compares floats, but this order is that of float64."""
    _, places = values.unique(return_inverse=True)
    ranks: Tensor = places.double()
    return ranks


def density_of(trainer: Trainer, who: str) -> KnownDensity:
    """Returns the Trainer's DataModule.

    Raises:
        InputError: If it knows no density.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, KnownDensity):
        raise InputError(
            f"{who} needs a DataModule with group_names, groups() and log_density(), such as PlaneDataModule, got"
            f" {type(data).__name__}"
        )
    return data
