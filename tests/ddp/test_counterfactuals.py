"""Counterfactuals and memorisation: the figures and pictures of two processes are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.ddp import run_counterfactuals

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of runs with one and with two processes."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    run_counterfactuals.main(1, one)
    command = [sys.executable, "-m", "tests.ddp.run_counterfactuals", "2", str(two)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two


def same(a: Any, b: Any) -> bool:
    """Equal but for float noise, and for the folder that files lie in."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return bool(b == pytest.approx(a, rel=2e-3, abs=1e-6))
    if isinstance(a, str) and a.endswith(".png"):
        return Path(a).name == Path(b).name
    return bool(a == b)


def test_every_rank_has_the_figures_of_one_process(runs: tuple[Path, Path]) -> None:
    one = json.loads((runs[0] / "figures-0.json").read_text())
    assert len(one) == 2 * 7 + 2
    assert {figure["num_samples"] for figure in one if "_l2_" in figure["name"]} == {360}
    assert any(figure["details"].get("flagged") for figure in one)
    for rank in (0, 1):
        two = json.loads((runs[1] / f"figures-{rank}.json").read_text())
        for a, b in zip(one, two, strict=True):
            assert same(a, b), f"{a}\n{b}"


def test_the_same_images_are_shown(runs: tuple[Path, Path]) -> None:
    names = [sorted(path.name for path in (folder / "pictures").iterdir()) for folder in runs]
    assert names[0] == names[1]
    assert len(names[0]) == 3
    for name in names[0]:
        pixels = []
        for folder in runs:
            with Image.open(folder / "pictures" / name) as picture:
                pixels.append(np.asarray(picture).astype(int))
        # A level more or less for rounding, on a few pixels.
        assert np.abs(pixels[0] - pixels[1]).max() <= 2
