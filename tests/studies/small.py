"""A small study in files, and a program that stands for the command line: it does in an instant what a test asks."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dat_lightning.results import Measurement
from dat_lightning.studies import Study, execution, read_study
from dat_lightning.studies.planning import Task

# Reads the configuration, notes how it was called, and does what "behave" says.
_PROGRAM = """
import json, os, shutil, sys, time
from pathlib import Path
import yaml

command, config = sys.argv[1], Path(sys.argv[3])
settings = yaml.safe_load(config.read_text(encoding="utf-8"))
here = config.parent
with (Path.cwd() / "calls.txt").open("a") as calls:
    calls.write(json.dumps([time.time(), here.name, *sys.argv[1:]]) + "\\n")
behave = settings["behave"]
print("some words", flush=True)
if behave == "fail":
    sys.exit("dat-lightning: error: the learning rate is too large")
if behave == "slow":
    time.sleep(0.5)
if behave == "die":
    os.kill(os.getpid(), 9)
if behave == "hang":
    time.sleep(300)
if command == "fit":
    (here / "checkpoints").mkdir(exist_ok=True)
    if behave != "nothing":
        shutil.copy(Path.cwd() / settings["writes"], here / "checkpoints" / "last.ckpt")
else:
    report = dict(settings["report"])
    (here / "evaluation.json").write_text(json.dumps(report))
"""


def report(**figures: float) -> dict[str, Any]:
    """An evaluation file with these figures."""
    entries = [asdict(Measurement(name, value, "by hand", 8, source="Test")) for name, value in figures.items()]
    return {
        "format": "dat_lightning evaluation",
        "schema_version": 2,
        "name": "test",
        "figures": entries,
        "provenance": {"versions": {"torch": "2"}, "device": "cpu"},
    }


def contents() -> dict[str, Any]:
    """A study of two variants of one base that starts from another, and two seeds."""
    return {
        "title": "A study",
        "question": "Does it run?",
        "seeds": [0, 1],
        "bases": {
            "first": {"configs": ["first.yaml"]},
            "second": {
                "configs": ["second.yaml"],
                "arguments": {"model.init_from": "{checkpoint:first}"},
            },
        },
        "variants": [
            {"name": "short", "base": "second", "value": 1, "arguments": {"model.steps": 1}},
            {"name": "long", "base": "second", "value": 4, "arguments": {"model.steps": 4}},
        ],
        "evaluation": {"configs": ["evaluation.yaml"]},
        "columns": [{"figure": "fid", "words": "distance"}, {"figure": "accuracy", "words": "hits", "percent": True}],
        "plots": [{"name": "both", "kind": "scatter", "figure": "accuracy", "x": "fid"}],
        "curves": ["train/r1"],
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "first": {
        "behave": "well",
        "writes": "done.ckpt",
        "model": {"class_path": "a.First", "init_args": {"width": 8}},
        "data": {"class_path": "a.Data", "init_args": {}},
        "trainer": {"max_epochs": 2, "default_root_dir": "{folder}"},
    },
    "second": {
        "behave": "well",
        "writes": "done.ckpt",
        "model": {"class_path": "a.Second", "init_args": {"width": 8, "init_from": None}},
        "data": {"class_path": "a.Data", "init_args": {}},
        "trainer": {"max_epochs": 2, "default_root_dir": "{folder}"},
    },
    "evaluation": {"report": report(fid=3.0, accuracy=0.5), "trainer": {"default_root_dir": "{folder}"}},
}


def write(folder: Path, study: dict[str, Any] | None = None, **configs: dict[str, Any]) -> Path:
    """Writes a study with its configurations; returns its file."""
    for name, config in {**CONFIGS, **configs}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(contents() if study is None else study, sort_keys=False), encoding="utf-8")
    return path


def _call(workers: Any, task: Task, arguments: list[str], lock: int) -> int:
    """What the program does, in this process."""
    if task.config["behave"] == "fail":
        (task.folder / "log.txt").write_text("dat-lightning: error: the learning rate is too large")
        return 1
    with (Path.cwd() / "calls.txt").open("a") as calls:
        calls.write(" ".join(arguments) + "\n")
    if arguments[0] == "fit":
        (task.folder / "checkpoints").mkdir()
        shutil.copy(Path.cwd() / task.config["writes"], task.checkpoint)
    else:
        task.result.write_text(json.dumps(task.config["report"]))
    return 0


def study(folder: Path, changes: dict[str, Any] | None = None, **configs: dict[str, Any]) -> Study:
    """The small study, with entries replaced."""
    return read_study(write(folder, {**contents(), **(changes or {})}, **configs))


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, as_process: bool = True) -> None:
    """Puts the program in the place of the command line, with checkpoints of two epochs of two, and of one of two."""
    if not as_process:
        monkeypatch.setattr(execution._Workers, "call", _call)
    monkeypatch.chdir(folder)
    (folder / "program.py").write_text(_PROGRAM, encoding="utf-8")
    monkeypatch.setattr(execution, "PROGRAM", (sys.executable, str(folder / "program.py")))
    torch.save({"epoch": 1, "global_step": 4}, folder / "done.ckpt")
    torch.save({"epoch": 0, "global_step": 2}, folder / "half.ckpt")
