"""Configurations with random wrong values never end in a stack trace: they cost a sentence, or they run."""

import copy
import io
import random
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dat_lightning
from dat_lightning.cli import main
from dat_lightning.runs.exporting import ExportingTrainer
from tests.recipes import Means, write_all
from tests.reliability.conditions import ROOT, TINY

# Whatever a value makes libraries warn of is no error here.
pytestmark = pytest.mark.filterwarnings("ignore")

DIGITS = ["digits/stage1", "digits/dat"]
IMAGES = ["cifar10/stage2_T40", "cifar10/stage1_trades", "imagenet/resnet50_T30", "imagenet/convnext_l_T110"]

NOTHING = object()
WRONG: list[Any] = [
    *("wide", "", "nan", "é" * 50, -1, 0, -0.5, 0.5, float("nan"), float("inf"), float("-inf"), None, True, False),
    *([], [1], ["a", None], [[]], {}, {"a": 1}, {"class_path": "dat_lightning.EnergyModel"}, "2026-01-01", b"bytes"),
    *("dat_lightning.Nothing", "torch.nn.Linear", "nowhere.at.All", "builtins.dict", "nowhere/file.ckpt", "/", NOTHING),
]
# Nobody waits for these: they are parsed and instantiated, and not trained with.
HUGE: list[Any] = [10**6, 10**18, 10**400, 1e30, -(10**18)]


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dat_lightning, "TorchFidelityFeatures", Means)
    write_all(tmp_path / "data", monkeypatch)


def shipped(name: str) -> Any:
    """A recipe's own file; its base is named so that it is found from anywhere."""
    path = ROOT / "configs" / f"{name}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**config, "base": str(path.parent / config["base"])} if "base" in config else config


def places(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all entries of a configuration."""
    entries = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutant(config: Any, rng: random.Random, values: list[Any]) -> tuple[Any, str]:
    """The configuration with one entry replaced, removed or added, and what was done."""
    config = copy.deepcopy(config)
    path = rng.choice(list(places(config)))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    value = rng.choice(values)
    if isinstance(parent, dict) and rng.random() < 0.1:
        parent["unknown_" + str(path[-1])] = value if value is not NOTHING else 1
        return config, f"{path[:-1]} has unknown_{path[-1]}"
    if value is NOTHING:
        del parent[path[-1]]
        return config, f"{path} is gone"
    parent[path[-1]] = value
    return config, f"{path} = {value!r}"[:200]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Ends what still runs then, which is no failure: it got beyond its configuration."""

    def stop(*args: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except TimeoutError:
        pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(config: Any, args: list[str]) -> str | None:
    """What is wrong with how the program takes a configuration, ``None`` if nothing is."""
    Path("fuzzed.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    said, shown = io.StringIO(), io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(shown), at_most(60):
            main(["fit", "--config", "fuzzed.yaml", *args])
    except SystemExit as stop:
        lines = [line for line in said.getvalue().splitlines() if line.startswith("dat-lightning: error: ")]
        if stop.code in (1, 2) and len(lines) == 1 and "Traceback" not in said.getvalue():
            return None
        return f"exit {stop.code} with {lines}"
    except Exception:
        return traceback.format_exc(limit=-2)
    return None


def fuzz(names: list[str], count: int, seed: int, values: list[Any], args: list[str]) -> None:
    rng = random.Random(seed)
    wrong = []
    for _ in range(count):
        name = rng.choice(names)
        config = shipped(name)
        changed, what = mutant(config, rng, values)
        found = verdict(changed, args)
        wrong += [f"{name}: {what}: {found}"] if found else []
    assert not wrong, "\n".join([f"{len(wrong)} of {count}", *wrong])


TRAINS = [
    *("--config", TINY, "--trainer.max_steps=1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"),
    *("--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.devices=1", "--trainer.num_nodes=1"),
    *("--trainer.accelerator=cpu",),
]


def instantiates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the training, with weights that take no memory."""
    monkeypatch.setattr(ExportingTrainer, "fit", lambda *args, **kwargs: None)


@pytest.mark.parametrize(("names", "count"), [(DIGITS, 12), pytest.param(IMAGES, 6, marks=pytest.mark.slow)])
def test_wrong_values_are_refused_or_accepted(names: list[str], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    instantiates(monkeypatch)
    with torch.device("meta"):
        fuzz(names, count, 0, WRONG + HUGE, [])


@pytest.mark.slow
def test_wrong_values_are_refused_or_train_a_step() -> None:
    fuzz(DIGITS, 8, 1, WRONG, TRAINS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("names", "count"), [(DIGITS, 300), (IMAGES, 150)])
def test_many_wrong_values_are_refused_or_accepted(
    names: list[str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    instantiates(monkeypatch)
    with torch.device("meta"):
        fuzz(names, count, 2, WRONG + HUGE, [])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_wrong_values_are_refused_or_train_a_step() -> None:
    fuzz(DIGITS, 150, 3, WRONG, TRAINS)
