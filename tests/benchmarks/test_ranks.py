import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import ranks
from tests.ddp.ranks import ROOT

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


def test_two_ranks_generate_the_set_of_one_and_every_part_gets_its_figures(tmp_path: Path) -> None:
    arguments = ["--net", "small", "--samples", "24", "--batch-size", "6", "--num-steps", "2", "--rounds", "1"]
    files = ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, "-m", "tests.benchmarks.ranks", *arguments, *files]
    # A process of its own: autograd's threads, which other tests leave, do not survive the forks.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert found["settings"]["net"] == "small"
    assert list(found["ranks"]) == ["1", "2"]
    (one, labels), (two, labels_of_two) = (arrays(tmp_path / f"ranks-{n}") for n in (1, 2))
    assert one.shape == (24, 16, 16, 3)
    assert len(np.unique(one.reshape(24, -1), axis=0)) == 24
    assert np.array_equal(one, two)
    assert labels.tolist() == labels_of_two.tolist() == [i % 10 for i in range(24)]
    assert found["ranks"]["1"]["sets"] == found["ranks"]["2"]["sets"]
    assert found["ranks"]["1"]["efficiency"] == 1
    first, second = (found["ranks"][n]["seconds"][0] for n in ("1", "2"))
    assert found["ranks"]["2"]["efficiency"] == pytest.approx(first / (2 * second))
    assert found["ranks"]["2"]["samples_per_s"] == pytest.approx(24 / second)
    parts = ["no consumer", "writer", "features", "writer and features", "seeds by 1 loader process"]
    assert list(found["parts"]) == parts
    for row in [*found["ranks"].values(), *found["parts"].values()]:
        assert min(row["seconds"]) > 0
        assert row["cpu_seconds"] > 0
    assert found["parts"]["no consumer"]["cost"] == 0
    assert all(name in done.stdout for name in ("samples/s", "efficiency", *parts))


def test_ranks_get_equally_many_batches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ranks.main(["--samples", "30", "--batch-size", "10", "--ranks", "2"])
    assert "samples must be a multiple of 2 ranks × batch_size 10" in capsys.readouterr().err
