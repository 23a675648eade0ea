import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary as Proto
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dat_lightning.results import Evaluation, Measurement
from dat_lightning.studies import plan
from dat_lightning.studies.collection import (
    collect,
    figures_of,
    previous_runs,
    read_curves,
    read_results,
    summaries,
    summary,
    sweeps_of,
    write_results,
)
from dat_lightning.studies.execution import execute
from tests.studies.small import CONFIGS, contents, report, stand_in, study


def log(folder: Path, version: int, name: str, points: dict[int, float]) -> None:
    """Writes what a logger for TensorBoard would."""
    writer = EventFileWriter(str(folder / "logs" / f"version_{version}"))
    for step, value in points.items():
        writer.add_event(Event(step=step, summary=Proto(value=[Proto.Value(tag=name, simple_value=value)])))
    writer.close()


@pytest.mark.parametrize("values", [[1.5, 2.25, 7.0], [0.1, 0.1], [-3.0, 4.0, 0.0, 1e6]])
def test_mean_and_deviation_are_those_of_a_sample(values: list[float]) -> None:
    found = summary(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.sd == pytest.approx(np.std(values, ddof=1), rel=1e-12, abs=1e-15)
    assert found.values == tuple(values)


def test_one_seed_has_no_deviation_and_what_is_not_finite_no_mean() -> None:
    assert summary([3.0]).sd is None
    exploded = summary([1.0, math.inf])
    assert math.isnan(exploded.mean)
    assert exploded.values == (1.0, math.inf)


def test_figures_of_single_step_counts_are_left_to_the_sweep() -> None:
    details = {"num_steps": 10, "sweep_steps": [5, 10], "sweep": [4.0, 3.0]}
    entries = [
        Measurement("fid", 3.0, "p", 8, details),
        Measurement("fid_5_steps", 4.0, "p", 8, {"num_steps": 5}),
        Measurement("accuracy", 0.5, "p", 8),
    ]
    evaluation = Evaluation("e", entries)
    assert figures_of(evaluation) == {"fid": 3.0, "fid num_steps": 10.0, "accuracy": 0.5}
    assert sweeps_of(evaluation) == {"fid": {"steps": [5, 10], "values": [4.0, 3.0]}}


def test_curves_are_read_in_order_and_only_those_asked_for(tmp_path: Path) -> None:
    log(tmp_path, 0, "train/r1", {10: 1.0, 20: 4.0, 30: 2.0})
    assert read_curves(tmp_path, ["train/r1", "train/auc"]) == {
        "train/r1": {"steps": [10.0, 20.0, 30.0], "values": [1.0, 4.0, 2.0]}
    }
    assert read_curves(tmp_path, ["train/auc"]) == {}
    assert read_curves(tmp_path / "nowhere", ["train/r1"]) == {}


def test_curves_of_a_resumed_training_join_where_it_went_on(tmp_path: Path) -> None:
    # The first life got beyond its last checkpoint; what it logged there was done again.
    log(tmp_path, 0, "train/r1", {10: 1.0, 20: 2.0, 30: 99.0, 40: 99.0})
    log(tmp_path, 10, "train/r1", {50: 5.0, 60: 6.0})
    log(tmp_path, 2, "train/r1", {30: 3.0, 40: 4.0})
    found = read_curves(tmp_path, ["train/r1"])["train/r1"]
    assert found == {"steps": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0], "values": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A study whose seeds differ, one run of which fails."""
    stand_in(tmp_path, monkeypatch, as_process=False)
    variants = [*contents()["variants"], {"name": "bad", "base": "second", "arguments": {"behave": "fail"}}]
    found = plan(study(tmp_path, {"variants": variants}), Path("runs"))
    outcomes = execute(found, 2, lambda line: None)
    numbers = {("short", 0): 1.0, ("short", 1): 2.0, ("long", 0): 4.0, ("long", 1): 8.0}
    for member in found.members:
        if member.variant == "bad":
            log(found.tasks[member.training].folder, 0, "train/r1", {5: 1e9})
            continue
        fid = numbers[member.variant, member.seed]
        found.tasks[member.test].result.write_text(json.dumps(report(fid=fid, accuracy=fid / 10)))
        log(found.tasks[member.training].folder, 0, "train/r1", {1: 2 * fid, 2: 3 * fid, 3: fid})
    return found, collect(found, outcomes)


def test_runs_are_collected_with_figures_curves_commands_and_hashes(results: Any) -> None:
    found, rows = results
    assert [(r.variant, r.seed) for r in rows] == [(m.variant, m.seed) for m in found.members]
    row, member = rows[2], found.members[2]
    assert (row.variant, row.seed, row.value, row.done) == ("long", 0, 4.0, True)
    assert row.figures == {"fid": 4.0, "accuracy": 0.4, "train/r1": 4.0, "max train/r1": 12.0}
    assert row.curves == {"train/r1": {"steps": [1.0, 2.0, 3.0], "values": [8.0, 12.0, 4.0]}}
    assert row.config_sha256 == {"training": member.training, "test": member.test}
    assert row.commands[0].startswith(f"dat-lightning fit --config runs/{member.training}/config.yaml")
    assert row.commands[1].startswith(f"dat-lightning test --config runs/{member.training}/test-{member.test}/")
    assert row.protocols == {"fid": "by hand", "accuracy": "by hand"}
    assert row.provenance == {"versions": {"torch": "2"}, "device": "cpu"}


def test_a_run_that_failed_keeps_its_curves_and_says_why(results: Any) -> None:
    bad = results[1][-1]
    assert (bad.variant, bad.done) == ("bad", False)
    assert bad.error == "bad, seed 1: dat-lightning: error: the learning rate is too large"
    assert bad.curves == {"train/r1": {"steps": [5.0], "values": [1e9]}}
    # The mean of a table is not to mix what ended with what did not.
    assert bad.figures == {}


def test_means_are_over_the_seeds_of_a_variant(results: Any) -> None:
    found = summaries(results[1], "long")
    assert found["fid"].values == (4.0, 8.0)
    assert found["fid"].mean == 6.0
    assert found["fid"].sd == pytest.approx(np.std([4.0, 8.0], ddof=1))


def test_the_file_reads_back_and_says_where_everything_lies(results: Any, tmp_path: Path) -> None:
    found, rows = results
    path = write_results(tmp_path / "out", found, rows)
    read = read_results(path)
    assert path == tmp_path / "out" / "study.json"
    short = read["variants"][0]
    assert short["name"] == "short"
    assert short["figures"]["fid"] == {"mean": 1.5, "sd": pytest.approx(math.sqrt(0.5)), "values": [1.0, 2.0]}
    assert len(read["runs"]) == 6
    assert set(read["runs"][0]["seconds"]) == {"training", "test"}
    folders = previous_runs(tmp_path / "out")
    assert folders["long", 1, "training"] == found.tasks[found.members[3].training].folder
    assert folders["long", 1, "test"] == found.tasks[found.members[3].test].folder


def test_numbers_that_are_not_finite_survive_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, as_process=False)
    broken = {**CONFIGS["evaluation"], "report": report(fid=0.0)}
    broken["report"]["figures"][0]["value"] = "Infinity"
    found = plan(study(tmp_path, {"seeds": [0]}, evaluation=broken), Path("runs"))
    rows = collect(found, execute(found, 1, lambda line: None))
    assert rows[0].figures["fid"] == math.inf
    read = read_results(write_results(tmp_path, found, rows))
    assert read["runs"][0]["figures"]["fid"] == math.inf
    assert math.isnan(read["variants"][0]["figures"]["fid"]["mean"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not readable JSON"),
        ('{"format": "other"}', "is no result of a study"),
        ('{"format": "dat_lightning study", "schema_version": 99}', "has schema version 99, expected 1"),
    ],
)
def test_a_foreign_file_is_a_sentence_and_no_earlier_call(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_results(tmp_path / "study.json")
    assert previous_runs(tmp_path) == {}
    with pytest.raises(FileNotFoundError, match=r"no study\.json at "):
        read_results(tmp_path / "nothing" / "study.json")
