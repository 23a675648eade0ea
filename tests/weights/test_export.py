"""``dat-lightning export``: a checkpoint's averaged weights become a model that stands alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from dat_lightning import DigitsDataModule, EnergyModel, ExponentialMovingAverage
from dat_lightning.cli import main
from dat_lightning.core.errors import InputError
from dat_lightning.results.digests import network_digest
from dat_lightning.results.evaluation_file import read_evaluation
from dat_lightning.weights.export import export_model
from tests import tiny
from tests.test_cli import STAGE2, TINY, refusal

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
CONFIG = ["--config", STAGE2, "--config", TINY]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a fit of two steps with averaging."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = [ExponentialMovingAverage(), ModelCheckpoint(folder, save_last=True, save_top_k=0)]
    trainer = tiny.trainer(folder, callbacks, limit_train_batches=2, enable_checkpointing=True)
    trainer.fit(tiny.stage2(), tiny.digits())
    return folder / "last.ckpt"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_exported_model_is_the_averaged_one(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", *CONFIG, "--ckpt_path", str(checkpoint), "--output", "exported"])
    said = capsys.readouterr().out
    assert f"wrote exported, the weights of {checkpoint}; EnergyModel.from_pretrained('exported') reads it\n" in said
    model = EnergyModel.from_pretrained("exported")
    saved = torch.load(checkpoint, weights_only=True)
    averaged, raw = tiny.energy_model(1).eval(), tiny.energy_model(1).eval()
    for network, state in ((averaged, saved["state_dict"]), (raw, saved["current_model_state"])):
        prefix = "energy_model."
        network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    x = torch.rand(5, 1, 16, 16)
    assert torch.equal(model(x), averaged(x))
    assert not torch.equal(model(x), raw(x))


def test_half_precision_is_stored_where_it_was_asked_for(checkpoint: Path) -> None:
    main(["export", *CONFIG, "--ckpt_path", str(checkpoint), "--output", "full"])
    main(["export", *CONFIG, "--ckpt_path", str(checkpoint), "--output", "half", "--half", "true"])
    full, half = (load_file(f"{name}/model.safetensors") for name in ("full", "half"))
    for name, value in full.items():
        is_matrix = name.endswith("weight") and value.ndim > 1
        assert half[name].dtype == (torch.float16 if is_matrix else value.dtype), name
        # Eleven binary digits.
        torch.testing.assert_close(half[name].to(value.dtype), value, rtol=2.0**-11, atol=1e-7 if is_matrix else 0)
    model = EnergyModel.from_pretrained("half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    x = torch.rand(5, 1, 16, 16)
    torch.testing.assert_close(model(x), EnergyModel.from_pretrained("full")(x), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("half", [False, True])
def test_whoever_may_read_new_files_may_read_an_exported_model(half: bool, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    tiny.energy_model().save_pretrained(tmp_path / "model", half=half)
    for path in (tmp_path / "model").iterdir():
        assert path.stat().st_mode == (tmp_path / "any").stat().st_mode, path.name


def test_weights_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    model = tiny.energy_model()
    with torch.no_grad():
        model.backbone.get_submodule("fc").weight[1, 2] = -7e4  # type: ignore[operator]
    with pytest.raises(InputError, match=r"backbone\.fc\.weight has weights of 70000, too large for half precision"):
        model.save_pretrained(tmp_path / "half", half=True)
    assert not (tmp_path / "half").exists()


def test_an_exported_folder_can_be_tested_but_not_trained_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_model(tiny.energy_model(), checkpoint, "exported")
    main(["test", *CONFIG, "--ckpt_path", "exported", "--trainer.default_root_dir", "run"])
    provenance = read_evaluation(tmp_path / "run" / "evaluation.json").provenance
    assert provenance["checkpoint"] == {"path": "exported", "sha256": None}
    assert provenance["weights_sha256"] == network_digest(EnergyModel.from_pretrained("exported"))
    said = refusal(capsys, "fit", *CONFIG, "--ckpt_path", "exported")
    assert said.startswith("--ckpt_path exported has weights alone, and training goes on from an optimiser's state; ")
    assert said.endswith("use --model.init_from")
    # Among checkpoints, a folder is one of checkpoints.
    shutil.copy(checkpoint, "exported")
    assert "none of the 1 checkpoints in exported is a whole one" in refusal(
        capsys, "fit", *CONFIG, "--ckpt_path", "exported"
    )


def test_exporting_needs_no_data_no_devices_and_no_callbacks(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: object, **kwargs: object) -> Any:
        raise FileNotFoundError("no data here")

    monkeypatch.setattr(DigitsDataModule, "__init__", missing)
    monkeypatch.setattr(ExponentialMovingAverage, "__init__", missing)
    cluster = ["--trainer.devices", "8", "--trainer.num_nodes", "4", "--trainer.accelerator", "gpu"]
    cluster += ["--trainer.strategy", "ddp", "--trainer.precision", "bf16-mixed"]
    main(["export", *CONFIG, *cluster, "--ckpt_path", str(checkpoint), "--output", "exported"])
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert set(contents(tmp_path / "exported")) == {"README.md", "config.json", "model.safetensors"}


def test_an_earlier_export_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    export_model(tiny.energy_model(), checkpoint, output)
    first = contents(output)
    other = tiny.energy_model(5)
    torch.save(other.state_dict(), "other.pt")
    export_model(tiny.energy_model(), "other.pt", output)
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(EnergyModel.from_pretrained(output)(x), other.eval()(x))
    export_model(tiny.energy_model(), checkpoint, output)
    assert contents(output) == first


def test_an_empty_folder_is_filled(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_model(tiny.energy_model(), checkpoint, tmp_path / "empty")
    assert set(contents(tmp_path / "empty")) == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize("present", [{"notes.txt"}, {"config.json"}, {"model.safetensors", "x"}])
def test_a_folder_with_anything_else_is_left_alone(present: set[str], checkpoint: Path, tmp_path: Path) -> None:
    for name in present:
        (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"output must be a new or empty folder .*{sorted(present)[0]}"):
        export_model(tiny.energy_model(), checkpoint, tmp_path)
    assert contents(tmp_path) == dict.fromkeys(present, b"mine")


def test_a_file_is_no_folder(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output must be a folder, but .*file is a file"):
        export_model(tiny.energy_model(), checkpoint, tmp_path / "file")


def test_an_unregistered_network_is_not_exported(tmp_path: Path) -> None:
    model = EnergyModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    torch.save(model.state_dict(), "weights.pt")
    with pytest.raises(ValueError, match="put @register_architecture"):
        export_model(model, "weights.pt", "exported")
    assert not (tmp_path / "exported").exists()


def test_mistakes_cost_one_sentence(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    fitting, wide = ["--ckpt_path", str(checkpoint)], ["--model.energy_model.backbone.widths", "[4]"]
    for args, said in (
        (["--ckpt_path", "nowhere.ckpt", "--output", "exported"], "no checkpoint at nowhere.ckpt"),
        ([*fitting, "--output", "taken"], "but taken has ['notes.txt']"),
        ([*fitting, "--output", "exported", *wide], "does not fit the network: "),
        (fitting, "output"),
        (["--output", "exported"], "ckpt_path"),
    ):
        assert said in refusal(capsys, "export", *CONFIG, *args)
    assert not (tmp_path / "exported").exists()


BACKBONES: dict[str, dict[str, Any]] = {
    "dat_lightning.SmallResNet": {"widths": [4], "num_classes": 3},
    "dat_lightning.resnet50": {"num_classes": 3, "in_channels": 1},
    "dat_lightning.backbones.timm_model": {"name": "resnet10t", "num_classes": 3, "in_channels": 1},
}


@pytest.mark.parametrize("class_path", BACKBONES)
def test_registered_functions_and_classes_are_backbones_on_the_command_line(
    class_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser sees their parameters, and the description is of what the configuration says."""
    backbone = {"class_path": class_path, "init_args": BACKBONES[class_path]}
    model = {"init_args": {"energy_model": {"init_args": {"backbone": backbone, "mean": [0.3], "std": [0.4]}}}}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.manual_seed(0)
    path, _, name = class_path.rpartition(".")
    network = getattr(__import__(path, fromlist=[name]), name)(**BACKBONES[class_path])
    source = EnergyModel(network, [0.3], [0.4])
    torch.save(source.state_dict(), "weights.pt")
    main(["export", "--config", STAGE2, "--config", "net.yaml", "--ckpt_path", "weights.pt", "--output", "exported"])
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(EnergyModel.from_pretrained("exported")(x), source.eval()(x))
    wrong = ["--model.energy_model.backbone", class_path, "--model.energy_model.backbone.wide", "3"]
    assert "Option 'wide' is not accepted" in refusal(capsys, "fit", "--config", STAGE2, *wrong)
