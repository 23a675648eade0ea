"""Which checkpoint --ckpt_path means: a file, the newest whole one of a folder or of the run, or none yet."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dat_lightning import EnergyModel, EnergyModule, SmallResNet, TradesModule
from dat_lightning.runs import AtomicCheckpointIO
from dat_lightning.runs.resume import SameCheckpoint, find_checkpoint, protect
from dat_lightning.weights import changed_settings
from tests import tiny


def save(path: Path, step: int, stage: int = 1, whole: bool = True, written: int | None = None, **more: Any) -> None:
    """Writes a checkpoint of a run; by default the one with more steps is written later."""
    module = tiny.stage1() if stage == 1 else tiny.stage2()
    contents = {
        "pytorch-lightning_version": "2.6.0",
        "global_step": step,
        "state_dict": module.state_dict(),
        "loops": {"fit_loop": {"epoch_progress": {}, "epoch_loop.batch_progress": {}}},
        "optimizer_states": [],
        "lr_schedulers": [],
        **more,
    }
    AtomicCheckpointIO().save_checkpoint(contents, path)
    if not whole:
        path.write_bytes(path.read_bytes()[:-500])
    os.utime(path, (1000 + (step if written is None else written),) * 2)


def find(
    given: str | None,
    root: Path,
    to_train: bool = True,
    module: EnergyModule | None = None,
    **trainer: Any,
) -> str | None:
    saver = ModelCheckpoint(dirpath=root / "saved")
    made = tiny.trainer(root, [saver], enable_checkpointing=True, **trainer)
    return find_checkpoint(given, made, tiny.stage1() if module is None else module, to_train)


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
    with (
        pytest.warns(UserWarning, match=r"last: passed over: .*/hpc_ckpt_4\.ckpt is not a readable checkpoint: "),
        pytest.warns(UserWarning, match=r"other\.ckpt is newer, but cannot be used; .* goes on from .*interrupted"),
    ):
        assert find("last", tmp_path) == str(tmp_path / "interrupted.ckpt")


@pytest.mark.parametrize("to_train", [True, False])
def test_best_is_a_sentence_because_this_process_has_not_trained(to_train: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--ckpt_path best: only the process .*; name the file, or use last$"):
        find("best", tmp_path, to_train=to_train)
    save(tmp_path / "saved" / "fid.ckpt", 1)
    with pytest.raises(ValueError, match=r"name the file, such as .*/saved/fid\.ckpt, or use last$"):
        find("best", tmp_path, to_train=to_train)


def test_hpc_is_a_sentence_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--ckpt_path hpc: there is no hpc_ckpt_<n>\.ckpt in "):
        find("hpc", tmp_path)
    save(tmp_path / "hpc_ckpt_1.ckpt", 1)
    assert find("hpc", tmp_path) == "hpc"


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


def test_where_nothing_is_there_to_evaluate_last_is_an_error(tmp_path: Path) -> None:
    """Training starts anew; figures of random weights would look like those of the run."""
    said = r"--ckpt_path last: there is no checkpoint of this run in .*/saved, .*; name a file$"
    with pytest.raises(ValueError, match=said):
        find("last", tmp_path, to_train=False)


def stamped(kind: str, run: str | None = None) -> dict[str, Any]:
    return {"dat_lightning": {"format": 1, "version": "1", "module": kind, "run": run}}


@pytest.mark.parametrize("older", [False, True])
def test_a_module_of_another_class_with_the_same_names_is_not_this_run(older: bool, tmp_path: Path) -> None:
    kind = "dat_lightning.RobustClassifierModule"
    more = {"hyper_parameters": {"_class_path": kind}} if older else stamped(kind)
    path = tmp_path / "saved" / "a.ckpt"
    save(path, 1, **more)
    trades = TradesModule(energy_model=tiny.energy_model(), optimizer=tiny.SGD, threat_model=tiny.ATTACK)
    assert trades.state_dict().keys() == tiny.stage1().state_dict().keys()
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* is a whole one of a TradesModule"):
        find("last", tmp_path, module=trades)
    said = r"another kind .* than TradesModule: it is one of a dat_lightning\.RobustClassifierModule; for its weights"
    with pytest.raises(ValueError, match=said):
        find(str(path), tmp_path, module=trades)
    # Its weights can be evaluated as those of any module, and a class may move.
    assert find(str(path), tmp_path, module=trades, to_train=False) == str(path)
    assert find("last", tmp_path) == str(path)


def test_the_class_is_compared_when_training_loads_a_checkpoint_too(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    trainer.save_checkpoint(path)
    written = torch.load(path, weights_only=True)["dat_lightning"]
    assert written["module"] == "dat_lightning.modules.robust_classifier.RobustClassifierModule"
    trades = TradesModule(energy_model=tiny.energy_model(), optimizer=tiny.SGD, threat_model=tiny.ATTACK)
    with pytest.raises(
        ValueError, match=r"one of a .*RobustClassifierModule, from which a .*TradesModule cannot go on"
    ):
        tiny.trainer(tmp_path, max_steps=2).fit(trades, datamodule=tiny.digits(), ckpt_path=path, weights_only=True)
    tiny.trainer(tmp_path).validate(trades, datamodule=tiny.digits(), ckpt_path=path, weights_only=True, verbose=False)
    # The run keeps its name in its second life; a new one has another.
    names = []
    for given in (path, None):
        trainer = tiny.trainer(tmp_path, max_steps=2)
        trainer.fit(tiny.stage1(), datamodule=tiny.digits(), ckpt_path=given, weights_only=True)
        trainer.save_checkpoint(tmp_path / "b.ckpt")
        names.append(torch.load(tmp_path / "b.ckpt", weights_only=True)["dat_lightning"]["run"])
    assert names[0] == written["run"] != names[1]
    assert all(names)


def settings(**more: Any) -> dict[str, Any]:
    """In the form in which the command line stores them."""
    rate = {"class_path": "torch.optim.SGD", "init_args": {"lr": more.pop("lr", 0.1)}}
    backbone = {"class_path": "dat_lightning.SmallResNet", "init_args": {"widths": [4, 8]}}
    network = {"class_path": "dat_lightning.EnergyModel", "init_args": {"backbone": backbone}}
    return {
        "_class_path": "dat_lightning.RobustClassifierModule",
        "energy_model": network,
        "optimizer": rate,
        "seed": 0,
        **more,
    }


def test_settings_that_differ_are_named_as_on_the_command_line() -> None:
    old = {"hyper_parameters": settings(execution={"compile": False, "attack_precision": None}, curriculum=None)}
    faster = settings(execution={"compile": True, "attack_precision": None}, curriculum=None)
    assert changed_settings(old, faster) == []
    faster["execution"]["attack_precision"] = "bfloat16"
    assert changed_settings(old, faster) == ["execution.attack_precision: None → bfloat16"]
    assert changed_settings(old, {}) == []
    assert changed_settings({}, settings()) == []
    new = settings(lr=0.01, curriculum={"class_path": "dat_lightning.AUCCurriculum"}, added=3)
    new["energy_model"]["init_args"]["backbone"]["init_args"]["widths"] = (4, 16)
    assert changed_settings(old, new) == [
        "energy_model.backbone.widths: [4, 8] → [4, 16]",
        "optimizer.lr: 0.1 → 0.01",
        "curriculum: None → {'class_path': 'dat_lightning.AUCCurriculum'}",
        "added: None → 3",
    ]
    new["energy_model"]["init_args"]["backbone"] = {"class_path": "a.Net", "init_args": {"depth": 3}}
    assert changed_settings(old, new)[0] == "energy_model.backbone.class_path: dat_lightning.SmallResNet → a.Net"


def test_other_settings_are_said_and_the_same_come_first(tmp_path: Path) -> None:
    own, other = tmp_path / "saved" / "own.ckpt", tmp_path / "saved" / "other.ckpt"
    save(other, 5, hyper_parameters=settings(lr=0.2))
    module = tiny.stage1()
    module.save_hyperparameters(settings())
    with pytest.warns(UserWarning, match=r"other\.ckpt was trained with other settings.*: optimizer\.lr: 0\.2 → 0\.1$"):
        assert find("last", tmp_path, module=module) == str(other)
    with pytest.warns(UserWarning, match=r"other\.ckpt was trained with other settings"):
        find(str(other), tmp_path, module=module)
    assert find("last", tmp_path, module=module, to_train=False) == str(other)
    save(own, 2, hyper_parameters=settings())
    with pytest.warns(UserWarning, match=r"other\.ckpt is newer, but has other settings of the module than this run"):
        assert find("last", tmp_path, module=module) == str(own)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_steps": 6, "max_epochs": -1}, r"step 6 of trainer\.max_steps=6"),
        ({"max_epochs": 2}, r"epoch 2 of trainer\.max_epochs=2"),
        ({"max_steps": 7, "max_epochs": -1}, None),
        ({"max_epochs": 3}, None),
    ],
)
def test_a_run_that_is_done_is_said_to_be(limits: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    """As Lightning counts: two epochs of three steps."""
    saver = ModelCheckpoint(
        dirpath=tmp_path / "saved", filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    done = tiny.trainer(tmp_path, [saver], enable_checkpointing=True, max_epochs=2, limit_train_batches=3)
    done.fit(tiny.stage1(), datamodule=tiny.digits())
    if said is None:
        assert find("last", tmp_path, **limits) == str(tmp_path / "saved" / "last.ckpt")  # warnings are errors
        return
    with pytest.warns(
        UserWarning, match=rf"training is done, there is nothing to do: .*last\.ckpt is at {said}; raise"
    ):
        find("last", tmp_path, **limits)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("logger", [TensorBoardLogger, CSVLogger, None])
def test_checkpoints_where_lightning_puts_them_are_found(logger: Any, tmp_path: Path) -> None:
    """A ModelCheckpoint without a folder takes that of the logger, which is a new one in each life."""

    def trainer(steps: int) -> Trainer:
        made = False if logger is None else logger(tmp_path / "logs", name="mine")
        parts: dict[str, Any] = {"enable_checkpointing": True, "logger": made, "max_epochs": -1, "max_steps": steps}
        return tiny.trainer(tmp_path, [ModelCheckpoint(filename="a", every_n_train_steps=2)], **parts)

    assert find_checkpoint("last", trainer(2), tiny.stage1(), to_train=True) is None
    for steps in (2, 4):
        made = trainer(steps)
        found = find_checkpoint("last", made, tiny.stage1(), to_train=True)
        assert (found is None) == (steps == 2)
        made.fit(tiny.stage1(), datamodule=tiny.digits(), ckpt_path=found, weights_only=True)
    found = find_checkpoint("last", trainer(6), tiny.stage1(), to_train=True)
    assert found is not None
    assert torch.load(found, weights_only=True)["global_step"] == 4
    where = tmp_path / "checkpoints" if logger is None else tmp_path / "logs" / "mine" / "version_1" / "checkpoints"
    assert Path(found).parent == where


def test_a_network_of_other_sizes_is_a_sentence_and_passed_over(tmp_path: Path) -> None:
    wide = tiny.stage1(energy_model=EnergyModel(SmallResNet(widths=(4, 16)), mean=[0.3], std=[0.35]))
    path = tmp_path / "saved" / "wide.ckpt"
    save(path, 2, state_dict=wide.state_dict())
    name = next(n for n, v in tiny.stage1().state_dict().items() if v.shape != wide.state_dict()[n].shape)
    there, here = ("×".join(map(str, m.state_dict()[name].shape)) for m in (wide, tiny.stage1()))
    with pytest.raises(
        ValueError, match=rf"than RobustClassifierModule: {name} has the shape {there}, not {here}; for"
    ):
        find(str(path), tmp_path)
    save(tmp_path / "saved" / "own.ckpt", 1)
    with pytest.warns(UserWarning, match=r"wide\.ckpt is newer, but cannot be used"):
        assert find("last", tmp_path) == str(tmp_path / "saved" / "own.ckpt")


def test_steps_count_within_a_run_and_the_time_of_writing_between_runs(tmp_path: Path) -> None:
    """Copies have other times, and a run that starts anew in the folder of an earlier one has fewer steps."""
    kind = "dat_lightning.RobustClassifierModule"
    save(tmp_path / "saved" / "a.ckpt", 4, written=1, **stamped(kind, "first"))
    save(tmp_path / "saved" / "b.ckpt", 2, written=2, **stamped(kind, "first"))
    with pytest.warns(
        UserWarning, match=r"b\.ckpt is newer, but has fewer steps \(2\); the run goes on from .*a\.ckpt"
    ):
        assert find("last", tmp_path) == str(tmp_path / "saved" / "a.ckpt")
    save(tmp_path / "hpc_ckpt_1.ckpt", 4, written=3, **stamped(kind, "first"))
    assert find("last", tmp_path) == str(tmp_path / "hpc_ckpt_1.ckpt")  # of two with as many steps the later one
    save(tmp_path / "saved" / "c.ckpt", 1, written=4, **stamped(kind, "second"))
    assert find("last", tmp_path) == str(tmp_path / "saved" / "c.ckpt")


def test_a_sharded_checkpoint_is_left_to_lightning(tmp_path: Path) -> None:
    for name in (".metadata", "latest"):
        folder = tmp_path / name.strip(".") / "step=3.ckpt"
        folder.mkdir(parents=True)
        (folder / name).touch()
        assert find(str(folder), tmp_path) == str(folder)


def test_a_bit_that_flips_between_search_and_loading_is_found(tmp_path: Path) -> None:
    path, io = tmp_path / "saved" / "a.ckpt", AtomicCheckpointIO()
    save(path, 1)
    find("last", tmp_path)
    data = bytearray(path.read_bytes())
    data[data.find(tiny.stage1().state_dict()["energy_model.mean"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        io.load_checkpoint(path)


@pytest.mark.parametrize(("other", "said"), [(("a.ckpt", 20), r"a\.ckpt \(step 20\)"), ((None, 0), "no checkpoint")])
def test_ranks_that_found_different_checkpoints_do_not_train(
    other: tuple[str | None, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    trainer.save_checkpoint(path)
    second: list[tuple[str | None, int]] = [("a.ckpt", 1)]

    def gather(chosen: list[Any], own: tuple[str | None, int]) -> None:
        chosen[:] = [own, *second]

    class Compared(SameCheckpoint):
        def on_fit_start(self, *args: Any) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(torch.distributed, "is_initialized", lambda: True)
                patch.setattr(torch.distributed, "get_world_size", lambda: 2)
                patch.setattr(torch.distributed, "all_gather_object", gather)
                super().on_fit_start(*args)

    def train() -> None:
        trainer = tiny.trainer(tmp_path, [Compared()], max_steps=2)
        trainer.fit(tiny.stage1(), datamodule=tiny.digits(), ckpt_path=path, weights_only=True)

    train()
    second[:] = [other]
    with pytest.raises(ValueError, match=rf"rank 1 goes on from {said}, rank 0 from a\.ckpt \(step 1\): all processes"):
        train()


def test_a_protected_trainer_compares_checkpoints_over_the_ranks(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    protect(trainer)
    protect(trainer)
    assert sum(isinstance(c, SameCheckpoint) for c in trainer.callbacks) == 1  # type: ignore[attr-defined]
