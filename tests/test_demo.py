"""The demonstration, on runs that are too short to be good: its commands, its page, and how it goes on."""

import hashlib
import json
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dat_lightning import demo
from dat_lightning.cli import main
from dat_lightning.pages.demo_page import Stage, chains, read_stage, robustness_figure, smoothed, sweep_figure, table
from dat_lightning.pages.training_log import Curve, TrainingLog
from dat_lightning.results import Evaluation, Measurement, read_evaluation
from tests.pages.page import Page

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "configs" / "digits"
# Two epochs of five batches; T grows in none of them.
SHORT = """
model: {init_args: {energy_model: {init_args: {backbone: {init_args: {widths: [4, 8]}}}}}}
trainer:
  max_epochs: 2
  limit_train_batches: 5
  check_val_every_n_epoch: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""
EVALUATE = "trainer: {callbacks: {PGDSampler: {num_samples: 100, num_steps: [0, 1, 3]}}}\n"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for name, text in (("stage1", SHORT), ("stage2", SHORT), ("evaluate", EVALUATE)):
        (folder / f"{name}.yaml").write_text(f"base: {SHIPPED / name}.yaml\n{text}")
    return folder


@pytest.fixture(scope="module")
def out(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the program has filled, after it was stopped in the first run."""
    folder = tmp_path_factory.mktemp("demo") / "digits"
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        patch.chdir(folder.parent)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            main([*demo.commands(configs, folder)[0], "--trainer.max_epochs", "1"])
        demo.main(["--out", str(folder), "--configs", str(configs)])
    yield folder
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def stages(out: Path) -> list[Stage]:
    return [read_stage(out / name) for name in demo.STAGES]


def test_its_steps_are_commands_for_a_shell(out: Path, configs: Path) -> None:
    runs = demo.commands(configs, out)
    assert [run[0] for run in runs] == ["fit", "fit", "test", "test"]
    page = Page(out / "report.html")
    for run in runs:
        assert f"dat-lightning {shlex.join(run)}" in page.text


def test_a_run_that_was_stopped_goes_on(stages: list[Stage]) -> None:
    first = stages[0]
    assert first.log.curves["train/loss"].steps == tuple(range(10))
    lives = sorted(path.name for path in (first.folder / "logs").iterdir())
    assert lives == ["version_0", "version_1"]
    again = stages[1].folder / "logs"
    assert [path.name for path in again.iterdir()] == ["version_0"]


@pytest.mark.slow
def test_a_demonstration_that_is_done_trains_no_more(out: Path, configs: Path, tmp_path: Path) -> None:
    def state() -> list[str]:
        found = [out / name / "checkpoints" / "last.ckpt" for name in demo.STAGES]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in found]

    before, page = state(), Page(out / "report.html")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "--ckpt_path last: training is done, there is nothing to do")
        demo.main(["--out", str(out), "--configs", str(configs)])
    assert state() == before
    assert Page(out / "report.html").pictures == page.pictures


def test_the_page_shows_the_figures_of_the_evaluations(out: Path, stages: list[Stage]) -> None:
    page = Page(out / "report.html")
    page.assert_self_contained()
    figures = [json.loads((out / name / "evaluation.json").read_text())["figures"] for name in demo.STAGES]
    one, two = ({each["name"]: each["value"] for each in some} for some in figures)
    rows = {name: (cells, real) for name, _, cells, real in table(stages)}
    assert rows["Accuracy"] == ([f"{100 * each['accuracy']:.1f} %" for each in (one, two)], "–")
    assert rows["Robust accuracy"][0] == [f"{100 * each['robust_accuracy']:.1f} %" for each in (one, two)]
    assert rows["Fréchet distance"] == ([f"{each['fid']:.1f}" for each in (one, two)], "3.4")
    assert rows["Label agreement"] == ([f"{100 * each['label_agreement']:.1f} %" for each in (one, two)], "98.6 %")
    assert rows["Precision"] == ([f"{each['precision']:.2f}" for each in (one, two)], "0.89")
    assert rows["Recall"] == ([f"{each['recall']:.2f}" for each in (one, two)], "0.93")
    for cells, real in rows.values():
        assert all(cell in page.text for cell in [*cells, real])


def test_the_page_has_the_pictures_that_the_callbacks_drew(out: Path, stages: list[Stage]) -> None:
    page = Page(out / "report.html")
    pictures = [uri for uri in page.pictures if uri.startswith("data:image/png")]
    assert len(pictures) == len(set(pictures)) == 2 + 1 + 2 + 2
    assert len(page.drawings()) == 3
    for stage in stages:
        assert sorted(stage.sample_grids()) == [0, 1, 3]
        assert stage.sample_grids()[stage.best_steps].is_relative_to(out / stage.key)
    both = np.asarray(Image.open(out / "samples.png").convert("L"))
    assert all(half[84:].std() > 30 for half in np.array_split(both, 2, axis=1))


def test_all_outputs_lie_below_out(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {"report.html", "samples.png", *demo.STAGES}
    assert {path.name for path in out.parent.iterdir()} <= {"digits", "cache"}


def test_stage_2_begins_with_the_weights_of_stage_1(out: Path) -> None:
    # Batch norm is frozen in Stage 2, so its running statistics are still those of Stage 1.
    paths = [out / name / "checkpoints" / "last.ckpt" for name in demo.STAGES]
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    statistics = [name for name in first if "running_" in name]
    assert statistics
    assert all(torch.equal(first[name], second[name]) for name in statistics)
    assert any(not torch.equal(first[name], second[name]) for name in first if name.endswith("weight"))


def test_the_evaluation_measures_all_that_the_page_shows(out: Path) -> None:
    found = {entry.name for entry in read_evaluation(out / "stage2" / "evaluation.json").entries}
    assert {"real_fid", "fid", "label_agreement", "counterfactual_plausibility_uniform_eps4"} <= found


# Its parts.


def stage(folder: Path, *entries: Measurement, key: str = "stage2") -> Stage:
    return Stage(key, folder, Evaluation("e", entries), TrainingLog({"train/loss": Curve((0,), (1.0,))}, 1.0))


def swept(name: str, best: int, **values: float) -> Measurement:
    steps = [int(key.removeprefix("s")) for key in values]
    details = {"num_steps": best, "sweep_steps": steps, "sweep": list(values.values())}
    return Measurement(name, values[f"s{best}"], "d", 9, details)


def attacked(name: str, value: float, eps: float, num_steps: int) -> Measurement:
    attack = {"norm": "L2", "eps": eps, "step_size": 0.25, "num_steps": num_steps}
    return Measurement(name, value, "d", 9, settings={"threat_model": attack})


def test_the_plot_of_steps_rings_the_best_of_the_distance(tmp_path: Path) -> None:
    entries = [swept("fid", 20, s10=9.0, s20=4.0), swept("precision", 10, s10=0.7, s20=0.6)]
    entries += [swept("recall", 10, s10=0.7, s20=0.5), swept("label_agreement", 10, s10=0.9, s20=0.8)]
    entries += [Measurement(f"real_{name}", 0.5, "d", 9) for name in ("fid", "precision", "recall")]
    judged = {"judge_accuracy_on_originals": 0.5}
    entries.append(Measurement("counterfactual_plausibility_uniform_eps4", 0.5, "d", 9, judged))
    figure = sweep_figure([stage(tmp_path, *entries)])
    rings = [axes.lines[1].get_xydata().tolist() for axes in figure.axes]
    assert rings == [[[20, 4.0]], [[20, 0.6]], [[20, 0.5]], [[20, 0.8]]]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[10, 9.0], [20, 4.0]]


def test_the_plots_of_attacks_vary_steps_or_radius_alone(tmp_path: Path) -> None:
    entries = [Measurement("accuracy", 0.9, "d", 9), attacked("robust_accuracy", 0.6, 1.0, 20)]
    entries += [attacked("robust_accuracy_a", 0.7, 1.0, 5), attacked("robust_accuracy_b", 0.2, 2.0, 20)]
    entries.append(attacked("robust_accuracy_c", 0.3, 2.0, 5))
    left, right = robustness_figure([stage(tmp_path, *entries)]).axes
    assert left.lines[0].get_xydata().tolist() == [[0, 0.9], [5, 0.7], [20, 0.6]]
    assert right.lines[0].get_xydata().tolist() == [[0, 0.9], [1, 0.6], [2, 0.2]]


def test_chains_are_cut_out_of_the_sample_grids(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation" / "samples"
    folder.mkdir(parents=True)
    for step, steps in ((7, 1), (12, 1), (12, 10), (12, 2)):
        grid = np.full((10 * 5 + 1, 10 * 5 + 1, 3), 128, np.uint8)
        for row in range(10):
            for column in range(10):
                grid[5 * row + 1 : 5 * row + 5, 5 * column + 1 : 5 * column + 5] = 10 * row + column + steps
        Image.fromarray(grid).save(folder / f"test_step{step:07d}_{steps}_steps.png")
    shown, pixels = chains(stage(tmp_path))
    assert shown == [1, 2, 10]
    # The k-th chain is that of the k-th row, of one of the classes that are shown.
    for row, label in enumerate((0, 2, 3, 4, 7, 8)):
        for column, count in enumerate(shown):
            tile = pixels[5 * row + 1 : 5 * row + 5, 5 * column + 1 : 5 * column + 5]
            assert (tile == 10 * row + label + count).all()


def test_smoothing_averages_neighbours() -> None:
    assert smoothed([0, 3, 6, 9, 0], 3) == [1.5, 3, 6, 5, 4.5]
    assert smoothed([1, 2], 1) == [1, 2]
    assert smoothed([], 5) == []


def test_the_page_says_how_large_digits_are() -> None:
    from dat_lightning import DigitsDataModule

    digits = DigitsDataModule().in_distribution("test")
    x, y = (torch.stack([torch.as_tensor(digits[k][part]) for k in range(len(digits))]) for part in (0, 1))
    flat = x.flatten(1)
    distances = torch.cdist(flat, flat).masked_fill(y[:, None] == y[None], float("inf"))
    assert round(float(flat.norm(dim=1).mean())) == 7
    assert round(float(distances.min(1).values.mean())) == 3
    text = (ROOT / "dat_lightning" / "pages" / "templates" / "demo.html.j2").read_text(encoding="utf-8")
    assert "about 7 long" in text
    assert "about 3 away" in text


# Mistakes.


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        demo.main(list(arguments))
    assert isinstance(stop.value.code, str)
    assert re.fullmatch(r"dat_lightning\.demo: error: [^\n]+", stop.value.code)
    return stop.value.code


def test_mistakes_cost_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = refusal("--out", str(tmp_path / "a"), "--configs", str(tmp_path))
    assert "stage1.yaml" in nowhere
    assert "--configs" in nowhere
    (tmp_path / "file").write_text("")
    assert "--out" in refusal("--out", str(tmp_path / "file" / "b"), "--configs", str(SHIPPED))

    def nothing(arguments: Sequence[str]) -> None:
        assert arguments

    monkeypatch.setattr(demo, "run", nothing)
    assert "no evaluation.json in" in refusal("--out", str(tmp_path / "c"), "--configs", str(SHIPPED))


def test_an_evaluation_that_lacks_a_figure_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no figure 'fid': evaluate\.yaml must measure it"):
        _ = stage(tmp_path).best_steps


def test_a_run_that_fails_keeps_its_status(tmp_path: Path, configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken: Any = tmp_path / "configs"
    broken.mkdir()
    for name in ("stage1", "stage2", "evaluate"):
        (broken / f"{name}.yaml").write_text("model: nobody\n")
    with pytest.raises(SystemExit) as stop:
        demo.main(["--out", str(tmp_path / "out"), "--configs", str(broken)])
    assert stop.value.code == 2
    assert "nobody" in capsys.readouterr().err
