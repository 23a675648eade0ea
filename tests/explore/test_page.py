"""The page without a browser, by Streamlit's own test of scripts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dat_lightning.explore import open_checkpoint, serving
from dat_lightning.weights.shipped import MODELS

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
    monkeypatch.setattr(serving, "_served", [first, replace(first, name="other", num_steps=9, at_once=False)])
    app.run()
    app.button(key="example 3").click().run()
    assert any(element.value.startswith("`digits`") for element in app.caption)
    assert app.number_input(key="sample steps").value == 6
    (models,) = [group for group in app.get("button_group") if group.key == "model"]
    models.set_value("other").run()
    assert not app.exception
    assert any(element.value.startswith("`other`") for element in app.caption)
    assert app.number_input(key="sample steps").value == 9
    # Nothing of the first one is left.
    assert app.session_state["example"] == 0
    assert not any(text.startswith(("At step", "Samples of class")) for text in texts(app))
