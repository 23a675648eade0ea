"""Another number of processes goes on where generation was interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ddp.ranks import run

pytestmark = pytest.mark.ddp


@pytest.mark.slow
def test_four_processes_finish_what_two_began(tmp_path: Path) -> None:
    run("run_interrupted", tmp_path)

    def begun(num_ranks: int) -> list[Any]:
        return [json.loads((tmp_path / f"begun-{num_ranks}-{r}.json").read_text()) for r in range(num_ranks)]

    # Three batches: two ranks lost power with one each, and of four ranks one has nothing to do.
    assert begun(2) == [[0], [10]]
    assert begun(4) == [[], [], [20], []]
    assert begun(1) == [[0, 10, 20]]
    whole = torch.load(tmp_path / "samples-1-0.pt", weights_only=True)
    parts = [torch.load(tmp_path / f"samples-4-{rank}.pt", weights_only=True) for rank in range(4)]
    assert [sorted(part) for part in parts] == [list(range(10)), list(range(10, 20)), list(range(20, 25)), []]
    assert all(torch.equal(image, whole[index]) for part in parts for index, image in part.items())
    assert list((tmp_path / "kept").iterdir()) == []
