"""JEM's replay buffer on two gloo processes: each has its share, a checkpoint the whole."""

from pathlib import Path

import pytest
import torch

from tests.ddp.ranks import run
from tests.keeper import saved_by

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_shares_of_two_ranks_are_saved_as_one_buffer_and_go_on(tmp_path: Path) -> None:
    run("run_jem", tmp_path)
    kept = {(name, rank): saved_by(tmp_path, name, rank) for name in ("whole", "first", "second") for rank in (0, 1)}
    for name in ("whole", "first", "second"):
        shares = [kept[name, rank]["replay_buffer"] for rank in (0, 1)]
        assert [len(share) for share in shares] == [32, 32]
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["replay_buffer"]
        assert torch.equal(saved[0::2], shares[0])
        assert torch.equal(saved[1::2], shares[1])
        assert torch.equal(kept[name, 0]["in_validation"], saved)
        # No two images are the same: ranks climb different ones.
        assert len({tuple(image.flatten().tolist()) for image in saved}) == 64
    for rank in (0, 1):
        whole, second = kept["whole", rank], kept["second", rank]
        assert torch.equal(whole["replay_buffer"], second["replay_buffer"])
        assert all(torch.equal(value, second["weights"][name]) for name, value in whole["weights"].items())
        assert not torch.equal(whole["replay_buffer"], kept["first", rank]["replay_buffer"])
    for name, value in kept["whole", 0]["weights"].items():
        assert torch.equal(value, kept["whole", 1]["weights"][name]), name
