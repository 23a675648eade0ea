"""Two gloo processes are one process: the figures of the evaluators."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ddp.run_evaluators import main

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.ddp


def figures(folder: Path, time: int, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"figures-{time}-{rank}.json").read_text())
    return found


def test_the_figures_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    main(1, one)
    command = [sys.executable, "-m", "tests.ddp.run_evaluators", "2", str(two)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    expected = figures(one, 0, 0)
    assert len(expected) == 9 + 2 * 3 * 2 * 2 + 2 * 6
    assert expected["ood_auroc_one_logsumexp"][1] == 361
    assert expected["ood_auroc_one_logsumexp"][2]["num_skipped"] == 2
    for rank in (0, 1):
        found = figures(two, 0, rank)
        assert found.keys() == expected.keys()
        for name, (value, num_samples, details) in expected.items():
            # An AUROC moves by 1/(2·360·31) if the last bits of two scores change their order.
            assert found[name][0] == pytest.approx(value, rel=1e-4, abs=1e-4 if name.startswith("ood") else 0), name
            assert found[name][1] == num_samples, name
            assert found[name][2].keys() == details.keys(), name
            assert found[name][2].get("num_skipped") == details.get("num_skipped"), name
        assert figures(two, 1, rank) == found == figures(two, 0, 0)
    assert figures(one, 1, 0) == expected
