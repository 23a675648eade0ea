"""Chains that go on, on two gloo processes: each has its share of the buffer, and two lives are one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ddp.ranks import run

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_two_ranks_have_shares_of_the_buffer_and_go_on(tmp_path: Path) -> None:
    run("run_dat_continued_chains", tmp_path)

    def kept(name: str, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        return found

    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)["replay_buffer"]
    for rank in (0, 1):
        whole, second, first = kept("whole", rank), kept("second", rank), kept("first", rank)
        assert whole["losses"][3:] == second["losses"]
        for name, value in whole["weights"].items():
            assert torch.equal(second["weights"][name], value), name
        assert torch.equal(second["buffer"].nan_to_num(), whole["buffer"].nan_to_num())
        assert not torch.equal(first["buffer"].nan_to_num(), whole["buffer"].nan_to_num())
        assert torch.equal(saved[rank::2].nan_to_num(), whole["buffer"].nan_to_num())
        # Two places of each class on each rank.
        assert whole["buffer"].shape == (20, 1, 16, 16)
    images = [tuple(image.flatten().tolist()) for image in saved if image.isfinite().all()]
    assert len(set(images)) == len(images) > 30
