"""The comparison marks the right best, compares nothing that was measured differently, and says what it cannot do."""

import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from dat_lightning.pages.compare import main
from dat_lightning.pages.comparison import compare, read_runs
from dat_lightning.pages.comparison_page import way_letter
from dat_lightning.pages.trade_off import default_axes, trade_off_figure
from dat_lightning.results import Evaluation, Measurement, write_evaluation
from tests.pages.page import Page

BETTER: dict[str, Literal["higher", "lower"]] = {
    "accuracy": "higher",
    "robust_accuracy": "higher",
    "fid": "lower",
    "ece": "lower",
}


def run(name: str, protocol: str = "p", samples: int = 100, **figures: float) -> Evaluation:
    settings = {"how": protocol}
    entries = [
        Measurement(key, value, "in words", samples, better=BETTER.get(key), settings=settings, source="Source")
        for key, value in figures.items()
    ]
    return Evaluation(name, entries)


def of_images(name: str, fid: float, **settings: str) -> Evaluation:
    """A run whose distance was measured with something."""
    return Evaluation(name, [Measurement("fid", fid, "p", 80, source="Source", better="lower", settings=settings)])


AT, DAT, JEM = (
    run("AT", accuracy=0.924, robust_accuracy=0.757, fid=28.4, ece=0.1),
    run("DAT", accuracy=0.919, robust_accuracy=0.758, fid=9.12, ece=0.1),
    run("JEM", accuracy=0.929, robust_accuracy=0.405, fid=38.4),
)


def best(name: str, *runs: Evaluation) -> list[str]:
    column = compare({each.name: each for each in runs}).column(name)
    assert column is not None
    return [each.name for each, mark in zip(runs, column.best, strict=True) if mark]


@pytest.mark.parametrize(
    ("name", "winners"), [("accuracy", ["JEM"]), ("robust_accuracy", ["DAT"]), ("fid", ["DAT"]), ("ece", ["AT", "DAT"])]
)
def test_the_best_run_is_marked(name: str, winners: list[str]) -> None:
    assert best(name, AT, DAT, JEM) == winners
    assert best(name, JEM, DAT, AT) == winners[::-1]


def test_nan_is_never_best_and_infinity_may_be() -> None:
    assert best("fid", run("a", fid=math.nan), run("b", fid=3.0), run("c", fid=4.0)) == ["b"]
    assert best("accuracy", run("a", accuracy=math.nan), run("b", accuracy=0.1)) == []
    assert best("fid", run("a", fid=math.inf), run("b", fid=math.inf)) == ["a", "b"]


def test_a_figure_of_which_nobody_says_what_is_better_has_no_best() -> None:
    assert best("novelty", run("a", novelty=1.0, fid=2.0), run("b", novelty=2.0, fid=1.0)) == []


@pytest.mark.parametrize("other", [run("b", "q", fid=1.0), run("b", "p", 99, fid=1.0)], ids=["protocol", "images"])
def test_what_was_measured_differently_is_flagged_and_not_compared(other: Evaluation, tmp_path: Path) -> None:
    runs = [run("a", fid=2.0, ece=0.1), other, run("c", fid=3.0, ece=0.2)]
    column = compare({each.name: each for each in runs}).column("fid")
    assert column is not None
    assert not column.comparable
    assert column.groups == (0, 1, 0)
    assert column.best == (False, False, False)
    page = page_of(tmp_path, *runs)
    assert "did not measure fid in the same way" in page.text
    assert all(text in page.text for text in ("2a", "1b", "3a"))
    assert page.text.count("fida") == page.text.count("fidb") == 1  # the protocols, with their letters
    assert "ecea" not in page.text


@pytest.mark.parametrize(
    ("one", "other", "differing"),
    [
        ({"test_images": "aa"}, {"test_images": "bb"}, ("test_images",)),
        ({"extractor": "E aa", "reference": "r"}, {"extractor": "E bb", "reference": "r"}, ("extractor",)),
        ({}, {"judge": "J aa"}, ("judge",)),
    ],
)
def test_what_was_measured_with_something_else_is_not_compared_and_the_page_says_with_what(
    one: dict[str, str], other: dict[str, str], differing: tuple[str, ...], tmp_path: Path
) -> None:
    runs = [of_images("a", 2.0, **one), of_images("b", 1.0, **other), of_images("c", 3.0, **one)]
    column = compare({each.name: each for each in runs}).column("fid")
    assert column is not None
    assert (column.groups, column.best) == ((0, 1, 0), (False, False, False))
    assert column.differing == differing
    page = page_of(tmp_path, *runs)
    assert f"did not measure fid in the same way: they differ in {differing[0]}." in page.text
    assert f"{differing[0]} {next(iter(other.values()))}" in page.text
    assert (f"{differing[0]} not recorded" in page.text) == (not one)
    same = [of_images("a", 2.0, **other), of_images("b", 1.0, **other)]
    assert best("fid", *same) == ["b"]
    assert "differ in" not in page_of(tmp_path, *same).text


def test_nobody_is_best_where_nobody_said_what_is_better() -> None:
    """A copy of a training image is nearest to it, and an image that stays where it is has moved least."""
    for name in ("nearest_training_distance", "counterfactual_l2_next_eps4", "accuracy_of_old_files"):
        runs = [
            Evaluation(each, [Measurement(name, value, "p", 1, source="Source")])
            for each, value in (("a", 0.0), ("b", 1.0))
        ]
        assert best(name, *runs) == []
    told, silent = run("a", fid=1.0), run("b", fid=2.0)
    silent = Evaluation("b", [replace(silent.entries[0], better=None)])
    assert best("fid", told, silent) == []


def test_a_run_that_was_stopped_is_shown_as_incomplete(tmp_path: Path) -> None:
    stopped = replace(run("b", fid=2.0), failure="RuntimeError: out of <memory>")
    page = page_of(tmp_path, run("a", fid=1.0), stopped)
    assert "b is incomplete: its test stopped before its end. RuntimeError: out of <memory>" in page.text
    assert page.text.count("bincomplete") == 1
    assert "incomplete" not in page_of(tmp_path, run("a", fid=1.0), run("b", fid=2.0)).text


def test_text_from_files_is_never_markup(tmp_path: Path) -> None:
    evil = "<script src='https://x.org/'>&$x^$\"</script>"
    used = {evil: evil}
    runs = [
        Evaluation(f"{evil}{k}", [Measurement(evil, 1.0, evil, k, settings=used, source=evil)], failure=evil)
        for k in (1, 2)
    ]
    main([*files(tmp_path, *runs), "--output", str(tmp_path / "c.html"), "--x", evil, "--y", evil])
    page = Page(tmp_path / "c.html")
    page.assert_self_contained()
    assert page.text.count(evil) >= 10


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["robust_accuracy_L2_1_1x1", "robust_accuracy_L2_1_20x0.25", "robust_accuracy_L2_2_20x0.25"], 1),
        (["robust_accuracy_L2_inf_90x0.5", "robust_accuracy_L2_1_7x0.25", "robust_accuracy_L2_1_10x0.2_random"], 2),
        (["robust_accuracy_L2_1_20x0.25", "robust_accuracy"], 1),
        (["robust_accuracy", "robust_accuracy_L2_1_20x0.25", "autoattack_L2_0.5"], 2),
    ],
)
def test_the_plot_shows_the_accuracy_under_the_strongest_attack(names: list[str], chosen: int) -> None:
    evaluation = Evaluation("a", [Measurement(name, 0.5, "p", 1, source="Source") for name in ["fid", *names]])
    assert default_axes(compare({"a": evaluation, "b": evaluation})) == ("fid", names[chosen])


def test_figures_that_one_run_has_are_left_out_and_named(tmp_path: Path) -> None:
    a, b = run("a", fid=1.0, ece=0.1, fid_10_steps=3.0), run("b", fid=1.0, fid_10_steps=3.0)
    comparison = compare({"a": a, "b": b})
    assert [column.name for column in comparison.columns] == ["fid"]
    assert set(comparison.left_out) == {"ece", "fid_10_steps"}
    assert "not asked for): ece, fid_10_steps." in page_of(tmp_path, a, b).text


def test_the_plot_has_a_labelled_point_for_each_run() -> None:
    comparison = compare({each.name: each for each in (AT, DAT, JEM, run("lost", fid=math.nan, robust_accuracy=0.5))})
    assert default_axes(comparison) == ("fid", "robust_accuracy")
    x, y = comparison.column("fid"), comparison.column("robust_accuracy")
    assert x is not None
    assert y is not None
    (axes,) = trade_off_figure(comparison, x, y).axes
    labels = {text.get_text(): tuple(text.xy) for text in axes.texts}
    assert labels == {"AT": (28.4, 0.757), "DAT": (9.12, 0.758), "JEM": (38.4, 0.405)}
    assert sorted(tuple(line.get_xydata()[0]) for line in axes.lines) == sorted(labels.values())
    assert len({line.get_marker() for line in axes.lines}) == 1


def test_labels_of_close_points_do_not_cover_each_other() -> None:
    runs = {f"run {k}": run(f"run {k}", fid=10 + 0.3 * k, robust_accuracy=0.5) for k in range(4)}
    runs["far"] = run("far", fid=40.0, robust_accuracy=0.1)
    comparison = compare(runs)
    x, y = comparison.column("fid"), comparison.column("robust_accuracy")
    assert x is not None
    assert y is not None
    figure = trade_off_figure(comparison, x, y)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


def test_runs_measured_differently_have_other_markers() -> None:
    runs = {"a": run("a", fid=1.0, robust_accuracy=0.5), "b": run("b", "q", fid=2.0, robust_accuracy=0.6)}
    comparison = compare(runs)
    x, y = comparison.columns
    assert len({line.get_marker() for line in trade_off_figure(comparison, x, y).axes[0].lines}) == 2


def test_letters_do_not_run_out() -> None:
    assert [way_letter(k) for k in (0, 1, 25, 26, 27, 52)] == ["a", "b", "z", "aa", "ab", "ba"]


# The program.


def files(path: Path, *runs: Evaluation) -> list[str]:
    for k, each in enumerate(runs):
        write_evaluation(path / f"{k}" / "evaluation.json", each)
    return [str(path / f"{k}" / "evaluation.json") for k in range(len(runs))]


def page_of(path: Path, *runs: Evaluation) -> Page:
    main([*files(path, *runs), "--output", str(path / "comparison.html")])
    return Page(path / "comparison.html")


def test_the_program_writes_a_page_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(tmp_path, AT, DAT, JEM)
    page.assert_self_contained()
    assert page.tags.count("tr") == 5
    assert "robust_accuracy against fid" in page.text
    (drawing,) = page.drawings()
    assert all(name in drawing for name in ("AT", "DAT", "JEM", "fid (lower is better)"))
    assert np.asarray(Image.open(tmp_path / "comparison.png")).std() > 5
    assert capsys.readouterr().out.count("comparison.") == 2


def test_columns_and_axes_are_chosen_by_name(tmp_path: Path) -> None:
    arguments = [*files(tmp_path, AT, DAT), "--output", str(tmp_path / "c.html")]
    main([*arguments, "--columns", "ece", "fid", "--x", "accuracy", "--y", "ece"])
    page = Page(tmp_path / "c.html")
    words = "Figure AT DAT ece lower is better 0.1 0.1 fid lower is better 28.4 9.12 Not in the table"
    assert words.replace(" ", "") in page.text.replace(" ", "")
    assert "ece against accuracy" in page.text
    assert "accuracy (higher is better)" in page.drawings()[0]


def test_runs_of_one_name_are_told_apart_by_their_files(tmp_path: Path) -> None:
    first, second = files(tmp_path, run("x", fid=1.0), run("x", fid=2.0))
    assert list(read_runs([Path(first), Path(second)])) == [f"x ({first})", f"x ({second})"]


def test_without_two_axes_there_is_a_table_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(tmp_path, run("a", fid=1.0), run("b", fid=2.0))
    assert page.drawings() == []
    assert not (tmp_path / "comparison.png").exists()
    assert "no plot" in capsys.readouterr().out


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


def test_mistakes_cost_one_sentence(tmp_path: Path) -> None:
    first, second, third = files(tmp_path, AT, DAT, run("other", novelty=1.0))
    out = ["--output", str(tmp_path / "c.html")]
    assert "at least two evaluation files, got 1" in refusal(first, *out)
    assert "is given twice" in refusal(first, first, *out)
    assert "share no figure" in refusal(first, third, *out)
    assert "no evaluation file at nowhere.json" in refusal(first, "nowhere.json", *out)
    assert "columns: no run has a figure 'fd'; there are accuracy, ece, fid" in refusal(
        first, second, *out, "--columns", "fd"
    )
    assert "--x: no two runs share a figure 'fd'; they share accuracy" in refusal(first, second, *out, "--x", "fd")
    assert "--output must end in .html" in refusal(first, second, "--output", str(tmp_path / "c.json"))
    text = Path(second).read_text(encoding="utf-8")
    Path(second).write_text(text[:100], encoding="utf-8")
    assert "not readable JSON" in refusal(first, second, *out)
    Path(second).write_text(text.replace('"schema_version": 2', '"schema_version": 9'), encoding="utf-8")
    assert "schema version 9, expected 2" in refusal(first, second, *out)
    assert not (tmp_path / "c.html").exists()


def test_it_runs_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "nowhere.json", "neither.json"])
    monkeypatch.delitem(sys.modules, "dat_lightning.pages.compare")
    with pytest.raises(SystemExit, match=r"^dat_lightning\.pages\.compare: error: .*nowhere\.json$"):
        runpy.run_module("dat_lightning.pages.compare", run_name="__main__")
