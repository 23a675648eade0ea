"""What a test measures is in the file and on the page, whatever callbacks there are and in whatever order."""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dat_lightning import DigitsDataModule, DigitsFeatures, FrechetDistance, PGDSampler, SampleConsumer, SampleGrid, cli
from dat_lightning.cli import main
from dat_lightning.core.errors import InputError
from dat_lightning.data.digits import digits, split_indices
from dat_lightning.data.draws import EvaluationBatches
from dat_lightning.evaluation import Calibration, Counterfactuals, EnergyStatistics, OODDetection, RobustAccuracy
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.features.fidelity import FidelitySettings
from dat_lightning.features.layers import DigitsLayers
from dat_lightning.pages import EvaluationReport, evaluation_report
from dat_lightning.pages.comparison import Column, compare
from dat_lightning.results import Evaluation, read_evaluation
from dat_lightning.results.digests import file_digest
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement, canonical
from dat_lightning.sampling import SampleMetrics
from tests import tiny
from tests.pages.page import Page

ROOT = Path(__file__).resolve().parents[2]


class Brightness(Evaluator):
    """Measures the mean pixel, and a curve with numbers that JSON lacks."""

    def __init__(self, name: str = "brightness", pictures: Sequence[str] = ()) -> None:
        super().__init__()
        self.name = name
        self.pictures = list(pictures)

    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        return {"mean": batch["x"].flatten(1).mean(1)}

    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        details = {"curve": [1.0, math.nan, math.inf], "pictures": self.pictures}
        return [Measurement(self.name, float(values["mean"].mean()), "mean pixel", len(values["mean"]), details)]


class Both(Brightness, SampleConsumer):
    """Measures test images, and could measure samples."""


class Darkness(Brightness):
    """The same from another class."""


def evaluate(path: Path, callbacks: Sequence[Callback], module: LightningModule | None = None) -> Evaluation:
    trainer = tiny.trainer(path, callbacks, limit_test_batches=2)
    trainer.test(module or tiny.stage1(), datamodule=tiny.digits(eval_batch_size=30), verbose=False)
    report = next(c for c in callbacks if isinstance(c, EvaluationReport))
    assert report.written is not None
    return read_evaluation(report.written)


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
    of_samples = {"fid", "fid_steps", "fid_1_steps", "fid_2_steps"}
    assert set(values) == {"brightness", *of_samples, "loss", "accuracy", "robust_accuracy", "energy", "r1"}
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
    expected = {"norm": "L2", "eps": 1.0, "step_size": 0.5, "num_steps": 2, "random_start": False}
    assert robust.settings["threat_model"] == expected


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
        raise InputError("plots need matplotlib: pip install 'dat-lightning[reports]'")

    monkeypatch.setattr(evaluation_report, "require_matplotlib", missing)
    brightness = Brightness()
    with pytest.raises(ValueError, match=r"dat-lightning\[reports\]"):
        evaluate(tmp_path, [brightness, report(tmp_path)])
    assert brightness.figures == []
    evaluate(tmp_path, [brightness, EvaluationReport(page=False)])
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


# Like is compared with like.


def compared(tmp_path: Path, name: str, *runs: tuple[LightningDataModule, Sequence[Callback]]) -> Column:
    """A figure of several tests of one network, side by side."""
    found = {}
    for k, (data, callbacks) in enumerate(runs):
        trainer = tiny.trainer(tmp_path / f"{k}", [*callbacks, report(tmp_path / f"{k}")], limit_test_batches=2)
        trainer.test(tiny.stage1(), datamodule=data, verbose=False)
        found[f"{k}"] = read_evaluation(tmp_path / f"{k}" / "evaluation.json")
    column = compare(found).column(name)
    assert column is not None
    return column


class Others(DigitsDataModule):
    """Tests on as many training images, and compares samples with fewer."""

    def in_distribution(self, split: Any) -> Any:
        return digits(split_indices(20)["train"][:360]) if split == "test" else super().in_distribution(split)

    def reference_data(self) -> Any:
        return EvaluationBatches(super().in_distribution("train"), self.evaluation_transform())


@pytest.mark.parametrize("name", ["brightness", "accuracy"])
def test_figures_of_other_test_images_are_not_compared(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 32, "eval_batch_size": 40, "validation_size": 20, "num_ood": 60}
    settings["num_held_out"] = 20
    one, other = DigitsDataModule(**settings), Others(**settings)
    column = compared(tmp_path, name, (one, [Brightness()]), (other, [Brightness()]), (one, [Brightness()]))
    assert [entry.num_samples for entry in column.entries if entry is not None] == [80, 80, 80]
    assert column.groups == (0, 1, 0)
    assert column.differing == ("test_images",)


def test_the_digest_of_test_images_depends_on_no_batch_size(tmp_path: Path) -> None:
    used = []
    for k, (size, count) in enumerate(((30, 2), (20, 3))):
        callbacks = [Brightness(), report(tmp_path / f"{k}")]
        trainer = tiny.trainer(tmp_path, callbacks, limit_test_batches=count)
        trainer.test(tiny.stage1(), datamodule=tiny.digits(eval_batch_size=size), verbose=False)
        used.append([entry.settings for entry in read_evaluation(tmp_path / f"{k}" / "evaluation.json").entries])
    assert used[0] == used[1]
    # Evaluators and the module have seen the same.
    assert len({each["test_images"] for each in used[0]}) == 1


class Flat(nn.Module):
    """Random features of pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 12, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0].flatten(1).float() / 255 @ self.weight


def sampled(metric: Callback) -> list[Callback]:
    return [PGDSampler(num_samples=20, num_steps=[1], step_size=0.5), metric]


def of_samples(seed: int) -> Callback:
    return SampleMetrics(Flat(seed), metrics=["fid", "prc"])


@pytest.mark.parametrize("make", [lambda seed: FrechetDistance(Flat(seed)), of_samples], ids=["frechet", "metrics"])
def test_distances_of_other_extractors_or_references_are_not_compared(make: Any, tmp_path: Path) -> None:
    data, fewer = tiny.digits(), Others(batch_size=32, validation_size=20, num_ood=60, num_held_out=20)
    runs = [(data, sampled(make(0))), (data, sampled(make(1))), (data, sampled(make(0))), (fewer, sampled(make(0)))]
    column = compared(tmp_path, "fid", *runs)
    assert column.groups == (0, 1, 0, 2)
    assert len({example.settings["reference"] for example in column.examples}) == 2
    assert {"extractor", "reference"} <= set(column.differing)
    assert column.direction == "lower"


def test_a_reference_file_is_known_by_its_contents(tmp_path: Path) -> None:
    file = tmp_path / "reference.npz"
    found: list[str] = []
    for seed in (0, 1, 0):
        numbers = np.random.default_rng(seed).normal(size=(50, 12))
        np.savez(file, mu=numbers.mean(0), sigma=np.cov(numbers.T))
        for make in (FrechetDistance(Flat(0), str(file)), SampleMetrics(Flat(0), ["fid"], reference=str(file))):
            out = tmp_path / f"{len(found)}"
            entry = evaluate(out, [*sampled(make), report(out)]).entry("fid")
            assert entry is not None
            found.append(canonical(entry.compared_by))
    assert found[0] == found[4] != found[2]
    assert found[1] == found[5] != found[3]


def test_a_reference_folder_is_known_by_its_contents_wherever_it_lies(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name / "class").mkdir(parents=True)
        (tmp_path / name / "class" / "0.png").write_text(content)
        (tmp_path / name / "1.png").write_text("1")
    digests = [file_digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_plausibility_of_other_judges_and_distances_say_nothing_of_better(tmp_path: Path) -> None:
    def searching(seed: int) -> list[Callback]:
        judge = tiny.energy_model(seed)
        return [Counterfactuals([1.0], 2, targets=["next"], judge=judge, extractor=Flat(seed), min_class_images=2)]

    found = {}
    for k, seed in enumerate((0, 1)):
        callbacks = [*searching(seed), report(tmp_path / f"{k}")]
        found[f"{k}"] = evaluate(tmp_path / f"{k}", callbacks)
    comparison = {column.name: column for column in compare(found).columns}
    assert comparison["counterfactual_plausibility_next_eps1"].differing == ("judge",)
    assert comparison["counterfactual_fid_next_eps1"].differing == ("extractor",)
    assert comparison["counterfactual_success_next_eps1"].comparable
    directions = {name.split("_")[1]: column.direction for name, column in comparison.items() if "next" in name}
    assert directions == {
        "success": "higher",
        "confidence": "higher",
        "plausibility": "higher",
        "fid": "lower",
        "l2": None,
        "linf": None,
        "changed": None,
    }


def test_detection_of_other_images_is_not_compared(tmp_path: Path) -> None:
    def detecting(seed: int) -> list[Callback]:
        images = torch.rand(30, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
        return [OODDetection({"noise": images}, ["logsumexp"], attack=None)]

    data = tiny.digits()
    runs = [(data, detecting(0)), (data, detecting(1)), (data, detecting(0))]
    area = compared(tmp_path, "ood_auroc_noise_logsumexp", *runs)
    assert (area.groups, area.differing, area.direction) == ((0, 1, 0), ("data",), "higher")


def test_evaluators_say_what_is_better(tmp_path: Path) -> None:
    callbacks = [
        RobustAccuracy(tiny.ATTACK),
        Calibration(),
        OODDetection(scores=["logsumexp"], attack=None),
        EnergyStatistics(num_images=20),
        *sampled(SampleMetrics(DigitsLayers(), ["fid", "kid", "isc", "prc"], FidelitySettings(kid_subset_size=10))),
    ]
    entries = evaluate(tmp_path, [*callbacks, report(tmp_path)]).entries
    better = {each.name.partition(" ")[0]: each.better for each in entries}
    higher = ("accuracy", "robust_accuracy", "ood_auroc", "inception_score", "precision", "recall")
    lower = ("fid", "kid", "ece", "nll", "brier", "ood_fpr95")
    for name, said in better.items():
        expected = "higher" if name.startswith(higher) else "lower" if name.startswith(lower) else None
        assert said == expected, name
    neutral = {name for name, said in better.items() if said is None}
    assert {"temperature", "energy_test", "r1_train", "loss"} <= neutral


# Nothing is lost.


class Late(Brightness):
    """Fails after the others have finished."""

    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        raise RuntimeError("too late\nby far")


def test_an_error_leaves_what_others_have_finished(tmp_path: Path) -> None:
    done, stale = Brightness(), FrechetDistance(DigitsFeatures())
    stale.figures = [Measurement("fid", 1.0, "of an earlier test", 3)]
    callbacks = [report(tmp_path), done, Late("late"), Darkness("never reached"), stale, samplers(tmp_path)[0]]
    trainer = tiny.trainer(tmp_path, callbacks, limit_test_batches=2)
    with pytest.raises(RuntimeError, match="too late"):
        trainer.test(tiny.stage1(), datamodule=tiny.digits(eval_batch_size=30), verbose=False)
    found = read_evaluation(tmp_path / "evaluation.json")
    assert [(each.name, each.value) for each in found.entries] == [("brightness", done.figures[0].value)]
    assert found.failure == "RuntimeError: too late"
    assert "Incomplete" in Page(tmp_path / "evaluation.html").text
    # The next, whole evaluation of the same weights takes its place, and is not replaced by half of one.
    evaluate(tmp_path, [Brightness(), report(tmp_path)])
    assert read_evaluation(tmp_path / "evaluation.json").failure is None
    with pytest.raises(RuntimeError, match="too late"), pytest.warns(UserWarning, match="evaluation-incomplete.json"):
        tiny.trainer(tmp_path, callbacks[:3]).test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    assert read_evaluation(tmp_path / "evaluation.json").failure is None
    assert read_evaluation(tmp_path / "evaluation-incomplete.json").failure is not None


def test_an_error_is_not_hidden_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_report, "write_evaluation", full)
    callbacks = [Brightness(), Late("late"), report(tmp_path)]
    with pytest.raises(RuntimeError, match="too late"), pytest.warns(UserWarning, match="could not save .* No space"):
        tiny.trainer(tmp_path, callbacks).test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)


def test_an_error_in_training_writes_no_evaluation(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise RuntimeError("no training")

    brightness, failing = Brightness(), Failing()
    callbacks = [brightness, report(tmp_path), failing]
    evaluate(tmp_path, callbacks)
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(RuntimeError, match="no training"):
        tiny.trainer(tmp_path, callbacks).fit(tiny.stage1(), datamodule=tiny.digits())
    assert not (tmp_path / "evaluation.json").exists()


def test_without_a_path_the_evaluation_lies_with_the_run_and_other_checkpoints_keep_theirs(tmp_path: Path) -> None:
    module, elsewhere = tiny.stage1(), tmp_path / "elsewhere"
    names, digests = [], []
    trainer = tiny.trainer(tmp_path, [], limit_train_batches=1)
    trainer.fit(module, datamodule=tiny.digits())
    for file in ("run/checkpoints/last.ckpt", "run/checkpoints/best.ckpt", "loose/last.ckpt"):
        with torch.no_grad():
            next(module.parameters()).add_(0.1)
        trainer.save_checkpoint(tmp_path / file)
        callback = EvaluationReport(page=False)
        tester = tiny.trainer(elsewhere, [callback], limit_test_batches=1)
        test = partial(tester.test, module, datamodule=tiny.digits(), ckpt_path=tmp_path / file, verbose=False)
        if "best" in file:
            with pytest.warns(UserWarning, match="is the evaluation of another checkpoint"):
                test()
        else:
            test()
        assert callback.written is not None
        found = read_evaluation(callback.written)
        digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        assert found.provenance["checkpoint"]["sha256"] == digest
        digests.append(digest)
        names.append((callback.written.relative_to(tmp_path).as_posix(), found.name))
    assert names == [
        ("run/evaluation.json", "run last"),
        (f"run/evaluation-{digests[1][:8]}.json", "run best"),
        ("elsewhere/evaluation.json", "elsewhere last"),
    ]


def test_what_was_trained_since_is_not_the_checkpoint_that_it_began_with(tmp_path: Path) -> None:
    start = tmp_path / "start.ckpt"
    trainer = tiny.trainer(tmp_path, [], limit_train_batches=1)
    trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    trainer.save_checkpoint(start)
    module, callback = tiny.stage2(init_from=str(start)), EvaluationReport(page=False)
    trainer = tiny.trainer(tmp_path / "2", [callback], limit_train_batches=1, limit_test_batches=1)
    for trained in (False, True):
        if trained:
            trainer.fit(module, datamodule=tiny.digits())
        with contextlib.nullcontext() if not trained else pytest.warns(UserWarning, match="another checkpoint"):
            trainer.test(module, datamodule=tiny.digits(), verbose=False)
        assert callback.written is not None
        assert (read_evaluation(callback.written).provenance["checkpoint"] is None) == trained


# LightningCLI notes that it was called with arguments, which is the point here.
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
@pytest.mark.slow
def test_the_command_line_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = [str(ROOT / "configs" / "digits" / "stage1.yaml"), "--config", str(ROOT / "tests" / "conf" / "tiny.yaml")]
    main(["fit", "--config", *config])
    checkpoint = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    # A configuration that asks for no report gets one, in the folder of the run.
    tested = ["test", "--config", *config, "--ckpt_path", str(checkpoint)]
    main([*tested, "--trainer.fast_dev_run=true"])
    assert not list(tmp_path.rglob("evaluation*"))
    main(tested)
    assert read_evaluation(tmp_path / "runs" / "evaluation.json").name == "runs last"
    assert "runs last" in Page(tmp_path / "runs" / "evaluation.html").text
    (tmp_path / "runs" / "evaluation.html").unlink()

    def missing() -> None:
        raise InputError("plots need matplotlib: pip install 'dat-lightning[reports]'")

    with monkeypatch.context() as without:
        without.setattr(cli, "require_matplotlib", missing)
        with pytest.warns(UserWarning, match=r"no page beside it: .*dat-lightning\[reports\]"):
            main(tested)
    assert not (tmp_path / "runs" / "evaluation.html").exists()
    added = "--trainer.callbacks+=dat_lightning.pages.EvaluationReport"
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
    assert known["versions"]["torch-fidelity"] == version("torch-fidelity")
    assert {"timm", "scipy", "scikit-learn", "torchvision", "numpy", "dat_lightning"} <= set(known["versions"])
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
