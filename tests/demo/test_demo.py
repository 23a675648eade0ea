"""The whole program, on a run that is too short to be good."""

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dat_lightning.data import DigitsDataModule
from dat_lightning.demo import training
from dat_lightning.demo.__main__ import main
from dat_lightning.demo.results import fingerprint
from dat_lightning.demo.training import STAGES, read_config
from dat_lightning.weights import read_checkpoint

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "digits"
CONTINUED = ("accuracy", "robust_accuracy", "fid", "sampling_steps", "label_agreement", "precision", "recall")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the program has filled."""
    folder = tmp_path_factory.mktemp("demo") / "digits"
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        patch.chdir(folder.parent)
        main(["--quick", "--out", str(folder), "--configs", str(CONFIGS)])
    yield folder
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((out / "results.json").read_text())
    return contents


class _Page(HTMLParser):
    """Collects what a page refers to, and its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.pictures: dict[str, str] = {}
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.references += [values[name] or "" for name in ("src", "href", "srcset", "data") if name in values]
        if tag == "img":
            self.pictures[values.get("id") or f"picture {len(self.pictures)}"] = values["src"] or ""


@pytest.fixture(scope="module")
def page(out: Path) -> _Page:
    return _Page((out / "report.html").read_text(encoding="utf-8"))


def _pixels(uri: str, folder: Path) -> np.ndarray:
    path = folder / "picture.png"
    path.write_bytes(base64.b64decode(uri.partition("base64,")[2]))
    return np.asarray(Image.open(path))


def test_results_have_both_stages_and_durations(results: dict[str, Any]) -> None:
    for stage in STAGES:
        assert set(CONTINUED) <= set(results[stage])
        figures = results[stage]
        assert all(0 <= figures[name] <= 1 for name in CONTINUED if name not in ("fid", "sampling_steps"))
        sweep = {int(steps): figure["fid"] for steps, figure in results["sweep"][stage].items()}
        assert figures["sampling_steps"] == min(sweep, key=sweep.__getitem__)
        assert figures["fid"] == sweep[figures["sampling_steps"]] > 0
        assert figures["robust_accuracy"] <= figures["accuracy"]
    assert "contrastive_steps" not in results["stage1"]
    assert set(results["seconds"]) == {"stage1", "stage2", "evaluation"}
    assert all(seconds > 0 for seconds in results["seconds"].values())


def test_the_number_of_contrastive_steps_is_the_checkpoints(out: Path, results: dict[str, Any]) -> None:
    state = read_checkpoint(out / "stage2" / "checkpoints" / "last.ckpt")["state_dict"]
    assert results["stage2"]["contrastive_steps"] == int(state["curriculum.num_steps"]) > 0


def test_both_stages_began_with_the_held_out_seeds(results: dict[str, Any]) -> None:
    protocol = results["protocol"]
    seeds = DigitsDataModule().held_out_seeds()
    expected = fingerprint(torch.stack([seeds(i)[0] for i in range(protocol["num_samples"])]))
    assert protocol["seeds"] == {"stage1": expected, "stage2": expected}


def test_stage_2_began_with_the_weights_of_stage_1(out: Path) -> None:
    # Batch norm is frozen in Stage 2, so its running statistics are still those of Stage 1.
    first, second = (read_checkpoint(out / stage / "checkpoints" / "last.ckpt")["state_dict"] for stage in STAGES)
    statistics = [name for name in first if "running_" in name]
    assert statistics
    assert all(torch.equal(first[name], second[name]) for name in statistics)
    assert any(not torch.equal(first[name], second[name]) for name in first if name.endswith("weight"))


@pytest.mark.parametrize("stage", STAGES)
def test_samples_are_class_balanced_pixels(out: Path, stage: str) -> None:
    with np.load(out / f"samples_{stage}.npz") as file:
        assert set(file) == {"arr_0", "arr_1"}
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (100, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [10] * 10
    assert images.reshape(100, -1).std(axis=1).min() > 0


def test_the_report_needs_no_other_file(out: Path, page: _Page) -> None:
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "image"}
    text = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import", text)
    # Diagrams are SVG, which could name other files in turn.
    for uri in page.pictures.values():
        if uri.startswith("data:image/svg"):
            drawing = base64.b64decode(uri.partition("base64,")[2]).decode()
            assert not re.search(r"""(href|src)=["'](?!#|data:)""", drawing)


def test_the_report_shows_the_samples(out: Path, page: _Page, tmp_path: Path) -> None:
    for stage in STAGES:
        grid = _pixels(page.pictures[f"samples-{stage}"], tmp_path)
        assert grid.shape == (171, 171)
        with np.load(out / f"samples_{stage}.npz") as file:
            samples = file["arr_0"]
        assert samples.any()
        # Sample 23 is the fourth of row three.
        np.testing.assert_array_equal(grid[1 + 2 * 17 : 17 + 2 * 17, 1 + 3 * 17 : 17 + 3 * 17], samples[23, :, :, 0])
    assert len({page.pictures[f"samples-{stage}"] for stage in STAGES}) == 2
    assert "A quick run." in (out / "report.html").read_text(encoding="utf-8")


def test_the_picture_for_documents_has_both_grids(out: Path) -> None:
    picture = np.asarray(Image.open(out / "samples.png").convert("L"))
    for half in np.array_split(picture[100:], 2, axis=1):
        assert half.min() < 30
        assert half.std() > 30


def test_all_outputs_of_training_lie_below_out(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "results.json",
        "samples.png",
        "samples_stage1.npz",
        "samples_stage2.npz",
        *STAGES,
    }
    assert {path.name for path in out.parent.iterdir()} <= {"digits", "cache"}
    for stage in STAGES:
        history = training.read_history(out, training.STAGES[STAGES.index(stage)])
        assert len(history.curves["train/loss"].values) > 0
        assert history.curves["val/robust_accuracy"].steps[-1] == 39  # two epochs of 20 batches


@pytest.mark.slow
def test_a_second_judgement_gives_the_same_figures(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("results.json", "report.html", "samples_stage2.npz", "samples.png")
    before = {name: (out / name).read_bytes() for name in names}
    main(["--quick", "--skip-training", "--out", str(out), "--configs", str(CONFIGS)])
    after = {name: (out / name).read_bytes() for name in names}
    first, second = (json.loads(contents["results.json"]) for contents in (before, after))
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    assert before["samples.png"] == after["samples.png"]
    pictures = [_Page(contents["report.html"].decode()).pictures for contents in (before, after)]
    assert pictures[0] == pictures[1]
    said = capsys.readouterr().out
    assert "report.html" in said
    assert "tensorboard --logdir" in said


def _refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


def test_mistakes_cost_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = _refusal(capsys, "--out", str(tmp_path / "a"), "--configs", str(tmp_path))
    assert "stage1.yaml" in nowhere
    assert "--configs" in nowhere
    (tmp_path / "file").write_text("")
    assert "--out" in _refusal(capsys, "--out", str(tmp_path / "file" / "b"), "--configs", str(CONFIGS))
    untrained = _refusal(capsys, "--skip-training", "--out", str(tmp_path / "c"), "--configs", str(CONFIGS))
    assert "last.ckpt" in untrained
    assert "--skip-training" in untrained
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "stage1.yaml").write_text("- no mapping")
    assert "stage1.yaml" in _refusal(capsys, "--out", str(tmp_path / "d"), "--configs", str(broken))


@pytest.mark.parametrize("stage", STAGES)
def test_a_configuration_moves_as_a_whole_and_changes_in_nothing_else(stage: training.Stage) -> None:
    text = (CONFIGS / f"{stage}.yaml").read_text()
    moved = read_config(CONFIGS, stage, Path("elsewhere/x"))
    assert "runs/digits" not in json.dumps(moved)
    for callback in training.callbacks(moved, "ModelCheckpoint"):
        assert callback.pop("enable_version_counter") is False
    expected = yaml.safe_load(text.replace("runs/digits", "elsewhere/x"))
    for callback in training.callbacks(expected, "ModelCheckpoint"):
        callback.pop("enable_version_counter", None)
    assert moved == expected
    assert training.sampler(moved).num_samples == 1000


def test_the_stages_have_to_agree_on_the_number_of_samples(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in STAGES:
        config = yaml.safe_load((out / stage / "config-input.yaml").read_text())
        if stage == "stage2":
            training.callbacks(config, "PGDSampler")[0]["num_samples"] = 90
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(config))
    message = _refusal(capsys, "--skip-training", "--out", str(out), "--configs", str(tmp_path))
    assert "100" in message
    assert "90" in message
