"""Chains that go on, on two gloo processes: each has its share of the buffer, and two lives are one."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.ddp.ranks import run
from tests.keeper import saved_by

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_two_ranks_have_shares_of_the_buffer_and_go_on(tmp_path: Path) -> None:
    run("run_dat_continued_chains", tmp_path)
    kept = partial(saved_by, tmp_path)

    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)["replay_buffer"]
    for rank in (0, 1):
        whole, second, first = kept("whole", rank), kept("second", rank), kept("first", rank)
        assert whole["losses"][3:] == second["losses"]
        for name, value in whole["weights"].items():
            assert torch.equal(second["weights"][name], value), name
        assert torch.equal(second["replay_buffer"].nan_to_num(), whole["replay_buffer"].nan_to_num())
        assert not torch.equal(first["replay_buffer"].nan_to_num(), whole["replay_buffer"].nan_to_num())
        assert torch.equal(saved[rank::2].nan_to_num(), whole["replay_buffer"].nan_to_num())
        # Two places of each class on each rank.
        assert whole["replay_buffer"].shape == (20, 1, 16, 16)
    images = [tuple(image.flatten().tolist()) for image in saved if image.isfinite().all()]
    assert len(set(images)) == len(images) > 30
