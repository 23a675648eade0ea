"""Each run keeps its configuration, and loggers get the settings of module, data and Trainer."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from dat_lightning import RobustClassifierModule
from dat_lightning.cli import main
from dat_lightning.runs.run_settings import folder_of_run
from tests import tiny
from tests.test_cli import STAGE1, TINY

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter:UserWarning", "ignore:checkpoints of an earlier run:UserWarning"
)


class OneFolderForAll(Logger):
    """Has a folder for all runs and a new version for each, as W&B's and MLflow's loggers do."""

    given: list[dict[str, Any]] = []  # noqa: RUF012
    runs = 0

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.root = save_dir
        OneFolderForAll.runs += 1
        self.run = f"run{OneFolderForAll.runs}"

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return self.run

    @property
    def save_dir(self) -> str:
        return self.root

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        OneFolderForAll.given.append(dict(vars(params) if isinstance(params, Namespace) else params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass


def fit(*args: str) -> None:
    main(["fit", "--config", STAGE1, "--config", TINY, *args])


def rate(path: Path) -> float:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return float(config["model"]["init_args"]["optimizer"]["init_args"]["lr"])


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OneFolderForAll, "given", [])
    monkeypatch.setattr(OneFolderForAll, "runs", 0)


def test_runs_that_share_a_loggers_folder_keep_their_own_and_log_all_settings(tmp_path: Path) -> None:
    logger = [f"--trainer.logger={__name__}.OneFolderForAll", "--trainer.logger.save_dir=logs"]
    fit(*logger, "--model.optimizer.lr=0.01")
    fit(*logger, "--model.optimizer.lr=0.02", "--data.batch_size=16")
    folders = [tmp_path / "logs" / "project" / run for run in ("run1", "run2")]
    assert [rate(folder / "config.yaml") for folder in folders] == [0.01, 0.02]
    assert [path.parent for path in sorted((tmp_path / "logs").rglob("config*.yaml"))] == folders
    first, second = OneFolderForAll.given
    assert first["optimizer"]["init_args"]["lr"] == 0.01
    assert second["data"]["batch_size"] == 16 != first["data"]["batch_size"]
    assert second["data"]["class_path"] == "dat_lightning.DigitsDataModule"
    assert second["trainer"]["max_epochs"] == 1
    assert "logger" not in second["trainer"]
    # A checkpoint has the module's settings alone, and the module is made from them.
    last = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)["hyper_parameters"]
    assert saved.keys().isdisjoint({"data", "trainer", "batch_size"})
    assert saved["optimizer"]["init_args"]["lr"] == 0.02
    assert RobustClassifierModule.load_from_checkpoint(last).threat_model.eps == 1.0


def test_a_module_is_loaded_with_the_hyperparameters_that_its_run_has_logged(tmp_path: Path) -> None:
    fit()
    last = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    (file,) = tmp_path.rglob("hparams.yaml")
    plain, again = (
        RobustClassifierModule.load_from_checkpoint(last, **given) for given in ({}, {"hparams_file": str(file)})
    )
    assert again.threat_model == plain.threat_model
    assert all(map(torch.equal, again.state_dict().values(), plain.state_dict().values()))
    # The file counts more than the checkpoint, as with Lightning, and an argument more than the file.
    settings = yaml.safe_load(file.read_text())
    settings["threat_model"]["eps"] = 0.25
    file.write_text(yaml.safe_dump(settings))
    assert RobustClassifierModule.load_from_checkpoint(last, None, file).threat_model.eps == 0.25
    changed = RobustClassifierModule.load_from_checkpoint(last, hparams_file=file, attack_mode="train")
    assert (changed.threat_model.eps, changed.attack_mode) == (0.25, "train")


def test_the_same_folder_keeps_what_differs_and_a_requeued_job_finds_its_own(tmp_path: Path) -> None:
    for epochs in ("1", "1", "2", "2"):
        fit("--trainer.logger.init_args.version=7", f"--trainer.max_epochs={epochs}")
    (folder,) = (path.parent for path in tmp_path.rglob("config.yaml"))
    assert sorted(path.name for path in folder.glob("config*.yaml")) == ["config-1.yaml", "config.yaml"]
    kept = [yaml.safe_load((folder / name).read_text()) for name in ("config.yaml", "config-1.yaml")]
    assert [config["trainer"]["max_epochs"] for config in kept] == [1, 2]


def test_tensorboard_shows_settings_of_module_data_and_trainer(tmp_path: Path) -> None:
    fit()
    (path,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(path.parent)).Reload()
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    shown = metadata.parse_session_start_info_plugin_data(content).hparams
    assert shown["data/batch_size"].number_value == 32
    assert shown["threat_model/eps"].number_value == 1.0
    assert shown["trainer/max_epochs"].number_value == 1
    assert len(events.Scalars("hp_metric")) == 1


def test_where_a_run_has_its_folder(tmp_path: Path) -> None:
    for logger, expected in (
        (False, tmp_path),
        (TensorBoardLogger(tmp_path / "logs", name="a", version=3), tmp_path / "logs" / "a" / "version_3"),
        (CSVLogger(tmp_path / "logs", name="b", version=1), tmp_path / "logs" / "b" / "version_1"),
        (OneFolderForAll(str(tmp_path / "logs")), tmp_path / "logs" / "project" / "run1"),
    ):
        assert folder_of_run(tiny.trainer(tmp_path, logger=logger)) == str(expected)
