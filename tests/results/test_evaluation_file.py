"""What is written is read back, damaged files are refused in a sentence, and no crash leaves half a file."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dat_lightning.results import Evaluation, Measurement, evaluation_file, read_evaluation, write_evaluation
from dat_lightning.results.evaluation_file import path_for

DETAILS = {"curve": [1.0, math.inf, -math.inf], "seed": 3, "text": "a <b> ε", "none": None, "nested": {"ok": True}}
SETTINGS = {"reference": "sha256:ab", "attack": {"eps": math.inf, "start": [1, 2.5]}, "num_bins": None}
FID = Measurement("fid", 9.12, "50 000 samples", 50000, DETAILS, "lower", SETTINGS, "FrechetDistance")
RUN = Evaluation("run 1", [FID], {"python": "3.10"}, "ValueError: too late")


def test_figures_in_are_figures_out(tmp_path: Path) -> None:
    path = tmp_path / "new" / "evaluation.json"
    write_evaluation(path, RUN)
    assert read_evaluation(path) == RUN
    # A standard reader, which knows neither NaN nor infinity as numbers, takes the file as well.
    contents = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert contents["schema_version"] == 2
    assert contents["figures"][0]["value"] == 9.12
    assert contents["figures"][0]["details"]["curve"] == [1.0, "Infinity", "-Infinity"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1 + 0.2, -0.0])
def test_every_number_survives(value: float, tmp_path: Path) -> None:
    write_evaluation(tmp_path / "e.json", Evaluation("x", [Measurement("f", value, "p", 1, source="s")]))
    read = read_evaluation(tmp_path / "e.json").entries[0].value
    assert repr(read) == repr(value)


def test_tensors_arrays_and_objects_become_primitives() -> None:
    value = {"t": torch.tensor([1, 2]), "a": np.float32(0.5), "b": np.bool_(True), "p": Path("x/y"), 3: {2, 1}}
    expected = {"t": [1, 2], "a": 0.5, "b": True, "p": "x/y", "3": [1, 2]}
    assert evaluation_file.primitive(value) == expected
    assert type(evaluation_file.primitive(np.bool_(True))) is bool


def test_a_crash_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, RUN)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_evaluation(path, Evaluation("other", []))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["evaluation.json"]


def test_others_may_read_the_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_evaluation(tmp_path / "e.json", RUN)
    assert (tmp_path / "e.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


FIGURE = {
    "name": "f",
    "value": 1.0,
    "definition": "p",
    "num_samples": 1,
    "details": {},
    "better": None,
    "settings": {},
    "source": "s",
    "protocol": "for people",
}


def damaged(**changes: Any) -> str:
    """A file with some entries replaced, or taken out where the new one is None."""
    whole: dict[str, Any] = {
        "format": "dat_lightning evaluation",
        "schema_version": 2,
        "name": "a",
        "figures": [FIGURE],
        "provenance": {},
    }
    return json.dumps({name: value for name, value in {**whole, **changes}.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable JSON"),
        (damaged()[:-20], "not readable JSON"),
        ("[]", "no evaluation file: expected one that EvaluationReport has written"),
        (damaged(format=None), "no evaluation file"),
        (damaged(schema_version=1), "schema version 1, expected 2: evaluate anew"),
        (damaged(figures=None), "lacks 'figures'"),
        (damaged(figures=[{"name": "f", "value": 1.0}]), "lacks 'definition'"),
        (damaged(figures=["f"]), "damaged evaluation file"),
        (damaged(figures=json.loads(damaged(name=1))["figures"], name=7), "wrong type"),
        (
            damaged(figures=[{**json.loads(damaged())["figures"][0], "value": "high"}]),
            r"\['f'\] has an entry of a wrong",
        ),
        (damaged(figures=[{**FIGURE, "better": "more"}]), r"\['f'\] has an entry of a wrong"),
        (damaged(figures=[{**FIGURE, "settings": "none"}]), r"\['f'\] has an entry of a wrong"),
        (damaged(failure=3), "wrong type"),
        (damaged(figures=[{**json.loads(damaged())["figures"][0], "details": []}]), r"\['f'\] has an entry of a wrong"),
    ],
)
def test_damaged_files_cost_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_evaluation(path)
    assert "broken.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def of(sha256: str | None, failure: str | None = None) -> Evaluation:
    return Evaluation("x", [], {"checkpoint": {"path": "last.ckpt", "sha256": sha256}}, failure)


def placed(path: Path, evaluation: Evaluation) -> str:
    """Where an evaluation goes; and puts it there."""
    place = path_for(path, evaluation)
    write_evaluation(place, evaluation)
    return place.name


def test_the_evaluation_of_another_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    one, other = of("a" * 64), of("b" * 64)
    assert [placed(path, each) for each in (one, one, other, other, one)] == [
        "e.json",
        "e.json",
        "e-bbbbbbbb.json",
        "e-bbbbbbbb.json",
        "e.json",
    ]
    # A hash that begins alike, and weights that came from no file.
    assert placed(path, of("b" * 8 + "c" * 56)) == "e-bbbbbbbb-2.json"
    in_memory = Evaluation("x", [], {"checkpoint": None, "weights_sha256": "d" * 64})
    assert placed(path, in_memory) == placed(path, in_memory) == "e-dddddddd.json"
    assert read_evaluation(path) == one


@pytest.mark.parametrize("text", ["my notes", damaged(), damaged(schema_version=7)])
def test_a_file_that_is_no_evaluation_of_a_known_checkpoint_stays(text: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(text)
    assert placed(tmp_path / "e.json", of("a" * 64)) == "e-aaaaaaaa.json"
    assert placed(tmp_path / "e.json", of(None)) == "e-unknown.json"
    assert placed(tmp_path / "e.json", of(None)) == "e-unknown-2.json"
    assert (tmp_path / "e.json").read_text() == text


def test_an_incomplete_evaluation_replaces_no_complete_one(tmp_path: Path) -> None:
    path, whole, part = tmp_path / "e.json", of("a" * 64), of("a" * 64, "ValueError: no")
    assert [placed(path, each) for each in (part, part, whole, part, part, whole)] == [
        "e.json",
        "e.json",
        "e.json",
        "e-incomplete.json",
        "e-incomplete.json",
        "e.json",
    ]
    assert placed(path, of("b" * 64, "ValueError: no")) == "e-bbbbbbbb.json"
    assert read_evaluation(path) == whole


def test_an_evaluation_with_fewer_figures_replaces_none_with_more(tmp_path: Path) -> None:
    """A quick look must not cost hours; other step counts of the same figures are no loss."""

    def having(*names: str) -> Evaluation:
        return replace(of("a" * 64), entries=[Measurement(name, 1.0, "p", 1, source="s") for name in names])

    path = tmp_path / "e.json"
    full = having("accuracy", "fid", "fid_5_steps")
    assert placed(path, full) == placed(path, having("accuracy", "fid", "fid_9_steps")) == "e.json"
    assert placed(path, having("accuracy")) == placed(path, having("accuracy")) == "e-fewer.json"
    assert placed(path, having("accuracy", "fid", "ece")) == "e.json"
    assert placed(path, having("accuracy")) == "e-fewer.json"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "whole.json").write_text(damaged())
    assert read_evaluation(tmp_path / "whole.json").entries[0] == Measurement("f", 1.0, "p", 1, source="s")
    with pytest.raises(FileNotFoundError, match=r"no evaluation file at .*nowhere\.json"):
        read_evaluation(tmp_path / "nowhere.json")
