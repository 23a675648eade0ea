"""Two gloo processes are one process: training, figures and samples."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ddp.run import BATCH_SIZE, NUM_SAMPLES

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs with one and with two processes, and returns their folders."""
    folders = {}
    for devices in (1, 2):
        folder = tmp_path_factory.mktemp(f"devices{devices}")
        command = [sys.executable, "-m", "tests.ddp.run", str(devices), str(folder)]
        # As many threads in each: how a sum is split over threads changes its last bits.
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
        assert run.returncode == 0, run.stderr[-3000:]
        folders[devices] = folder
    return folders


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_training_is_the_same(runs: dict[int, Path]) -> None:
    one, two = (load(runs[n] / "state.pt") for n in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not name.startswith("curriculum.values"):  # AUCs within a rank differ from those over the batch
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert int(two["curriculum.num_steps"]) == 3  # six steps, a window of two


@pytest.mark.parametrize(("moment", "tolerance"), [("before", 1e-6), ("after", 2e-3)])
def test_figures_are_the_same(moment: str, tolerance: float, runs: dict[int, Path]) -> None:
    """With the same weights to float precision; after training apart, within what that adds."""
    one, two = (json.loads((runs[n] / "figures.json").read_text())[moment] for n in (1, 2))
    assert one.keys() == two.keys()
    assert {"test/accuracy", "test/robust_accuracy", "test/fid", "test/energy", "test/r1"} <= one.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=tolerance), name


@pytest.mark.parametrize(("moment", "tolerance"), [("before", 0.0), ("after", 1e-3)])
def test_every_sample_is_generated_once_and_the_same(moment: str, tolerance: float, runs: dict[int, Path]) -> None:
    """Bit for bit with the same weights; after training apart, within what that adds."""
    one = load(runs[1] / moment / "samples-0.pt")
    parts = [load(runs[2] / moment / f"samples-{rank}.pt") for rank in (0, 1)]
    assert sorted([*parts[0], *parts[1]]) == list(range(NUM_SAMPLES)) == sorted(one)
    # Whole batches are dealt in turn, so they are composed alike.
    assert sorted(parts[1]) == [i for i in range(NUM_SAMPLES) if (i // BATCH_SIZE) % 2 == 1]
    for part in parts:
        for index, image in part.items():
            torch.testing.assert_close(image, one[index], rtol=0, atol=tolerance)


def test_files_are_the_same(runs: dict[int, Path]) -> None:
    arrays = []
    for folder in runs.values():
        with np.load(folder / "written" / "samples.npz") as file:
            arrays.append((file["arr_0"].astype(int), file["arr_1"]))
        assert len(list((folder / "written" / "png").rglob("*.png"))) == NUM_SAMPLES
        assert len(list((folder / "grids").glob("test_*.png"))) == 4  # two tests of two step counts
    assert np.abs(arrays[0][0] - arrays[1][0]).max() <= 1
    assert arrays[0][1].tolist() == arrays[1][1].tolist() == [i % 10 for i in range(NUM_SAMPLES)]
