import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dat_lightning.studies import read_study
from dat_lightning.studies.__main__ import main
from dat_lightning.studies.collection import Result, Summary, read_results
from dat_lightning.studies.page import cell, table_markdown, write_page
from dat_lightning.studies.plots import draw, lines
from dat_lightning.studies.study_file import Column
from tests.studies.small import CONFIGS, contents, report, stand_in, study, write


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, as_process=False)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    main([*arguments])
    return capsys.readouterr().out.splitlines()


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    return str(stop.value.code)


def test_one_command_runs_everything_and_a_second_one_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path))
    first = said(capsys, path, "--out", "results/one", "--jobs", "2")
    assert sum("done in" in line for line in first) == 10
    assert first[-1] == (
        "wrote results/one/study.json, results/one/study.html, results/one/table.md, results/one/both.png"
    )
    assert len(list(Path("results/runs").iterdir())) == 6
    second = said(capsys, path, "--out", "results/one")
    assert sum(line.endswith("done before, kept") for line in second) == 10
    assert len(Path("calls.txt").read_text().splitlines()) == 10


def test_a_list_shows_what_there_is_to_run_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, {**contents(), "seeds": [0]}))
    before = said(capsys, path, "--out", "results/one", "--list")
    assert [line.split("  ", 1)[1] for line in before[:2]] == ["to do     first, seed 0", "to do     short, seed 0"]
    assert before[-1] == "5 tasks, 0 done; runs are in results/runs"
    assert not Path("calls.txt").exists()
    assert not Path("results").exists()
    said(capsys, path, "--out", "results/one")
    assert said(capsys, path, "--out", "results/one", "--list")[-1] == "5 tasks, 5 done; runs are in results/runs"


def test_a_changed_configuration_is_run_anew_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, {**contents(), "seeds": [0]}))
    said(capsys, path, "--out", "results/one")
    changed = contents()
    changed["variants"][1]["arguments"] = {"model.steps": 6}
    write(tmp_path, {**changed, "seeds": [0]})
    second = said(capsys, path, "--out", "results/one")
    told = [line for line in second if "has changed" in line]
    because = "its configuration has changed, so it is run anew (model.init_args.steps: 4 → 6"
    assert told[0].startswith(f"long, seed 0: {because}")
    assert sum("done in" in line for line in second) == 2
    assert sum("kept" in line for line in second) == 3
    # Back again: the old run is still there.
    write(tmp_path, {**contents(), "seeds": [0]})
    third = said(capsys, path, "--out", "results/one")
    assert not [line for line in third if "changed" in line or "done in" in line]


def test_a_changed_evaluation_tests_anew_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, {**contents(), "seeds": [0]}))
    said(capsys, path, "--out", "results/one")
    write(tmp_path, {**contents(), "seeds": [0]}, evaluation={**CONFIGS["evaluation"], "report": report(fid=9.0)})
    second = said(capsys, path, "--out", "results/one")
    assert [line.split(": done")[0][6:] for line in second if "done in" in line] == [
        "short, seed 0: test",
        "long, seed 0: test",
    ]
    assert read_results(Path("results/one/study.json"))["variants"][0]["figures"]["fid"]["mean"] == 9.0


def test_a_failed_run_is_told_on_the_page_and_by_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = [*contents()["variants"], {"name": "bad", "base": "second", "arguments": {"behave": "fail"}}]
    path = str(write(tmp_path, {**contents(), "variants": variants, "seeds": [0]}))
    assert refusal(path, "--out", "out") == (
        "dat_lightning.studies: error: 1 runs failed; what the others gave is in out"
    )
    page = Path("out/study.html").read_text()
    assert "bad, seed 0 is missing: bad, seed 0: dat-lightning: error: the learning rate is too large" in page
    assert Path("out/table.md").read_text().splitlines()[-1] == "| bad | – | – |"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.yaml", "--out", "out"], "no study at nowhere.yaml"),
        (["study.yaml", "--out", "out", "--jobs", "0"], "jobs must be at least 1, got 0"),
        (["study.yaml", "--out", "done.ckpt"], "done.ckpt cannot be made: File exists"),
        (["evaluation.yaml", "--out", "out"], "evaluation.yaml: "),
    ],
)
def test_mistakes_cost_one_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    write(tmp_path)
    sentence = refusal(*arguments)
    assert sentence.startswith(f"dat_lightning.studies: error: {words}")
    assert "\n" not in sentence


# What is shown.


def result(variant: str, seed: int, **kwargs: Any) -> Result:
    empty: dict[str, Any] = {"folders": {"training": "a", "test": "b"}, "commands": ["c"], "seconds": {}}
    defaults = {"value": None, "done": True, "error": "", "config_sha256": {}, **empty}
    return Result(variant=variant, seed=seed, **{**defaults, **kwargs})


def shown(tmp_path: Path, plot: dict[str, Any], **changes: Any) -> Any:
    found = study(tmp_path, {"plots": [{"name": "p", **plot}], **changes})
    return found, found.plots[0]


def test_a_sweep_is_the_mean_over_seeds_with_its_deviation(tmp_path: Path) -> None:
    found, plot = shown(tmp_path, {"kind": "steps", "figure": "fid"})
    sweeps = [{"fid": {"steps": [5.0, 10.0], "values": values}} for values in ([1.0, 4.0], [3.0, 4.0])]
    rows = [result("long", seed, sweeps=sweep) for seed, sweep in enumerate(sweeps)]
    (line,) = lines(found, plot, rows)
    assert (line.name, line.x, line.y) == ("long", (5.0, 10.0), (2.0, 4.0))
    assert line.spread == pytest.approx((2**0.5, 0.0))


def test_curves_keep_each_seed(tmp_path: Path) -> None:
    found, plot = shown(tmp_path, {"kind": "curve", "figure": "train/r1"})
    rows = [result("short", s, curves={"train/r1": {"steps": [1.0], "values": [2.0 + s]}}) for s in range(2)]
    (line,) = lines(found, plot, rows)
    assert (line.y, line.single) == ((2.5,), ((2.0,), (3.0,)))


def test_radii_are_read_from_names(tmp_path: Path) -> None:
    found, plot = shown(tmp_path, {"kind": "radii", "figure": "success"})
    figures = {"success_eps4": 0.75, "success_eps0.5": 0.25, "success_eps4_steps": 9.0, "other_success_eps1": 9.0}
    (line,) = lines(found, plot, [result("short", 0, figures=figures)])
    assert (line.x, line.y) == ((0.5, 4.0), (0.25, 0.75))


def test_values_and_figures_give_points(tmp_path: Path) -> None:
    rows = [
        result("short", 0, figures={"fid": 3.0, "hits": 0.5}),
        result("long", 0, figures={"fid": 2.0, "hits": 0.25}),
    ]
    found, plot = shown(tmp_path, {"kind": "values", "figure": "fid"})
    assert [(line.x, line.y) for line in lines(found, plot, rows)] == [((1.0, 4.0), (3.0, 2.0))]
    found, plot = shown(tmp_path, {"kind": "scatter", "figure": "hits", "x": "fid"})
    assert [(line.x, line.y) for line in lines(found, plot, rows)] == [((3.0, 2.0), (0.5, 0.25))]


def test_a_plot_shows_the_variants_that_it_names(tmp_path: Path) -> None:
    found, plot = shown(tmp_path, {"kind": "steps", "figure": "fid", "variants": ["long"]})
    sweep = {"fid": {"steps": [1.0], "values": [1.0]}}
    names = [line.name for line in lines(found, plot, [result(name, 0, sweeps=sweep) for name in ("short", "long")])]
    assert names == ["long"]


def test_what_is_drawn_is_what_the_lines_say(tmp_path: Path) -> None:
    found, plot = shown(
        tmp_path,
        {"kind": "scatter", "figure": "hits", "x": "fid", "log_x": True, "words": "share", "x_words": "distance"},
    )
    rows = [
        result("short", 0, figures={"fid": 3.0, "hits": 0.5}),
        result("long", 0, figures={"fid": 20.0, "hits": 0.2}),
    ]
    axes = draw(found, plot, rows).axes[0]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert points == [(3.0, 0.5), (20.0, 0.2)]
    assert {text.get_text() for text in axes.texts} == {"short", "long"}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("distance", "share", "log")
    with pytest.raises(ValueError, match=r"plot 'p': no run has 'hits'"):
        draw(found, plot, [result("short", 0)])


@pytest.mark.parametrize(
    ("mean", "sd", "percent", "text"),
    [
        (0.6512, None, True, "65.1 %"),
        (0.6512, 0.0123, True, "65.1 ± 1.2 %"),
        (20.456, 1.234, False, "20.5 ± 1.2"),
        (20.456, 12.34, False, "20 ± 12"),
        (0.8512, 0.0123, False, "0.851 ± 0.012"),
        (15.0, 0.0, False, "15"),
        (20.456, None, False, "20.46"),
        (float("nan"), None, False, "not finite"),
    ],
)
def test_cells_have_as_many_digits_as_mean_something(mean: float, sd: float | None, percent: bool, text: str) -> None:
    assert cell(Column("fid", "distance", percent), {"fid": Summary(mean, sd, (mean,))}) == text
    assert cell(Column("other", "o"), {"fid": Summary(mean, sd, (mean,))}) == "–"


def test_the_page_has_table_plots_pictures_and_commands(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    plots = [
        {"name": "both", "kind": "scatter", "figure": "accuracy", "x": "fid"},
        {"name": "missing", "kind": "steps", "figure": "kid"},
    ]
    found = read_study(write(tmp_path, {**contents(), "plots": plots, "pictures": ["grid"], "title": "A <study>"}))
    folders = {"training": "t", "test": str(tmp_path)}
    figures = {"fid": 3.0, "accuracy": 0.5}
    rows = [result(name, 0, figures=figures, folders=folders, commands=[f"run {name}"]) for name in ("short", "long")]
    written = write_page(tmp_path / "out", found, rows)
    page = written[0].read_text()
    assert [path.name for path in written] == ["study.html", "table.md", "both.png"]
    assert "<h1>A &lt;study&gt;</h1>" in page
    assert "<td>50.0 %</td>" in page
    assert "run short" in page
    assert "plot missing is missing: no run has kid" in page
    assert page.count("data:image/png") == 2
    assert page.count("data:image/svg+xml") == 2
    assert not re.search(r'(src|href|srcset)="(?!data:)', page)
    with Image.open(written[2]) as drawn:
        assert drawn.size[0] > 500
    assert table_markdown(found, rows) == (
        "|  | distance | hits |\n| --- | --- | --- |\n| short | 3 | 50.0 % |\n| long | 3 | 50.0 % |\n"
    )
