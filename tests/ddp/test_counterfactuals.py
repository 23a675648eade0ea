"""Counterfactuals and memorisation: the figures and pictures of two and four processes are those of one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.ddp.ranks import run
from tests.ddp.uneven import NUM_TEST

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes → folder of its run."""
    folder = tmp_path_factory.mktemp("runs")
    run("run_counterfactuals", folder)
    return {num_ranks: folder / str(num_ranks) for num_ranks in (1, 4)}


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


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [4])
def test_every_rank_has_the_figures_of_one_process(num_ranks: int, runs: dict[int, Path]) -> None:
    one = json.loads((runs[1] / "figures-0.json").read_text())
    assert len(one) == 2 * 7 + 2 * 3
    assert {figure["num_samples"] for figure in one if "_l2_" in figure["name"]} == {NUM_TEST}
    assert any(figure["details"].get("flagged") for figure in one)
    for rank in range(num_ranks):
        several = json.loads((runs[num_ranks] / f"figures-{rank}.json").read_text())
        for a, b in zip(one, several, strict=True):
            assert same(a, b), f"{a}\n{b}"


@pytest.mark.slow
def test_the_same_images_are_shown(runs: dict[int, Path]) -> None:
    names = [sorted(path.name for path in (folder / "pictures").iterdir()) for folder in runs.values()]
    assert names[0] == names[1]
    assert len(names[0]) == 3
    for name in names[0]:
        pixels = []
        for folder in runs.values():
            with Image.open(folder / "pictures" / name) as picture:
                pixels.append(np.asarray(picture).astype(int))
        # A level more or less for rounding, on a few pixels.
        assert max(np.abs(pixels[0] - other).max() for other in pixels[1:]) <= 2
