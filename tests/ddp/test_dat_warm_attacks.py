"""Warm attacks on two gloo processes: they go on as in one process, and in two lives as in one."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.ddp.ranks import run
from tests.keeper import saved_by

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_two_ranks_train_as_one_and_go_on_as_two(tmp_path: Path) -> None:
    run("run_dat_warm_attacks", tmp_path)
    kept = partial(saved_by, tmp_path)

    one = kept("one", 0)
    assert int(one["perturbations"].flatten(1).any(1).sum()) == 437
    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)["perturbations"]
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
        assert torch.equal(second["perturbations"], whole["perturbations"])
        assert torch.equal(saved, whole["perturbations"])
        assert not torch.equal(first["perturbations"], whole["perturbations"])
