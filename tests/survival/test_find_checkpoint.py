"""Which checkpoint --ckpt_path means: a file, the newest whole one of a folder or of the run, or none yet."""

import os
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint

from dat_lightning.checkpoints import AtomicCheckpointIO
from dat_lightning.resume import find_checkpoint
from tests import tiny


def save(path: Path, step: int, stage: int = 1, whole: bool = True) -> None:
    module = tiny.stage1() if stage == 1 else tiny.stage2()
    contents = {
        "pytorch-lightning_version": "2.6.0",
        "global_step": step,
        "state_dict": module.state_dict(),
        "loops": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    AtomicCheckpointIO().save_checkpoint(contents, path)
    if not whole:
        path.write_bytes(path.read_bytes()[:-500])
    os.utime(path, (1000 + step,) * 2)


def find(given: str | None, root: Path, to_train: bool = True) -> str | None:
    saver = ModelCheckpoint(dirpath=root / "saved")
    trainer = tiny.trainer(root, [saver], enable_checkpointing=True)
    return find_checkpoint(given, trainer, tiny.stage1(), to_train)


def test_without_an_argument_a_run_starts_anew(tmp_path: Path) -> None:
    save(tmp_path / "saved" / "last.ckpt", 1)
    assert find(None, tmp_path) is None


def test_last_is_the_newest_whole_one_of_this_kind_of_run(tmp_path: Path) -> None:
    assert find("last", tmp_path) is None  # there is none yet
    save(tmp_path / "saved" / "best.ckpt", 1)
    save(tmp_path / "saved" / "last.ckpt", 2)
    assert find("last", tmp_path) == str(tmp_path / "saved" / "last.ckpt")
    save(tmp_path / "interrupted.ckpt", 3)
    assert find("last", tmp_path) == str(tmp_path / "interrupted.ckpt")
    save(tmp_path / "hpc_ckpt_4.ckpt", 4, whole=False)
    save(tmp_path / "saved" / "other.ckpt", 5, stage=2)
    save(tmp_path / "unrelated.ckpt", 6)
    with pytest.warns(UserWarning, match=r"other\.ckpt is newer, but cannot be used; .* goes on from .*interrupted"):
        assert find("last", tmp_path) == str(tmp_path / "interrupted.ckpt")


def test_last_does_not_start_anew_where_nothing_is_whole(tmp_path: Path) -> None:
    save(tmp_path / "saved" / "last.ckpt", 1, whole=False)
    save(tmp_path / "saved" / "best.ckpt", 2, stage=2)
    with pytest.raises(ValueError, match=r"--ckpt_path last: none of the 2 checkpoints in .*/saved is a whole one"):
        find("last", tmp_path)


def test_a_folder_is_the_newest_whole_one_in_it(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.ckpt", 2)
    save(tmp_path / "a" / "y.ckpt", 1)
    assert find(str(tmp_path / "a"), tmp_path) == str(tmp_path / "a" / "x.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"none of the 0 checkpoints in .*/empty"):
        find(str(tmp_path / "empty"), tmp_path)


def test_a_damaged_file_is_an_error_that_names_the_newest_whole_one(tmp_path: Path) -> None:
    save(tmp_path / "saved" / "a.ckpt", 1)
    save(tmp_path / "saved" / "b.ckpt", 2, stage=2)
    save(tmp_path / "saved" / "last.ckpt", 3, whole=False)
    said = r"last\.ckpt is not a readable checkpoint: .*; the newest whole one is .*/a\.ckpt$"
    with pytest.raises(ValueError, match=said):
        find(str(tmp_path / "saved" / "last.ckpt"), tmp_path)


def test_weights_alone_can_be_tested_but_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": tiny.stage1().state_dict()}, path)
    assert find(str(path), tmp_path, to_train=False) == str(path)
    with pytest.raises(ValueError, match=r"has weights alone.*; for its weights alone use --model\.init_from"):
        find(str(path), tmp_path)


def test_a_requeued_job_takes_the_newest_not_the_one_of_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "hpc_ckpt_1.ckpt", 1)
    save(tmp_path / "saved" / "last.ckpt", 2)
    assert find(None, tmp_path) is None
    module, trainer = (
        tiny.stage1(),
        tiny.trainer(tmp_path, [ModelCheckpoint(dirpath=tmp_path / "saved")], enable_checkpointing=True),
    )
    monkeypatch.setattr(SLURMEnvironment, "detect", lambda: True)
    assert find_checkpoint(None, trainer, module, to_train=True) == str(tmp_path / "saved" / "last.ckpt")
