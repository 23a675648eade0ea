"""Runs with the loggers that people use: settings, numbers and pictures arrive, or none is needed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dat_lightning.cli import main
from tests.test_cli import STAGE1, TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # loggers have warnings of their own
GRIDS = {f"{steps}_steps" for steps in (1, 2)}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(*logger: str) -> None:
    main(["fit", "--config", STAGE1, "--config", TINY, *logger])
    grids = {path.stem.removeprefix("val_step0000002_") for path in Path("runs/grids").iterdir()}
    assert grids - {"0_steps"} == GRIDS


def test_mlflow_gets_settings_numbers_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    fit("--trainer.logger=lightning.pytorch.loggers.MLFlowLogger", f"--trainer.logger.tracking_uri={uri}")
    client = mlflow.MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'lightning_logs'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["data/batch_size"] == "32"
    assert run.data.params["threat_model/eps"] == "1.0"
    assert run.data.params["trainer/max_epochs"] == "1"
    assert 0 <= run.data.metrics["val/accuracy"] <= 1
    names = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")}
    assert {name.split("+")[0] for name in names} >= {f"val~samples~{grid}" for grid in GRIDS}


def test_wandb_gets_settings_numbers_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = pytest.importorskip("wandb", reason="needs W&B: pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = "--trainer.logger=lightning.pytorch.loggers.WandbLogger"
    fit(logger, "--trainer.logger.offline=true", "--trainer.logger.save_dir=logs", "--trainer.logger.project=dat")
    assert wandb.run is not None
    config, summary = dict(wandb.run.config), dict(wandb.run.summary)
    wandb.run.finish()
    assert config["data"]["batch_size"] == 32
    assert config["threat_model"]["eps"] == 1.0
    assert config["trainer"]["max_epochs"] == 1
    assert 0 <= summary["val/accuracy"] <= 1
    pictures = {path.name.partition("_steps")[0] + "_steps" for path in Path("logs").rglob("val/samples/*.png")}
    assert pictures >= GRIDS


@pytest.mark.parametrize("logger", ["lightning.pytorch.loggers.CSVLogger", "false"])
def test_a_logger_without_pictures_will_do_and_so_will_none(logger: str) -> None:
    fit(f"--trainer.logger={logger}", *(["--trainer.logger.save_dir=logs"] if logger != "false" else []))
    if logger != "false":
        (file,) = Path("logs").rglob("hparams.yaml")
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["data"]["batch_size"] == 32
