"""Calibration of the test images, scaled by what other images say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error

from dat_lightning import DigitsDataModule
from dat_lightning.data.digits import digits, split_indices
from dat_lightning.evaluation import Calibration, fit_temperature
from dat_lightning.results import Figure
from tests import tiny
from tests.evaluation.test_evaluator import ALL, IMAGES, LABELS, Plain


def figures(path: Path, calibration: Calibration, module: LightningModule, **data: Any) -> dict[str, Figure]:
    trainer = tiny.trainer(path, [calibration])
    trainer.test(module, verbose=False, **(data or {"datamodule": tiny.digits()}))
    found = {figure.name: figure for figure in calibration.figures}
    for name, figure in found.items():
        assert float(trainer.callback_metrics[f"test/{name}"]) == pytest.approx(figure.value, rel=1e-5)
    return found


def loader(batches: Any = ALL) -> Any:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def split(module: LightningModule, name: Any) -> tuple[Tensor, Tensor]:
    data = digits(split_indices(20)[name])
    x, y = zip(*(data[k] for k in range(len(data))), strict=True)
    with torch.no_grad():
        return module.eval()(torch.stack(x)), torch.tensor(y)


def check(found: dict[str, Figure], logits: Tensor, y: Tensor, suffix: str = "") -> None:
    """Compares all figures with plain computations."""
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    labels = y.numpy()
    rows = np.arange(len(labels))
    onehot = np.eye(p.shape[1])[labels]
    assert found[f"nll{suffix}"].value == pytest.approx(-np.log(p[rows, labels]).mean(), rel=1e-6)
    assert found[f"brier{suffix}"].value == pytest.approx(((p - onehot) ** 2).sum(1).mean(), rel=1e-6)
    expected = multiclass_calibration_error(torch.from_numpy(p), y, num_classes=p.shape[1], n_bins=15)
    assert found[f"ece{suffix}"].value == pytest.approx(float(expected), abs=1e-6)
    confidence, correct = p.max(1), p.argmax(1) == labels
    diagram = found[f"ece{suffix}"].details["reliability"]
    assert sum(diagram["count"]) == len(labels)
    assert np.dot(diagram["count"], diagram["accuracy"]) == pytest.approx(correct.sum())
    assert np.dot(diagram["count"], diagram["confidence"]) == pytest.approx(confidence.sum(), rel=1e-6)


def test_figures_of_digits_are_plain_computations_and_t_is_that_of_the_validation_images(tmp_path: Path) -> None:
    module = tiny.stage1()
    found = figures(tmp_path, Calibration(), module)
    assert set(found) == {
        *("ece", "nll", "brier", "temperature"),
        *("ece_scaled", "nll_scaled", "brier_scaled"),
    }
    logits, y = split(module, "test")
    check(found, logits, y)
    t = fit_temperature(*split(module, "val"))
    assert found["temperature"].value == pytest.approx(t, rel=1e-4)
    check(found, logits / found["temperature"].value, y, "_scaled")
    assert found["ece_scaled"].settings["temperature_of"] == "20 validation images that are no test images"
    assert {figure.num_samples for figure in found.values()} == {360}


def test_batches_do_not_matter(tmp_path: Path) -> None:
    one = figures(tmp_path, Calibration(), tiny.stage1())
    two = figures(tmp_path, Calibration(), tiny.stage1(), datamodule=tiny.digits(eval_batch_size=47))
    assert {name: f.value for name, f in two.items()} == pytest.approx({n: f.value for n, f in one.items()}, rel=1e-5)


class SameImages(DigitsDataModule):
    """Validates on the test images, as data without a validation split do."""

    def in_distribution(self, split: Any) -> Any:
        return super().in_distribution("test" if split == "val" else split)


def check_halves(found: dict[str, Figure], logits: Tensor, y: Tensor, why: str) -> None:
    even, odd = (fit_temperature(logits[k::2], y[k::2]) for k in (0, 1))
    assert found["temperature"].details["temperatures"] == pytest.approx([odd, even], rel=1e-4)
    assert found["temperature"].value == pytest.approx((odd * even) ** 0.5, rel=1e-4)
    scaled = logits.clone()
    scaled[0::2] /= odd
    scaled[1::2] /= even
    check(found, scaled, y, "_scaled")
    where = found["ece_scaled"].settings["temperature_of"]
    assert where == f"each half of the test images, applied to the other half, for {why}"


def test_test_images_are_no_held_out_images(tmp_path: Path) -> None:
    module = tiny.stage1()
    found = figures(tmp_path, Calibration(), module, datamodule=SameImages(validation_size=20))
    check_halves(found, *split(module, "test"), "the validation images are test images")


def test_any_module_will_do_without_a_datamodule(tmp_path: Path) -> None:
    module = Plain()
    found = figures(tmp_path, Calibration(), module, dataloaders=loader())
    logits = module(IMAGES).detach()
    check(found, logits, LABELS)
    check_halves(found, logits, LABELS, "there are no validation images")


def test_scaling_can_be_left_out(tmp_path: Path) -> None:
    found = figures(tmp_path, Calibration(num_bins=4, temperature=False), Plain(), dataloaders=loader())
    assert set(found) == {"ece", "nll", "brier"}
    assert found["ece"].details["bin_edges"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(found["ece"].details["reliability"]["count"]) == 4


def test_validation_images_are_remembered_as_test_images_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = figures(tmp_path, Calibration(dirpath=str(tmp_path / "kept")), tiny.stage1())
    monkeypatch.setattr(Calibration, "evaluate_batch", pytest.fail)
    assert figures(tmp_path, Calibration(dirpath=str(tmp_path / "kept")), tiny.stage1()) == first


class PairsToValidate(LightningDataModule):
    """Another project's data, whose validation batches are pairs; set up for the stage that is asked for."""

    def setup(self, stage: str) -> None:
        self.ready = stage

    def test_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        assert self.ready == "validate"
        return loader([[IMAGES.flip(3), LABELS]])


def test_validation_batches_may_be_pairs(tmp_path: Path) -> None:
    found = figures(tmp_path, Calibration(), Plain(), datamodule=PairsToValidate())
    assert found["temperature"].settings["temperature_of"] == "10 validation images that are no test images"


class NeedsFit(PairsToValidate):
    """As in Lightning's own documentation: validation images are made when a fit is set up."""

    def val_dataloader(self) -> Any:
        return self.made_in_fit  # type: ignore[attr-defined]


def test_a_datamodule_without_validation_images_in_a_test_costs_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot have validation images, and uses halves: AttributeError"):
        found = figures(tmp_path, Calibration(), Plain(), datamodule=NeedsFit())
    assert "each half of the test images" in found["temperature"].settings["temperature_of"]


def test_a_temperature_at_its_end_is_said(tmp_path: Path) -> None:
    module = Plain()
    with torch.no_grad():
        module.net.weight.zero_()
    found = figures(tmp_path, Calibration(), module, dataloaders=loader())
    assert found["temperature"].details["temperatures"][0] in (0.001, 1000)
    assert "T is at the end of 0.001" in found["ece_scaled"].details["warnings"][0]
    assert "warnings" not in found["ece"].details


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        Calibration(num_bins=0)
    one_class = Plain()
    one_class.net = torch.nn.Linear(4, 1)
    with pytest.raises(ValueError, match=r"logits \(N, K\) of at least 2 classes, got shape \(3, 1\)"):
        figures(tmp_path, Calibration(), one_class, dataloaders=loader())
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 2, got 0 … 4"):
        figures(tmp_path, Calibration(), Plain(), dataloaders=loader([{**ALL[0], "y": torch.tensor([0, 4, 1])}]))
    with pytest.raises(ValueError, match="Calibration needs finite logits, got NaN or infinite ones for 3 of 3"):
        figures(tmp_path, Calibration(), Plain(later=float("nan")), dataloaders=loader())
