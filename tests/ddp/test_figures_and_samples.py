"""Two and four gloo processes are one process: figures from shares of unequal size, samples and files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ddp.ranks import run
from tests.ddp.run import BATCH_SIZE, NUM_SAMPLES
from tests.ddp.uneven import NUM_TEST

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes → folder of its run."""
    folder = tmp_path_factory.mktemp("runs")
    run("run", folder)
    return {num_ranks: folder / str(num_ranks) for num_ranks in (1, 2, 4)}


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("moment", "tolerance"), [("before", 1e-6), ("after", 2e-3)])
def test_figures_are_the_same(moment: str, tolerance: float, num_ranks: int, runs: dict[int, Path]) -> None:
    """With the same weights to float precision; after training apart, within what that adds."""
    one, several = (json.loads((runs[n] / "figures.json").read_text())[moment] for n in (1, num_ranks))
    assert one.keys() == several.keys()
    assert {"test/accuracy", "test/robust_accuracy", "test/fid", "test/energy", "test/r1"} <= one.keys()
    # A mean over exactly the images that there are, each once.
    assert one["test/accuracy"] * NUM_TEST == pytest.approx(round(one["test/accuracy"] * NUM_TEST), abs=1e-3)
    for name, value in one.items():
        assert several[name] == pytest.approx(value, rel=tolerance), name


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("moment", "tolerance"), [("before", 0.0), ("after", 1e-3)])
def test_every_sample_is_generated_once_and_the_same(
    moment: str, tolerance: float, num_ranks: int, runs: dict[int, Path]
) -> None:
    """Bit for bit with the same weights; after training apart, within what that adds."""
    one = load(runs[1] / moment / "samples-0.pt")
    parts = [load(runs[num_ranks] / moment / f"samples-{rank}.pt") for rank in range(num_ranks)]
    assert sorted(index for part in parts for index in part) == list(range(NUM_SAMPLES)) == sorted(one)
    # Whole batches are dealt in turn, so they are composed alike.
    for rank, part in enumerate(parts):
        assert sorted(part) == [i for i in range(NUM_SAMPLES) if (i // BATCH_SIZE) % num_ranks == rank]
        for index, image in part.items():
            torch.testing.assert_close(image, one[index], rtol=0, atol=tolerance)


def test_files_are_the_same(runs: dict[int, Path]) -> None:
    arrays = []
    for folder in runs.values():
        with np.load(folder / "written" / "samples.npz") as file:
            arrays.append((file["arr_0"].astype(int), file["arr_1"]))
        assert len(list((folder / "written" / "png").rglob("*.png"))) == NUM_SAMPLES
        assert len(list((folder / "grids").glob("test_*.png"))) == 4  # two tests of two step counts
    for images, labels in arrays:
        assert np.abs(arrays[0][0] - images).max() <= 1
        assert labels.tolist() == [i % 10 for i in range(NUM_SAMPLES)]


def test_fewer_images_than_ranks_are_refused_on_every_rank(runs: dict[int, Path]) -> None:
    for rank in range(4):
        message = (runs[4] / f"too_few-{rank}.txt").read_text()
        assert message == "3 examples cannot be shared by 4 processes; use fewer processes"
