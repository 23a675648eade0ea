"""The page shows every figure with its protocol, draws what details hold, and needs no other file."""

import base64
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dat_lightning.pages import figure_plots, write_evaluation_page
from dat_lightning.pages.figure_plots import curve, histogram, names_over_radii, reliability_diagram
from dat_lightning.pages.rendering import number
from dat_lightning.results import Evaluation, Measurement
from tests.pages.page import Page

RELIABILITY: dict[str, list[float]] = {"confidence": [0.0, 0.4, 0.9], "accuracy": [0.0, 0.5, 0.8], "count": [0, 2, 10]}
HISTOGRAMS = {"edges": [-2.0, 0.0, 2.0], "counts": {"train": [3, 1], "ood": [0, 5]}}


def entry(name: str = "fid", value: float = 1.0, **details: Any) -> Measurement:
    return Measurement(name, value, f"how {name} came about", 10, details, source="Source")


def page(path: Path, *entries: Measurement, pictures: dict[str, str] | None = None, **provenance: Any) -> Page:
    write_evaluation_page(path / "e.html", Evaluation("run", entries, provenance), pictures)
    return Page(path / "e.html")


def test_every_figure_is_there_with_its_protocol_and_samples(tmp_path: Path) -> None:
    figures = [
        Measurement("fid", 9.123456, "against CIFAR-10", 50000, source="A"),
        Measurement("ece", 0.0123, "15 bins", 999, source="B"),
    ]
    shown = page(tmp_path, *figures)
    shown.assert_self_contained()
    for text in ("9.123", "against CIFAR-10", "50000", "0.0123", "15 bins", "999", "A", "B", "2 figures"):
        assert text in shown.text


def test_text_from_figures_is_never_markup(tmp_path: Path) -> None:
    evil = "<script src='https://x.org/'>&$x^$\"</script>"
    bad = Measurement(evil, 1.0, evil, 3, {evil: evil, "warnings": [evil], "steps": [1, 2], "edges": [1]}, source=evil)
    details = {**bad.details, evil + "2": [1.0, 2.0], "deep": {evil: RELIABILITY}}
    bad = replace(bad, details=details, settings={evil: evil})
    shown = page(tmp_path, bad, checkpoint={"path": evil, "sha256": None}, module={"class": evil})
    shown.assert_self_contained()
    assert evil in shown.text


def test_numbers_are_short_and_honest() -> None:
    shown = [number(x) for x in (0.123456, -0.5, 12345.6, 1e-7, math.nan, math.inf, -math.inf, 0.0)]
    assert shown == ["0.1235", "−0.5", "12346", "1e−07", "NaN", "∞", "−∞", "0"]


def test_warnings_stand_above_the_table_once(tmp_path: Path) -> None:
    shown = page(tmp_path, entry("a", warnings=["Square beats APGD."]), entry("b", warnings=["Square beats APGD."]))
    assert shown.text.count("Square beats APGD.") == 1
    assert shown.text.index("Square beats APGD.") < shown.text.index("how a came about")


def test_what_stopped_a_test_stands_at_the_top(tmp_path: Path) -> None:
    evaluation = Evaluation("run", [entry(warnings=["Square beats APGD."])], {}, "RuntimeError: out of <memory>")
    write_evaluation_page(tmp_path / "e.html", evaluation)
    shown = Page(tmp_path / "e.html")
    assert "Incomplete. The test stopped before its end" in shown.text
    assert shown.text.index("RuntimeError: out of <memory>") < shown.text.index("Square beats APGD.")
    assert "Incomplete" not in page(tmp_path, entry()).text


def test_what_a_figure_was_measured_with_is_among_its_details(tmp_path: Path) -> None:
    figure = Measurement("fid", 1.0, "p", 10, settings={"reference": "sha256:ab12", "num_bins": 15})
    shown = page(tmp_path, figure)
    assert "referencesha256:ab12" in shown.text
    assert "p; num bins 15" in shown.text


def test_confidence_intervals_stand_with_the_value(tmp_path: Path) -> None:
    assert "0.5 0.25 … 0.75".replace(" ", "") in page(
        tmp_path, entry("accuracy", 0.5, confidence_interval=[0.25, 0.75])
    ).text.replace(" ", "")


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (RELIABILITY, ["confidence", "accuracy", "images"]),
        ({"before": RELIABILITY, "after": {**RELIABILITY, "count": [3, 2, 1]}}, ["confidence", "accuracy"]),
        (HISTOGRAMS, ["train", "ood", "share of images"]),
        ({"clean": {"fpr": [0.0, 0.5, 1.0], "tpr": [0.0, 0.9, 1.0]}}, ["false positive rate"]),
        ({"sweep_steps": [5, 10], "sweep": [3.5, 2.25]}, ["steps", "3.5", "2.25"]),
        ({"eps": [1.0, 2.0], "success": [0.25, 0.75]}, ["radius ε", "success", "0.75"]),
    ],
)
def test_details_of_a_known_shape_are_drawn_for_light_and_dark(
    details: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    shown = page(tmp_path, entry(**details))
    shown.assert_self_contained()
    expected = 2 if "before" in details else 1
    assert shown.tags.count("picture") == shown.tags.count("source") == expected
    drawings = shown.drawings()
    assert len(drawings) == expected
    assert all(word in drawing for drawing in drawings for word in words)
    light, dark = (uri for uri in shown.references[:2])
    assert light != dark


@pytest.mark.parametrize(
    "details",
    [
        {},
        {"steps": 3},
        {"steps": [1, 2], "other": [1.0]},
        {"confidence": [0.1], "accuracy": [0.1, 0.2], "count": [1]},
        {"edges": [0.0, 1.0], "counts": {"a": [1, 2, 3]}},
        {"edges": [], "counts": {}},
        {"fpr": ["x"], "tpr": ["y"]},
    ],
)
def test_details_of_another_shape_are_left_as_text(details: dict[str, Any], tmp_path: Path) -> None:
    assert page(tmp_path, entry(**details)).drawings() == []


def test_curves_go_through_the_numbers() -> None:
    (axes,) = curve([5, 10, 20], [3.0, 1.0, 2.0], "steps", "fid").axes
    assert axes.lines[0].get_xydata().tolist() == [[5, 3], [10, 1], [20, 2]]
    top, bottom = reliability_diagram(**RELIABILITY).axes
    # Bins without images have no accuracy.
    assert top.lines[1].get_xydata().tolist() == [[0.4, 0.5], [0.9, 0.8]]
    assert [bar.get_height() for bar in bottom.patches] == [2, 10]
    (axes,) = histogram([-2.0, 0.0, 2.0], {"train": [3, 1], "ood": [0, 5]}).axes
    assert [patch.get_data().values.tolist() for patch in axes.patches[::2]] == [[0.75, 0.25], [0.0, 1.0]]


def test_figures_over_radii_and_of_single_steps_are_folded(tmp_path: Path) -> None:
    figures = [entry(f"success_next_eps{eps}", eps / 10) for eps in (4, 0.5, 2)]
    figures += [entry("fid_20_steps"), entry("alone_eps1")]
    assert names_over_radii(figures) == {"success_next_eps4", "success_next_eps0.5", "success_next_eps2"}
    shown = page(tmp_path, *figures)
    assert "3 figures of single radii" in shown.text
    assert "1 figures of single numbers of sampling steps" in shown.text
    (drawing,) = shown.drawings()
    assert "0.05" in drawing
    assert all(each.name in shown.text for each in figures)


def test_what_figures_share_is_drawn_once(tmp_path: Path) -> None:
    same = [entry("ece", reliability=RELIABILITY), entry("nll", reliability=RELIABILITY)]
    assert len(page(tmp_path, *same).drawings()) == 1
    other = entry("ece_scaled", reliability={**RELIABILITY, "count": [1, 1, 1]})
    assert len(page(tmp_path, *same, other).drawings()) == 2


def test_curves_over_radii_are_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[float], list[float]]] = []

    def recorded(x: list[float], y: list[float], x_name: str, y_name: str) -> Any:
        drawn.append((x, y))
        return curve(x, y, x_name, y_name)

    monkeypatch.setattr(figure_plots, "curve", recorded)
    figure_plots.evaluation_plots([entry(f"success_eps{eps}", eps / 10) for eps in (4, 0.5, 10)])
    assert drawn == [([0.5, 4.0, 10.0], [0.05, 0.4, 1.0])] * 2  # light and dark


def test_pictures_are_in_the_page_with_captions(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "near.png")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("far", "grid"):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    details: dict[str, Any] = {"pictures": ["near.png", str(folder / "far.png")], "captions": ["first <one>"]}
    shown = page(tmp_path, entry("cf", **details), pictures={str(folder / "grid.png"): "a grid"})
    shown.assert_self_contained()
    assert all(text in shown.text for text in ("first <one>", "cf: far", "a grid"))
    for uri in shown.pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
        np.testing.assert_array_equal(np.asarray(picture), pixels)
    assert len(shown.pictures) == 3


def test_a_picture_that_cannot_be_shown_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture at all, but long enough")
    shown = page(tmp_path, entry(pictures=["gone.png", "text.png"]))
    assert "gone.png cannot be read" in shown.text
    assert "text.png is no PNG file" in shown.text
    assert shown.pictures == []


def test_the_page_says_where_the_weights_come_from(tmp_path: Path) -> None:
    known: dict[str, Any] = {
        "date": "2026-11-23T10:00:00+00:00",
        "seconds": 5400.0,
        "device": "H100",
        "num_processes": 8,
    }
    shown = page(tmp_path, entry(), checkpoint={"path": "last.ckpt", "sha256": "ab12"}, **known)
    for text in ("last.ckpt", "ab12", "2026-11-23", "90 minutes", "H100 with 8 processes"):
        assert text in shown.text
    assert "no checkpoint file" in page(tmp_path, entry(), checkpoint=None).text
