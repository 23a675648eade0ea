"""The command line: shipped configs run, what they print reads back, and mistakes cost one sentence."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dat_lightning import DualAdversarialModule, RobustClassifierModule
from dat_lightning.cli import main
from dat_lightning.runs.configurations import with_bases
from dat_lightning.speed import Execution
from tests.frozen.record import ADDED
from tests.recipes import write_folders

ROOT = Path(__file__).resolve().parents[1]
# tests/test_configs.py has the others; some are added after one of these.
CONFIGS = sorted(p for p in (ROOT / "configs" / "digits").glob("*.yaml") if p.stem not in ADDED)
STAGE1, STAGE2 = (str(ROOT / "configs" / "digits" / f"{name}.yaml") for name in ("stage1", "dat"))
STEP_SIZE = yaml.safe_load(Path(STAGE2).read_text("utf-8"))["model"]["init_args"]["contrastive_step_size"]
TINY = str(ROOT / "tests" / "conf" / "tiny.yaml")

# LightningCLI notes that it was called with arguments, which is the point here.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Runs the program, which has to fail, and returns the one line that says why."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("dat-lightning: error: ")]
    assert len(re.sub(r"/\S+/", "", line)) < 400  # however deep the folders of this test lie
    return line.removeprefix("dat-lightning: error: ")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_config_trains(config: Path, tmp_path: Path) -> None:
    """Two batches as shipped; weights move, and the averaged ones are in the checkpoint."""
    short = [
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.enable_progress_bar",
        "false",
    ]
    main(["fit", "--config", str(config), *short])
    (path,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 2
    raw, averaged = saved["current_model_state"], saved["state_dict"]
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    assert (path.parents[1]).name == config.stem


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_printed_configs_read_back(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(path: Path) -> Any:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(path), "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    def without_empty(node: Any) -> Any:
        """Classes without arguments are printed with none or with an empty mapping of them."""
        if isinstance(node, dict):
            return {key: without_empty(value) for key, value in node.items() if (key, value) != ("init_args", {})}
        return [without_empty(value) for value in node] if isinstance(node, list) else node

    first = printed(config)
    (tmp_path / "printed.yaml").write_text(first)
    again = yaml.safe_load(printed(tmp_path / "printed.yaml"))
    assert without_empty(again) == without_empty(yaml.safe_load(first))
    shipped, full = with_bases(config)[0][1], yaml.safe_load(first)
    rate = shipped["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert full["model"]["init_args"]["optimizer"]["init_args"]["lr"] == rate
    assert full["seed_everything"] == shipped["seed_everything"]


def test_the_whole_way(tmp_path: Path) -> None:
    """Both stages, then validate, test and predict, as the README has it."""
    main(["fit", "--config", STAGE1, "--config", TINY])
    first = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    first = first.rename(tmp_path / "stage1.ckpt")
    main(["fit", "--config", STAGE2, "--config", TINY, "--model.init_from", str(first)])
    last = str(tmp_path / "runs" / "checkpoints" / "last.ckpt")
    for command in ("validate", "test", "predict"):
        main([command, "--config", STAGE2, "--config", TINY, "--ckpt_path", last])
    assert len(list((tmp_path / "runs" / "samples" / "png").rglob("*.png"))) == 20
    with np.load(tmp_path / "runs" / "samples" / "samples.npz") as file:
        assert file["arr_0"].shape == (20, 16, 16, 3)
        assert file["arr_1"].tolist() == [i % 10 for i in range(20)]
    module = DualAdversarialModule.load_from_checkpoint(last)
    assert module.execution == Execution()
    assert module.contrastive_chain.step_size == STEP_SIZE
    saved = torch.load(last, weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(module.state_dict()), dict(saved), rtol=0, atol=0)
    norm = "energy_model.backbone.norm.running_mean"
    assert torch.equal(saved[norm], torch.load(first, weights_only=True)["state_dict"][norm])


class StopsInTheSecondEpoch(Callback):
    """Stands for a crash."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyError("a crash")


@pytest.mark.parametrize(
    "config",
    [c if c.stem == "stage2" else pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_a_run_that_dies_has_the_checkpoint_of_its_last_whole_epoch(config: Path, tmp_path: Path) -> None:
    crash = f"--trainer.callbacks+={__name__}.StopsInTheSecondEpoch"
    short = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]
    with pytest.raises(KeyError, match="a crash"):
        main(["fit", "--config", str(config), *short, crash])
    (path,) = tmp_path.rglob("last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 2
    main(["fit", "--config", str(config), *short, "--ckpt_path", str(path)])
    assert torch.load(path, weights_only=True)["global_step"] == 6


def test_what_tensorboard_shows(tmp_path: Path) -> None:
    main(["fit", "--config", STAGE2, "--config", TINY, "--trainer.log_every_n_steps", "1"])
    (folder,) = (tmp_path / "runs" / "digits" / "dat" / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    train = ("loss", "energy_loss", "classification_loss", "robust_accuracy", "energy_real", "energy_contrast")
    assert names >= {f"train/{n}" for n in (*train, "auc", "contrastive_steps")}
    assert names >= {f"val/{n}" for n in ("loss", "accuracy", "robust_accuracy", "energy", "r1", "fid", "fid_steps")}
    assert set(events.Tags()["images"]) == {"val/samples/1_steps", "val/samples/2_steps"}
    hyperparameters = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert hyperparameters["threat_model"]["eps"] == 1.0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["contrastive_step_size"] == STEP_SIZE


def test_explicit_configuration_wins_over_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["fit", "--config", STAGE1, "--config", TINY])
    seen: list[float] = []
    original = RobustClassifierModule.evaluation_metrics

    def spy(self: RobustClassifierModule, batch: Any) -> Any:
        seen.append(self.eval_threat_model.eps)
        return original(self, batch)

    monkeypatch.setattr(RobustClassifierModule, "evaluation_metrics", spy)
    checkpoint = str(tmp_path / "runs" / "checkpoints" / "last.ckpt")
    args = ["--config", STAGE1, "--config", TINY, "--ckpt_path", checkpoint]
    main(["test", *args, "--model.eval_threat_model.eps", "0.125"])
    assert set(seen) == {0.125}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.contrastive_step_sizes", "1"], "Option 'contrastive_step_sizes' is not accepted"),
        (["--trainer.max_epoch", "1"], "max_epoch"),
        (["--model.contrastive_step_size", "wide"], "contrastive_step_size: Expected a float. Got value: wide"),
        (["--model.threat_model.norm", "L7"], "threat_model.norm: Expected a Literal['L2', 'Linf']. Got value: L7"),
        (["--model.threat_model.eps=-1"], "eps must be a radius of at least 0 (or inf), got -1.0"),
        (["--data.batch_size", "0"], "batch_size must be a whole number of at least 1, got 0"),
        (["--data.class_path", "dat_lightning.Digit"], "module 'dat_lightning' has no attribute 'Digit'"),
        (["--config", "nowhere.yaml"], "File does not exist: 'nowhere.yaml'"),
        (["--model.init_from", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["--ckpt_path", "nowhere.ckpt"], "Checkpoint file not found: nowhere.ckpt"),
        (["--data.ood", "none"], "DigitsDataModule has no out-of-distribution images (train)"),
    ],
)
def test_mistakes_cost_one_sentence(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "fit", "--config", STAGE2, "--config", TINY, *args)
    # An absolute path may stand where a relative one was given.
    assert said in line.replace(f"{Path.cwd()}/", "")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"trainer": -1}, "trainer must be settings with names, got -1"),
        (
            {"trainer": {"callbacks": [{"class_path": "dat_lightning.PGDSampler", "init_args": {"batch_size": None}}]}},
            "trainer.callbacks.0.init_args.batch_size must not be null",
        ),
        ({"trainer": {"precision": "64-true", "accelerator": "abacus"}}, "the Trainer cannot be made as configured"),
    ],
)
def test_what_the_parser_lets_pass_is_a_sentence(
    wrong: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(Path(STAGE1).read_text(encoding="utf-8"))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config | wrong), encoding="utf-8")
    assert said in refusal(capsys, "fit", "--config", "wrong.yaml")


def test_a_foreign_file_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.ckpt").write_text("not a checkpoint")
    line = refusal(capsys, "fit", "--config", STAGE2, "--config", TINY, "--model.init_from", "notes.ckpt")
    assert line.startswith("notes.ckpt is not a readable checkpoint")


class Hostile:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


@pytest.mark.parametrize("argument", ["--ckpt_path", "--model.init_from"])
def test_a_checkpoint_cannot_run_code(argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "evil": Hostile()}, tmp_path / "evil.ckpt")
    line = refusal(capsys, "fit", "--config", STAGE2, "--config", TINY, argument, "evil.ckpt")
    assert ("that could run code" if argument == "--ckpt_path" else "evil is an object of") in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("bug", [ZeroDivisionError, TypeError, ValueError, RuntimeError, KeyError, OSError])
@pytest.mark.parametrize("method", ["training_step", "__init__"])
def test_a_bug_keeps_its_traceback(bug: type[Exception], method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is raised here: what a user can mend is told by its class, not by where it comes from."""

    def broken(*args: object, **kwargs: object) -> None:
        raise bug("planted")

    if method == "__init__":
        monkeypatch.setattr("dat_lightning.modules.trained.NetworkForms", broken)
    else:
        monkeypatch.setattr(RobustClassifierModule, method, broken)
    with pytest.raises(bug, match="planted"):
        main(["fit", "--config", STAGE1, "--config", TINY])


def test_help_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: dat-lightning [")
    assert "PyTorch Lightning modules for Dual Adversarial Training" in shown
    assert "Trainer command line tool" not in shown
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert capsys.readouterr().out.startswith("usage: dat-lightning [options] fit")


def test_a_bug_shows_its_traceback_on_the_screen(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        "from dat_lightning import RobustClassifierModule\n"
        "class Planted(RobustClassifierModule):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return batch['x_clf'].mean(axis='wrong')\n",
        encoding="utf-8",
    )
    args = ["fit", "--config", STAGE1, "--config", TINY, "--model", "planted.Planted", "--trainer.logger=false"]
    run = subprocess.run(
        [sys.executable, "-m", "dat_lightning", *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert run.returncode == 1
    assert "Traceback (most recent call last)" in run.stderr
    assert "batch['x_clf'].mean(axis='wrong')" in run.stderr
    assert "dat-lightning: error" not in run.stderr


def test_torchs_precision_of_products_is_part_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", given.append)
    tiny = ["test", "--config", STAGE1, "--config", TINY, "--trainer.limit_test_batches=1"]
    with pytest.warns(UserWarning, match="weights are random"):
        main(tiny)
    with pytest.warns(UserWarning, match="weights are random"):
        main([*tiny, "--float32_matmul_precision", "highest"])
    assert given == ["high", "highest"]
    assert "float32_matmul_precision" in refusal(capsys, *tiny, "--float32_matmul_precision", "double")


@pytest.mark.slow
def test_python_m_is_the_same_program() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "dat_lightning", "fti"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 2
    assert run.stderr.startswith("dat-lightning: error: argument subcommand: invalid choice: 'fti'")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_loader_process_is_a_sentence_too(
    num_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path / "images", 10, 3, (16, 16), seed=0)
    for file in (tmp_path / "images").rglob("*.jpg"):
        file.write_bytes(b"no image")
    folder = {"class_path": "dat_lightning.LabelledFolder", "init_args": {"root": str(tmp_path / "images")}}
    data = {"train": folder, "test": folder, "image_size": 16, "batch_size": 4, "streams": ["clf"]}
    config = yaml.safe_load(Path(STAGE1).read_text(encoding="utf-8"))
    config["data"] = {"class_path": "dat_lightning.ImageDataModule", "init_args": data | {"num_workers": num_workers}}
    config["trainer"] |= {"callbacks": [], "logger": False, "max_epochs": 1}
    config["model"]["init_args"]["lr_scheduler"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = refusal(capsys, "fit", "--config", str(tmp_path / "config.yaml"))
    assert said.startswith("the images of the 'clf' stream cannot be read: 100 in a row failed, the last one because")
    assert ".jpg is not a readable image" in said


def test_a_run_into_the_folder_of_an_earlier_one_is_warned_of(tmp_path: Path) -> None:
    main(["fit", "--config", STAGE1, "--config", TINY])
    last = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match=r"last\.ckpt and 0 more, will be replaced"):
        main(["fit", "--config", STAGE1, "--config", TINY])
    written = last.read_bytes()
    main(["fit", "--config", STAGE1, "--config", TINY, "--trainer.fast_dev_run=1"])  # warnings are errors
    assert last.read_bytes() == written
    main(["fit", "--config", STAGE1, "--config", TINY, "--ckpt_path", str(last), "--trainer.max_epochs=2"])


@pytest.mark.parametrize("command", ["fit", pytest.param("test", marks=pytest.mark.slow)])
def test_a_checkpoint_of_another_kind_is_a_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config", STAGE1, "--config", TINY])
    first = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    said = refusal(capsys, command, "--config", STAGE2, "--config", TINY, "--ckpt_path", str(first))
    assert "another kind of module or network than DualAdversarialModule: " in said
    assert said.endswith("for its weights alone use --model.init_from")
    plain = tmp_path / "plain.pt"
    torch.save(torch.load(first, weights_only=True)["state_dict"], plain)
    said = refusal(capsys, command, "--config", STAGE1, "--config", TINY, "--ckpt_path", str(plain))
    assert said.startswith(f"--ckpt_path {plain} is no checkpoint of a run of this program; ")
    assert said.endswith("for its weights alone use --model.init_from")


@pytest.mark.parametrize("number", ["1", "2", "0.5"])
def test_a_number_of_batches_is_no_share_of_them(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning takes 1 for one batch, and 1.0 for all of them."""
    names = [f"limit_{part}_batches" for part in ("train", "val", "test", "predict")]
    with pytest.raises(SystemExit):
        main(["fit", "--config", STAGE2, *(f"--trainer.{name}={number}" for name in names), "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    found = [trainer[name] for name in names]
    assert found == [yaml.safe_load(number)] * 4
    assert {type(value) for value in found} == {type(yaml.safe_load(number))}
