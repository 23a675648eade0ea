"""Thrifty DAT on two gloo processes: attacks go on as in one process, and each has its share of the buffer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ddp.ranks import run

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_two_ranks_train_as_one_and_go_on_as_two(tmp_path: Path) -> None:
    run("run_thrifty", tmp_path)

    def kept(name: str, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        return found

    one = kept("one", 0)
    assert int(one["perturbations"].flatten(1).any(1).sum()) == 437
    for rank in (0, 1):
        two = kept("two", rank)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
        torch.testing.assert_close(two["perturbations"], one["perturbations"], rtol=0, atol=1e-8)
        for name, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], value, rtol=1e-7, atol=1e-9, msg=name)

        whole, second, first = kept("whole", rank), kept("second", rank), kept("first", rank)
        assert whole["losses"][5:] == second["losses"]
        for name, value in whole["weights"].items():
            assert torch.equal(second["weights"][name], value), name
        for name in ("buffer", "perturbations"):
            assert torch.equal(second[name].nan_to_num(), whole[name].nan_to_num())
            assert not torch.equal(first[name].nan_to_num(), whole[name].nan_to_num())
        saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)
        assert torch.equal(saved["replay_buffer"][rank::2].nan_to_num(), whole["buffer"].nan_to_num())
        # Two places of each class on each rank.
        assert whole["buffer"].shape == (20, 1, 16, 16)
    shares = [kept("whole", rank)["buffer"] for rank in (0, 1)]
    images = [tuple(image.flatten().tolist()) for share in shares for image in share if image.isfinite().all()]
    assert len(set(images)) == len(images) > 30
