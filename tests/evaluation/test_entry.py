"""The same data in any form give every evaluator the same figures; data of another range are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dat_lightning import EvaluationReport, Memorisation, PGDSampler, ThreatModel
from dat_lightning.core.errors import InputError
from dat_lightning.data import UniformNoise
from dat_lightning.data.draws import EvaluationBatches
from dat_lightning.evaluation import (
    AutoAttack,
    Calibration,
    Counterfactuals,
    EnergyStatistics,
    OODDetection,
    RobustAccuracy,
)
from dat_lightning.evaluation.evaluator import Evaluator
from tests import tiny
from tests.sampling.test_memorisation import Foreign, Pixels, real

IMAGES = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 10

ATTACK = ThreatModel(eps=0.3, step_size=0.1, num_steps=2)
EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    "RobustAccuracy": lambda: RobustAccuracy(ATTACK),
    "AutoAttack": lambda: AutoAttack("Linf", 0.1, attacks=["apgd-ce"]),
    "Calibration": lambda: Calibration(num_bins=4),
    "Counterfactuals": lambda: Counterfactuals([0.5], num_steps=2),
    "OODDetection": lambda: OODDetection({"noise": UniformNoise(10, (1, 16, 16))}, attack=ATTACK),
    "EnergyStatistics": lambda: EnergyStatistics({"noise": UniformNoise(10, (1, 16, 16))}, attack=ATTACK),
}


def mappings(x: Tensor = IMAGES, y: Tensor = LABELS) -> DataLoader[Any]:
    batches = [{"x": x[k : k + 7], "y": y[k : k + 7], "index": torch.arange(20)[k : k + 7]} for k in (0, 7, 14)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def pairs(x: Tensor = IMAGES, y: Tensor = LABELS) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=7)


class Plain(LightningDataModule):
    """A DataModule of another project."""

    def __init__(self, test: Any, val: Any = None) -> None:
        super().__init__()
        self.test, self.val = test, val

    def test_dataloader(self) -> Any:
        return self.test

    def val_dataloader(self) -> Any:
        return self.val


def module() -> Foreign:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Foreign()


def values(path: Path, evaluator: Any, data: LightningDataModule, *others: Any) -> dict[str, float]:
    tiny.trainer(path, [*others, evaluator]).test(module(), datamodule=data, verbose=False)
    assert evaluator.figures
    return {figure.name: figure.value for figure in evaluator.figures}


@pytest.mark.filterwarnings("ignore:.*gradient masking")
@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_takes_pairs_with_labels_of_any_type(name: str, tmp_path: Path) -> None:
    expected = values(tmp_path, EVALUATORS[name](), Plain(mappings(), [mappings()]))
    forms = [pairs(), pairs(y=LABELS.int()), pairs(y=LABELS.byte().view(20, 1)), pairs(y=LABELS.float())]
    for form in forms:
        for test in (form, [form], {"only": form}):
            assert values(tmp_path, EVALUATORS[name](), Plain(test, [form])) == expected


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_refuses_normalised_images_and_labels_that_are_none(name: str, tmp_path: Path) -> None:
    normalised = (IMAGES - 0.5) / 0.25
    with pytest.raises(InputError, match=rf"x of {name} must be images in \[0, 1\], got values in \[-[12].*, [12]"):
        values(tmp_path, EVALUATORS[name](), Plain(pairs(normalised)))
    with pytest.raises(InputError, match=rf"y of {name} must be class indices, .* got 0.7 among them"):
        values(tmp_path, EVALUATORS[name](), Plain(pairs(y=LABELS.float().index_fill(0, torch.tensor([3]), 0.7))))
    with pytest.raises(InputError, match=rf"y of {name} must be class indices, .* of shape \(7, 10\)"):
        values(tmp_path, EVALUATORS[name](), Plain(pairs(y=torch.eye(10)[LABELS])))


@pytest.mark.parametrize("name", ["RobustAccuracy", "AutoAttack", "Calibration", "Counterfactuals"])
def test_labels_that_the_network_does_not_have_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: labels must lie in 0 … 9, got 1 … 10"):
        values(tmp_path, EVALUATORS[name](), Plain(pairs(y=LABELS + 1)))


def test_validation_images_are_looked_at_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x of Calibration, for temperature scaling, must be images in \[0, 1\]"):
        values(tmp_path, Calibration(), Plain(pairs(), pairs(IMAGES * 255)))


class WithSeeds(Plain):
    """Digits to compare with, and samples that are their seeds."""

    def __init__(self, test: Any, scale: float = 1.0) -> None:
        super().__init__(test)
        self.scale = scale

    def held_out_seeds(self) -> Any:
        return lambda index: IMAGES[index % 20]

    def reference_data(self) -> EvaluationBatches:
        data = [(image, 0) for image in real("train")[:50]]
        return EvaluationBatches(data, lambda image: image * self.scale)


def test_memorisation_takes_pairs_in_a_list_and_bare_seeds(tmp_path: Path) -> None:
    def found(test: Any) -> dict[str, float]:
        sampler = PGDSampler(num_samples=20, num_steps=[0], step_size=0.5)
        return values(tmp_path, Memorisation(Pixels(), quantile=0.2), WithSeeds(test), sampler)

    shown = found([pairs()])
    assert shown == found(mappings())
    # Every sample is the test image of its index, so that both have the same distances to training images.
    features = [np.rint(x.flatten(1).double().numpy() * 255) / 255 for x in (IMAGES, real("train")[:50])]
    nearest = np.sqrt(((features[0][:, None] - features[1][None]) ** 2).sum(2)).min(1)
    assert shown["nearest_training_distance"] == pytest.approx(np.sort(nearest)[9], abs=1e-5)
    assert shown["memorised_share"] == pytest.approx((nearest < np.quantile(nearest, 0.2)).mean())


def test_memorisation_refuses_test_and_reference_images_of_another_range(tmp_path: Path) -> None:
    sampler = PGDSampler(num_samples=20, num_steps=[0], step_size=0.5)
    with pytest.raises(InputError, match=r"x of Memorisation must be images in \[0, 1\], got values in .*, 25"):
        values(tmp_path, Memorisation(Pixels()), WithSeeds([pairs(IMAGES * 255)]), sampler)
    with pytest.raises(InputError, match=r"images of reference_data\(\) must be images in \[0, 1\], got .*, 255\]"):
        values(tmp_path, Memorisation(Pixels()), WithSeeds([pairs()], scale=255), sampler)


def test_a_report_takes_what_its_module_tests(tmp_path: Path) -> None:
    """Also images that no evaluator would take, whose digest it just does without."""

    class Logging(Foreign):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test/mean", batch[0].mean())

    def report(*batch: Tensor) -> Any:
        written = EvaluationReport(str(tmp_path / f"{len(batch)}.json"), page=False)
        trainer: Trainer = tiny.trainer(tmp_path, [written])
        trainer.test(Logging(), DataLoader(TensorDataset(*batch), batch_size=7), verbose=False)
        return (tmp_path / f"{len(batch)}.json").read_text()

    unknown = '"test_images": null'
    assert unknown not in report(IMAGES * 255, LABELS)
    assert unknown in report(IMAGES)


class Odd(Foreign):
    """A network of somebody else that gives something else than logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(super().forward(x))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measures nothing itself."""


@pytest.mark.parametrize("dirpath", [None, "kept"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda logits: (logits, logits), "a tuple"),
        (lambda logits: {"logits": logits}, "a dict"),
        (lambda logits: logits[:, :, None, None], r"shape \(20, 10, 1, 1\)"),
    ],
)
@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_refuses_what_are_no_logits(
    name: str, change: Callable[[Tensor], Any], found: str, dirpath: str | None, tmp_path: Path
) -> None:
    evaluator = EVALUATORS[name]()
    evaluator.dirpath = None if dirpath is None else str(tmp_path / dirpath)
    data = Plain(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=20))
    with pytest.raises(InputError, match=rf"{name} needs logits \(N, K\) .*, and Odd gave {found} for 20 images"):
        tiny.trainer(tmp_path, [evaluator]).test(Odd(change), datamodule=data, verbose=False)


@pytest.mark.parametrize("name", ["OODDetection", "EnergyStatistics"])
@pytest.mark.parametrize(
    ("change", "ending"), [(lambda f: f.log_softmax(1), "log_softmax"), (lambda f: f.softmax(1), "softmax")]
)
def test_energies_of_probabilities_are_refused(
    name: str, change: Callable[[Tensor], Any], ending: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"Odd seems to end in {ending}, which leaves no energy"):
        tiny.trainer(tmp_path, [EVALUATORS[name]()]).test(Odd(change), datamodule=Plain(pairs()), verbose=False)
