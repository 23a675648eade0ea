"""Pictures reach every logger that takes images, real ones where they are installed, and PNG files."""

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dat_lightning import Counterfactuals, DigitsFeatures, Memorisation, PGDSampler, SampleGrid
from dat_lightning.results.pictures import pictures_wanted, show_picture
from tests import tiny

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
STEP = 7


class TakesImages(Logger):
    """Records what it is given by the call that Lightning documents for W&B's logger."""

    name, version = "images", 0

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[str, list[Any], int | None]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert not kwargs
        self.shown.append((key, images, step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass


def show(loggers: list[Logger], path: Path | None = None) -> None:
    trainer: Any = Namespace(loggers=loggers, global_step=STEP, is_global_zero=True)
    show_picture(trainer, "val/samples/20_steps", Image.fromarray(PIXELS), path)


def is_shown(content: bytes | Path) -> bool:
    with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
        return np.array_equal(np.asarray(image.convert("RGB")), PIXELS)


def test_tensorboard_shows_the_picture(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    show([logger])
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    (found,) = events.Images("val/samples/20_steps")
    assert (found.step, is_shown(found.encoded_image_string)) == (STEP, True)


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_wandb_shows_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs W&B: pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="dat", save_dir=tmp_path, offline=True)
    show([logger])
    assert logger.experiment.summary["trainer/global_step"] == STEP
    logger.experiment.finish()
    (file,) = tmp_path.rglob("*.png")
    assert "val/samples/20_steps" in file.as_posix()
    assert is_shown(file)


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_keeps_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("dat", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    show([logger])
    (file,) = (tmp_path / "mlruns").rglob("*.png")
    assert file.name.startswith(f"val~samples~20_steps+step+{STEP}+")
    assert is_shown(file)


def test_a_logger_with_log_image_is_given_the_picture_and_others_are_left_alone(tmp_path: Path) -> None:
    takes = TakesImages()
    show([CSVLogger(tmp_path), takes, DummyLogger()])
    ((key, images, step),) = takes.shown
    assert (key, len(images), step) == ("val/samples/20_steps", 1, STEP)
    assert np.array_equal(np.asarray(images[0]), PIXELS)
    assert not [*tmp_path.rglob("*.png")]


def test_a_file_is_written_with_and_without_loggers(tmp_path: Path) -> None:
    choices: list[list[Logger]] = [[], [CSVLogger(tmp_path)], [TakesImages()]]
    for number, loggers in enumerate(choices):
        path = tmp_path / "deep" / f"{number}.png"
        show(loggers, path)
        assert is_shown(path)


def test_a_picture_is_drawn_where_somebody_wants_it(tmp_path: Path) -> None:
    for loggers, rank, path, wanted in (
        ([], 0, None, False),
        ([CSVLogger(tmp_path), DummyLogger()], 0, None, False),
        ([], 0, tmp_path / "a.png", True),
        ([CSVLogger(tmp_path), TakesImages()], 0, None, True),
        ([TensorBoardLogger(tmp_path)], 0, None, True),
        ([TakesImages()], 1, tmp_path / "a.png", False),
    ):
        trainer: Any = Namespace(loggers=loggers, is_global_zero=rank == 0)
        assert pictures_wanted(trainer, path) == wanted


def test_samples_and_counterfactuals_are_shown_and_no_file_is_needed(tmp_path: Path) -> None:
    takes = TakesImages()
    counterfactuals = Counterfactuals([0.5], num_steps=2, targets=["next", "uniform"], num_pictures=3)
    sampler = PGDSampler(num_samples=20, num_steps=[0, 2], step_size=0.5)
    callbacks = [sampler, SampleGrid(num_rows=2), Memorisation(DigitsFeatures(), num_pictures=2), counterfactuals]
    trainer = tiny.trainer(tmp_path, callbacks, logger=[CSVLogger(tmp_path), takes], limit_test_batches=1)
    trainer.test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    names = [key for key, _, _ in takes.shown]
    assert {name for name in names if "memorisation" not in name} == {
        "test/samples/0_steps",
        "test/samples/2_steps",
        "test/counterfactuals_next_eps0.5",
        "test/counterfactuals_uniform_eps0.5",
    }
    assert sum(name.startswith("test/memorisation/") for name in names) == 1
    assert len(names) == 5
    sizes = {key: images[0].size for key, images, _ in takes.shown}
    # Ten columns and two rows of 16 pixels, with a line around each.
    assert sizes["test/samples/2_steps"] == (10 * 17 + 1, 2 * 17 + 1)
    assert not [*tmp_path.rglob("*.png")]
    assert not any(figure.details.get("pictures") for figure in counterfactuals.figures)
