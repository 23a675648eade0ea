"""What the program computes, to the last bit, before and after its parts were moved about (tests/frozen/record.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.frozen import record

FROZEN: dict[str, Any] = json.loads(record.VALUES.read_text(encoding="utf-8"))
CONFIGURATIONS: dict[str, dict[str, Any]] = json.loads(record.RESOLVED.read_text(encoding="utf-8"))

# Bits depend on torch's kernels; another machine compares what two commits give there.
same_machine = pytest.mark.skipif(
    record.environment() != FROZEN["environment"],
    reason=f"frozen with {FROZEN['environment']}; compare two commits by `python -m tests.frozen.record FILE`",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),  # a step without a Trainer
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("frozen") / "values.json"
    run = subprocess.run(
        [sys.executable, "-m", "tests.frozen.record", str(path)],
        cwd=record.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


# Moments of features are added up batch by batch since validation and test have one FID, and no longer of all samples
# at once: float64 sums in another order.
SUMMED_ANEW = dict.fromkeys(("fid", "fid_4_steps", "fid_10_steps"), 1e-6)
# torchmetrics sums 1 − p, and weighs bins by shares of the images, not by their number.
SUMMED_ANEW |= dict.fromkeys(("ece", "ece_scaled"), 1e-14)


@same_machine
def test_one_step_is_what_it_was() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as it was recorded
    try:
        assert record.one_step() == FROZEN["one_step"]
    finally:
        torch.set_num_threads(threads)


@same_machine
@pytest.mark.slow
@pytest.mark.parametrize("part", [name for name in FROZEN if name not in ("environment", "one_step")])
def test_runs_are_what_they_were(part: str, found: dict[str, Any]) -> None:
    expected = FROZEN[part]
    if part == "figures":
        expected = expected | {name: pytest.approx(expected[name], rel=rel, abs=0) for name, rel in SUMMED_ANEW.items()}
    assert found[part] == expected


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    assert FROZEN["stage2_resumed"] == FROZEN["stage2"]


def test_every_recipe_is_frozen() -> None:
    assert record.recipes().keys() == CONFIGURATIONS.keys()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_recipe_resolves_to_what_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert record.resolved(record.recipes()[name]) == CONFIGURATIONS[name]


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if not name.endswith("/features")])
def test_a_recipe_guards_its_steps(name: str) -> None:
    """As it resolves, which the test above compares."""
    config = CONFIGURATIONS[name]
    (guard,) = (key for key, value in config.items() if str(value).endswith(".DivergenceGuard"))
    assert config[guard.replace("class_path", "init_args.action")] == "skip"
