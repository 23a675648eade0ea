"""What a test measures is in the file and on the page, whatever callbacks there are and in whatever order."""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dat_lightning import DigitsFeatures, FrechetDistance, PGDSampler, SampleConsumer, SampleGrid
from dat_lightning.callbacks import EvaluationReport, evaluation_report
from dat_lightning.callbacks.evaluator import Evaluator
from dat_lightning.cli import main
from dat_lightning.core.figures import Figure, Values
from dat_lightning.reports import Evaluation, read_evaluation
from tests import tiny
from tests.reports.page import Page

ROOT = Path(__file__).resolve().parents[2]


class Brightness(Evaluator):
    """Measures the mean pixel, and a curve with numbers that JSON lacks."""

    def __init__(self, name: str = "brightness", pictures: Sequence[str] = ()) -> None:
        super().__init__()
        self.name = name
        self.pictures = list(pictures)

    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        return {"mean": batch["x"].flatten(1).mean(1)}

    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Figure]:
        details = {"curve": [1.0, math.nan, math.inf], "pictures": self.pictures}
        return [Figure(self.name, float(values["mean"].mean()), "mean pixel", len(values["mean"]), details)]


class Both(Brightness, SampleConsumer):
    """Measures test images, and could measure samples."""


class Darkness(Brightness):
    """The same from another class."""


def evaluate(path: Path, callbacks: Sequence[Callback], module: LightningModule | None = None) -> Evaluation:
    trainer = tiny.trainer(path, callbacks, limit_test_batches=2)
    trainer.test(module or tiny.stage1(), datamodule=tiny.digits(eval_batch_size=30), verbose=False)
    report = next(c for c in callbacks if isinstance(c, EvaluationReport))
    return read_evaluation(report.path)


def report(path: Path) -> EvaluationReport:
    return EvaluationReport(str(path / "evaluation.json"))


def samplers(path: Path) -> list[Callback]:
    sampler = PGDSampler(num_samples=20, num_steps=[1, 2], step_size=0.5)
    return [sampler, FrechetDistance(DigitsFeatures()), SampleGrid(2, str(path / "grids"))]


def test_figures_and_logged_values_are_in_the_file(tmp_path: Path) -> None:
    brightness, fid = Brightness(), FrechetDistance(DigitsFeatures())
    sampler = PGDSampler(num_samples=20, num_steps=[1, 2], step_size=0.5)
    trainer = tiny.trainer(tmp_path, [report(tmp_path), brightness, sampler, fid], limit_test_batches=2)
    data = tiny.digits(eval_batch_size=30)
    (logged,) = trainer.test(tiny.stage1(), datamodule=data, verbose=False)
    found = read_evaluation(tmp_path / "evaluation.json")
    values = {each.name: each.value for each in found.entries}
    assert set(values) == {"brightness", "fid", "loss", "accuracy", "robust_accuracy", "energy", "r1"}
    for name, value in values.items():
        assert value == pytest.approx(logged[f"test/{name}"], rel=1e-6), name
    (entry,) = (each for each in found.entries if each.name == "brightness")
    assert (entry.protocol, entry.num_samples, entry.source) == ("mean pixel", 60, "Brightness")
    pixels = torch.cat([batch["x"] for batch in itertools.islice(data.test_dataloader(), 2)])
    assert entry.value == pytest.approx(float(pixels.mean()), rel=1e-5)
    assert repr(entry.details["curve"]) == "[1.0, nan, inf]"
    distance = found.entry("fid")
    assert distance is not None
    assert distance.num_samples == 20
    assert distance.details["sweep_steps"] == [1, 2]
    assert distance.details["sweep"] == [fid.scores[1], fid.scores[2]]
    assert distance.details["num_steps"] == min(fid.scores, key=lambda n: fid.scores[n])
    robust = found.entry("robust_accuracy")
    assert robust is not None
    assert robust.num_samples == 60
    assert "L2 radius 1, 2 steps of 0.5, no random start" in robust.protocol


def test_the_order_of_callbacks_does_not_matter(tmp_path: Path) -> None:
    found = []
    for k, order in enumerate(((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 4, 0, 1, 3))):
        folder = tmp_path / f"{k}"
        callbacks = [report(folder), Brightness(), Darkness("darkness"), *samplers(folder)[:2]]
        found.append(evaluate(folder, [callbacks[place] for place in order]).entries)
    assert found[0] == found[1] == found[2]
    assert {"brightness", "darkness", "fid"} < {each.name for each in found[0]}


def test_figures_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = []
    for k, callbacks in enumerate(([Brightness("b"), Darkness("b")], [Darkness("b"), Brightness("b")])):
        callbacks_and_report = [*callbacks, report(tmp_path / f"{k}")]
        entries = evaluate(tmp_path / f"{k}", callbacks_and_report).entries
        names.append([each.name for each in entries if each.name.startswith("b")])
    assert names[0] == names[1] == ["b [Brightness]", "b [Darkness]"]


class Plain(LightningModule):
    """Somebody else's module, which logs nothing or one number."""

    def __init__(self, log_it: bool) -> None:
        super().__init__()
        self.network = nn.Linear(256, 10)
        self.log_it = log_it

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.flatten(1))
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if self.log_it:
            self.log("acc", 0.25, batch_size=len(batch[0]))


class Noting(Plain):
    """The same for batches with names."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step([batch["y"]], batch_idx)


def loader() -> Any:
    return DataLoader(TensorDataset(torch.rand(7, 1, 16, 16), torch.zeros(7)), batch_size=4)


def test_any_module_is_reported_and_none_is_an_error(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, [report(tmp_path)]).test(Plain(True), loader(), verbose=False)
    found = read_evaluation(tmp_path / "evaluation.json")
    (entry,) = found.entries
    assert (entry.name, entry.value, entry.num_samples, entry.source) == ("acc", 0.25, 7, "Plain")
    assert found.provenance["checkpoint"] is None
    assert found.provenance["data"] is None
    empty = tmp_path / "empty"
    with pytest.raises(ValueError, match="EvaluationReport has nothing to report: add evaluators"):
        tiny.trainer(empty, [report(empty)]).test(Plain(False), loader(), verbose=False)
    assert not empty.exists()


def test_images_are_counted_over_ranks_whatever_else_is_in_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_of_three_ranks(self: Any, tensor: Tensor, *args: Any, reduce_op: str = "mean", **kwargs: Any) -> Tensor:
        return tensor * 3 if reduce_op == "sum" else tensor

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", as_of_three_ranks)
    batch = {"note": "a text", "y": torch.zeros(4), "x": torch.zeros(4, 1, 16, 16)}
    batches: Any = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    tiny.trainer(tmp_path, [report(tmp_path)]).test(Noting(True), batches, verbose=False)
    (entry,) = read_evaluation(tmp_path / "evaluation.json").entries
    assert entry.num_samples == 3 * 2 * 4


def test_samples_of_an_earlier_evaluation_are_not_reported(tmp_path: Path) -> None:
    sampler, fid, grid = samplers(tmp_path)
    sampler.stages = ("val",)  # type: ignore[attr-defined]
    (tmp_path / "grids").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "grids" / "test_step0000000_1_steps.png")
    callbacks = [sampler, fid, grid, Both("test images"), report(tmp_path)]
    trainer = tiny.trainer(tmp_path, callbacks, limit_test_batches=1, limit_val_batches=1)
    module, data = tiny.stage1(), tiny.digits()
    trainer.validate(module, datamodule=data, verbose=False)
    assert fid.scores  # type: ignore[attr-defined]
    trainer.test(module, datamodule=data, verbose=False)
    found = read_evaluation(tmp_path / "evaluation.json")
    assert found.entry("fid") is None
    assert found.entry("test images") is not None
    assert Page(tmp_path / "evaluation.html").pictures == []


def test_the_page_has_figures_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("inside.png", "outside.png"):
        Image.fromarray(np.full((4, 4, 3), 99, np.uint8)).save(tmp_path / name)
    (tmp_path / "inside.png").rename(tmp_path / "pictures" / "inside.png")
    out = tmp_path / "pictures"
    pictures = ["inside.png", str(out / "inside.png"), str(tmp_path / "outside.png")]
    found = evaluate(out, [Brightness(pictures=pictures), report(out), *samplers(tmp_path)])
    entry = found.entry("brightness")
    assert entry is not None
    # What lies beside the report moves with it.
    assert entry.details["pictures"] == ["inside.png", "inside.png", str(tmp_path / "outside.png")]
    page = Page(out / "evaluation.html")
    page.assert_self_contained()
    assert sum(uri.startswith("data:image/png") for uri in page.pictures) == 4  # two of them, and a grid per step count
    assert "Generated samples after 1 steps" in page.text
    assert all(each.protocol in page.text for each in found.entries)
    assert sorted(each.name for each in out.iterdir()) == ["evaluation.html", "evaluation.json", "inside.png"]


def test_pictures_named_from_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "grids").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "runs" / "grids" / "a.png")
    found = evaluate(tmp_path, [Brightness(pictures=["runs/grids/a.png"]), EvaluationReport("runs/e.json")])
    entry = found.entry("brightness")
    assert entry is not None
    assert entry.details["pictures"] == ["grids/a.png"]
    assert len(Page(tmp_path / "runs" / "e.html").pictures) == 1
    assert found.name == "runs"


def test_paths_and_packages_are_checked_before_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"EvaluationReport\.path must end in \.json, got 'report.html'"):
        EvaluationReport("report.html")

    def missing() -> None:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'dat-lightning[reports]'")

    monkeypatch.setattr(evaluation_report, "require_matplotlib", missing)
    brightness = Brightness()
    with pytest.raises(ModuleNotFoundError, match=r"dat-lightning\[reports\]"):
        evaluate(tmp_path, [brightness, report(tmp_path)])
    assert brightness.figures == []


# LightningCLI notes that it was called with arguments, which is the point here.
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_command_line_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = [str(ROOT / "configs" / "digits" / "stage1.yaml"), "--config", str(ROOT / "tests" / "conf" / "tiny.yaml")]
    main(["fit", "--config", *config])
    checkpoint = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    added = "--trainer.callbacks+=dat_lightning.callbacks.EvaluationReport"
    arguments = [added, "--trainer.callbacks.path=out/evaluation.json", "--trainer.callbacks.name=a run"]
    main(["test", "--config", *config, "--ckpt_path", str(checkpoint), "--seed_everything=7", *arguments])
    found = read_evaluation(tmp_path / "out" / "evaluation.json")
    assert found.name == "a run"
    assert {each.name for each in found.entries} >= {"accuracy", "robust_accuracy", "energy", "fid"}
    known = found.provenance
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert known["checkpoint"] == {"path": str(checkpoint), "sha256": digest}
    assert known["seeds"] == {"seed_everything": 7, "module": 0, "data": 0}
    assert known["versions"]["torch"] == version("torch")
    assert known["versions"]["lightning"] == version("lightning")
    assert known["module"]["class"] == "dat_lightning.modules.robust_classifier.RobustClassifierModule"
    assert known["module"]["hyperparameters"]["threat_model"]["num_steps"] == 2
    assert known["device"] == "cpu"
    assert 0 < known["seconds"] < 300
    assert len(known["weights_sha256"]) == 64
    page = Page(tmp_path / "out" / "evaluation.html")
    page.assert_self_contained()
    assert digest in page.text
    assert len(page.pictures) == 3  # two grids and the sweep
    json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
