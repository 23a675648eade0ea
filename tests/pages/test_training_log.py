"""The reader of logs puts the lives of a run together, and takes no evaluation for training."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from dat_lightning.pages.training_log import Curve, read_training_log


def log(folder: Path, scalars: Mapping[str, Mapping[int, float]], start: float = 0.0) -> None:
    """Writes scalars, one per second, as a life of its own."""
    writer = SummaryWriter(str(folder))
    for name, points in scalars.items():
        for k, (step, value) in enumerate(points.items()):
            writer.add_scalar(name, value, step, walltime=start + k)
    writer.close()


def test_a_later_life_replaces_what_it_did_again(tmp_path: Path) -> None:
    first = {"hp_metric": {0: -1.0}, "train/loss": {9: 3.0, 19: 2.0, 29: 9.0}, "val/accuracy": {19: 0.5, 29: 0.9}}
    log(tmp_path / "version_9", first, 100)
    # It went on from a checkpoint at step 20, and was stopped before its validation.
    log(tmp_path / "version_10", {"hp_metric": {0: -1.0}, "train/loss": {29: 1.1, 39: 0.5}}, 500)
    found = read_training_log(tmp_path)
    assert found.curves["train/loss"] == Curve((9, 19, 29, 39), (3.0, 2.0, 1.1, 0.5))
    assert found.curves["val/accuracy"] == Curve((19,), (0.5,))
    assert found.seconds == pytest.approx(2 + 1)


def test_a_run_from_the_start_replaces_all_before(tmp_path: Path) -> None:
    log(tmp_path / "version_0", {"train/loss": {9: 3.0, 99: 2.0}, "train/auc": {9: 0.5}})
    log(tmp_path / "version_1", {"train/loss": {9: 4.0}})
    assert read_training_log(tmp_path).curves == {"train/loss": Curve((9,), (4.0,))}


def test_evaluations_are_no_training(tmp_path: Path) -> None:
    log(tmp_path / "version_0", {"train/loss": {9: 3.0}})
    log(tmp_path / "version_1", {"test/accuracy": {0: 0.5}})
    assert list(read_training_log(tmp_path).curves) == ["train/loss"]
    assert read_training_log(tmp_path / "nowhere").curves == {}
