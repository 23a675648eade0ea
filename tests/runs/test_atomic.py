"""Checkpoints are written whole or not at all, and what is damaged is named, with the newest whole one beside it."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

from dat_lightning.runs import (
    AtomicCheckpointIO,
    DamagedCheckpointError,
    Requirements,
    newest_whole,
    read_run_checkpoint,
)
from dat_lightning.runs.resume import protect
from dat_lightning.weights.stamp import FORMAT
from tests import tiny


def contents(step: int, **more: Any) -> dict[str, Any]:
    """What a checkpoint of a run has at least."""
    return {
        "pytorch-lightning_version": "2.6.0",
        "global_step": step,
        "state_dict": {"weight": torch.full((50,), float(step))},
        "loops": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        **more,
    }


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


class FullDiskError(OSError):
    pass


@pytest.mark.parametrize("where", ["save", "fsync"])
def test_a_failed_save_leaves_the_previous_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint(contents(1), path)

    def fails(*args: Any) -> None:
        if where == "save":
            args[1].write(b"half of it")
        raise FullDiskError

    monkeypatch.setattr(torch if where == "save" else os, where, fails)
    with pytest.raises(FullDiskError):
        io.save_checkpoint(contents(2), path)
    assert step_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the file that becomes it lies beside it: a move from another file system would be a copy."""
    path, seen = tmp_path / "last.ckpt", []
    fsync, replace = os.fsync, Path.replace

    def spy_on_disk(handle: int) -> None:
        seen.append(path.exists())
        fsync(handle)

    def spy_on_name(old: Path, new: Path) -> Path:
        seen.append(old.parent == new.parent)
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", spy_on_disk)
    monkeypatch.setattr(Path, "replace", spy_on_name)
    AtomicCheckpointIO().save_checkpoint(contents(1), path)
    assert seen == [False, True]
    assert step_of(path) == 1


def test_what_a_crash_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / name for name in ("tmpabcd1234.tmp", "tmpabcd5678.tmp", "tmp-notes.tmp"))
    for path in (old, young, foreign):
        path.write_bytes(b"half of a checkpoint")
    for path in (old, foreign):
        os.utime(path, (time.time() - 700,) * 2)
    AtomicCheckpointIO().save_checkpoint(contents(1), tmp_path / "last.ckpt")
    assert not old.exists()
    assert young.exists()
    assert foreign.exists()


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        del data[len(data) // 2 :]
    elif kind == "flipped":
        place = data.find(torch.full((2,), 3.0).numpy().tobytes())
        assert place > 0
        data[place + 30] ^= 1
    else:
        data[:] = b"" if kind == "empty" else b"no checkpoint, but a text"
    path.write_bytes(data)


@pytest.mark.parametrize("weights_only", [True, False, None])
@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_offered(
    kind: str, weights_only: bool | None, tmp_path: Path
) -> None:
    io = AtomicCheckpointIO()
    for step, name in enumerate(("best", "recent", "last"), 1):
        io.save_checkpoint(contents(step), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (1000 + step,) * 2)
    damage(tmp_path / "last.ckpt", kind)
    with pytest.raises(DamagedCheckpointError) as error:
        io.load_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'last.ckpt'} is not a readable checkpoint: it is ")
    assert said.endswith(f"; the newest whole one is {tmp_path / 'recent.ckpt'}")
    damage(tmp_path / "recent.ckpt", "truncated")
    assert newest_whole(tmp_path.glob("*.ckpt")) == tmp_path / "best.ckpt"
    assert io.load_checkpoint(tmp_path / "best.ckpt", weights_only=weights_only)["global_step"] == 1
    damage(tmp_path / "best.ckpt", "empty")
    with pytest.raises(DamagedCheckpointError, match=r"no other checkpoint in .* is whole$"):
        io.load_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)


def test_a_part_that_is_marked_as_a_folder_is_damage(tmp_path: Path) -> None:
    """One bit in the archive's directory, with all checksums right: torch would give numbers that are not there."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(contents(3), path)
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02", 0, data.rfind(b"/data/0"))
    data[entry + 38] |= 0x10
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=r"it is damaged, in its part \S+/data/0;"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_what_training_cannot_go_on_from_is_not_offered(tmp_path: Path) -> None:
    whole, other, weights = (tmp_path / name for name in ("a.ckpt", "b.ckpt", "c.ckpt"))
    torch.save(contents(1), whole)
    torch.save(contents(2, state_dict={"another": torch.zeros(1)}), other)
    alone = {"pytorch-lightning_version": "2.6.0", "global_step": 3, "state_dict": {"weight": torch.zeros(50)}}
    torch.save(alone, weights)
    for k, path in enumerate((whole, other, weights)):
        os.utime(path, (1000 + k,) * 2)
    assert newest_whole([whole, other, weights], Requirements(shapes={"weight": (50,)})) == whole
    assert newest_whole([whole, other, weights]) == other
    assert newest_whole([whole, other, weights], Requirements(shapes={"weight": (50,)}, to_train=False)) == weights


def test_a_file_without_checksums_can_be_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(contents(1), tmp_path / "last.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_run_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1


def test_a_checkpoint_of_a_newer_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    trainer = tiny.trainer(tmp_path)
    trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["dat_lightning"]["format"] == FORMAT
    saved["dat_lightning"] = {"format": FORMAT + 1, "version": "7.0"}
    torch.save(saved, path)
    expected = rf"the checkpoint has format {FORMAT + 1}, of dat_lightning 7\.0; this is version"
    with pytest.raises(ValueError, match=expected):
        tiny.trainer(tmp_path).fit(tiny.stage1(), datamodule=tiny.digits(), ckpt_path=path, weights_only=True)
    with pytest.raises(ValueError, match=expected):
        read_run_checkpoint(path)
    with pytest.raises(ValueError, match=expected):
        tiny.trainer(tmp_path).fit(tiny.stage1(init_from=str(path)), datamodule=tiny.digits())
    del saved["dat_lightning"]  # written before there were stamps
    torch.save(saved, path)
    tiny.trainer(tmp_path).fit(tiny.stage1(), datamodule=tiny.digits(), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("chosen", [None, "async", "own"])
def test_a_trainer_is_protected_once_and_keeps_what_its_user_chose(
    chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(AtomicCheckpointIO):
        pass

    plugins: dict[str | None, Any] = {"async": AsyncCheckpointIO(), "own": Own(), None: None}
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True, save_weights_only=chosen == "own")
    trainer = tiny.trainer(tmp_path, [saver], enable_checkpointing=True, plugins=plugins[chosen])
    protect(trainer)
    protect(trainer)
    names = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert names.count("SignalCheckpoint") == 1
    writers: list[str] = []
    save = AtomicCheckpointIO.save_checkpoint

    def spy(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
        writers.append(type(self).__name__)
        save(self, *args, **kwargs)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", spy)
    trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    assert set(writers) == {"Own" if chosen == "own" else "AtomicCheckpointIO"}
    assert read_run_checkpoint(tmp_path / "saved" / "last.ckpt")["global_step"] == 6
