"""Where a save needs all ranks, a signal during validation is answered by all of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.distributed.optim import ZeroRedundancyOptimizer

from dat_lightning.runs.signal_checkpoint import _rank_zero_can_save
from tests.ddp.ranks import run


@pytest.mark.ddp
@pytest.mark.slow
def test_a_signal_in_validation_waits_for_all_ranks(tmp_path: Path) -> None:
    run("run_sharded_save", tmp_path)
    path = tmp_path / "saved" / "interrupted.ckpt"
    expected = {"saves": 1, "batches": 2, "path": str(path), "step": 2}
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)] == [expected, expected]
    assert torch.load(path, weights_only=True)["global_step"] == 2


class Zero(ZeroRedundancyOptimizer):
    def __init__(self) -> None:
        """Without a process group."""


@pytest.mark.parametrize(
    ("strategy", "optimizer", "world_size", "alone"),
    [
        (DDPStrategy, "plain", 2, True),
        (DDPStrategy, "zero", 2, False),
        (FSDPStrategy, "plain", 2, False),
        (FSDPStrategy, "plain", 1, True),
    ],
)
def test_which_saves_are_rank_zeros_alone(strategy: type, optimizer: str, world_size: int, alone: bool) -> None:
    made: Any = Zero() if optimizer == "zero" else torch.optim.SGD([torch.zeros(1)])
    trainer: Any = SimpleNamespace(strategy=strategy(), optimizers=[made], world_size=world_size)
    assert _rank_zero_can_save(trainer) is alone
