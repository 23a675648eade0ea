"""The page without a browser, by Streamlit's own test of scripts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_lightning.explore import open_checkpoint, serving
from dat_lightning.weights.hub import MODELS

APP = Path(serving.__file__).with_name("app.py")


@pytest.fixture
def app() -> Any:
    testing = pytest.importorskip("streamlit.testing.v1", reason="no Streamlit here: pip install '.[explore]'")
    return testing.AppTest.from_file(str(APP), default_timeout=120)


def texts(app: Any) -> list[str]:
    return [element.value for element in app.markdown]


def test_a_model_that_ships_is_shown_at_work_at_once(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_served", [open_checkpoint(MODELS / "digits")])
    app.run()
    assert not app.exception
    assert any(text.startswith("At step 20 read as") for text in texts(app))
    assert any(text.startswith("Samples of class **0**; the network reads") for text in texts(app))
    assert not [group for group in app.get("button_group") if group.key == "model"]


def test_a_checkpoint_waits_until_it_is_asked(app: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_served", [open_checkpoint(checkpoint)])
    app.run()
    assert not app.exception
    assert not any(text.startswith(("At step", "Samples of class")) for text in texts(app))


def test_of_several_models_the_chosen_one_is_shown(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_checkpoint(MODELS / "digits")
    monkeypatch.setattr(
        serving, "_served", [first, replace(first, name="other", num_steps=9, step_size=0.01, at_once=False)]
    )
    app.run()
    app.button(key="example 3").click().run()
    assert any(element.value.startswith("`digits`") for element in app.caption)
    assert app.number_input(key="sample steps").value == 6
    assert app.number_input(key="filling size").value == pytest.approx(first.step_size / 4, rel=0.05)
    (models,) = [group for group in app.get("button_group") if group.key == "model"]
    models.set_value("other").run()
    assert not app.exception
    assert any(element.value.startswith("`other`") for element in app.caption)
    assert app.number_input(key="sample steps").value == 9
    # However small it is, a step is none of length 0.
    assert app.number_input(key="filling size").value == 0.0025
    # Nothing of the first one is left.
    assert app.session_state["example"] == 0
    assert not any(text.startswith(("At step", "Samples of class")) for text in texts(app))


def test_what_is_painted_over_is_filled_in(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The brush itself needs a browser; a model that ships begins with the middle painted."""
    from dat_lightning.explore import filling

    opened = open_checkpoint(MODELS / "digits")
    monkeypatch.setattr(serving, "_served", [opened])
    app.run()
    assert not app.exception
    assert any(text.startswith("Filled in 6 steps, read as") for text in texts(app))
    _, mask, target, _ = app.session_state["filling"]
    assert target is None
    assert mask.nonzero().tolist() == [[i, j] for i in range(4, 12) for j in range(4, 12)]
    # Another part, another class, and a walk of its own.
    left = torch.zeros(16, 16, dtype=torch.bool)
    left[:, :6] = True
    monkeypatch.setattr(filling, "draw_brush", lambda *arguments, **options: left)
    app.selectbox(key="filling class").set_value(4)
    app.number_input(key="filling steps").set_value(3)
    next(button for button in app.button if button.label == "Fill in").click()
    app.run()
    assert not app.exception
    (sentence,) = [text for text in texts(app) if text.startswith("Filled in")]
    assert sentence.startswith("Filled in 3 steps")
    assert sentence.endswith("it climbs to **3**.")
    image = opened.examples[0][0] if opened.examples else None
    assert image is not None
    expected = opened.explorer.fill(image, left, 3, 3, app.number_input(key="filling size").value, rule=opened.rule)
    found = app.session_state["filling"][3]
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.images[3][:, ~left], image[:, ~left])
    # A brush that painted nothing costs a sentence.
    monkeypatch.setattr(filling, "draw_brush", lambda *arguments, **options: torch.zeros(16, 16, dtype=torch.bool))
    next(button for button in app.button if button.label == "Fill in").click()
    app.run()
    assert not app.exception
    assert any("mask must be of 16×16 pixels, some of them true" in error.value for error in app.error)


@pytest.mark.parametrize(
    ("painted", "places"),
    [([0, 5, 5], [0, 5]), ((3,), [3]), ([-1, 6, 10**30, 2.5, "1", None, [1], 4], [4]), ("12", []), (None, [])],
)
def test_a_browser_may_say_anything_of_what_is_painted(painted: Any, places: list[int]) -> None:
    pytest.importorskip("streamlit", reason="no Streamlit here: pip install '.[explore]'")
    from dat_lightning.explore.brush import mask_of

    mask = mask_of(painted, 2, 3)
    assert mask.dtype == torch.bool
    assert mask.flatten().nonzero().flatten().tolist() == places
