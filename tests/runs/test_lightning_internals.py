"""What the package takes from Lightning beyond its public interface is there, and is in one file."""

import ast
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import AsyncCheckpointIO

import dat_lightning
from dat_lightning.runs import AtomicCheckpointIO, lightning_internals
from tests import tiny

PACKAGE = Path(dat_lightning.__file__).parent
# (where it is found, its name, who needs it)
TAKEN = [
    ("trainer", "_checkpoint_connector.dump_checkpoint", "runs/lightning_internals.py"),
    ("trainer", "_checkpoint_connector.hpc_save_path", "runs/lightning_internals.py"),
    ("trainer", "_checkpoint_connector.restore_model", "runs/lightning_internals.py, which overrides it"),
    ("trainer", "_checkpoint_connector.restore_datamodule", "runs/lightning_internals.py, which overrides it"),
    ("trainer", "_checkpoint_connector.restore_callbacks", "runs/lightning_internals.py, which overrides it"),
    ("trainer", "_checkpoint_connector.restore_training_state", "runs/lightning_internals.py, which overrides it"),
    ("trainer", "_accelerator_connector.cluster_environment", "runs/lightning_internals.py"),
    ("trainer", "fit_loop.epoch_loop._batches_that_stepped", "runs/lightning_internals.py"),
    ("trainer", "fit_loop.epoch_loop._should_check_val_fx", "runs/lightning_internals.py"),
    ("trainer", "fit_loop._data_fetcher", "runs/lightning_internals.py"),
    ("trainer", "_val_check_time_interval", "runs/lightning_internals.py"),
    ("trainer", "strategy._checkpoint_io", "runs/lightning_internals.py"),
    ("saver", "_enable_version_counter", "runs/lightning_internals.py"),
    ("io", "_base_checkpoint_io_configured", "runs/lightning_internals.py, by the setter of _WrappingCheckpointIO"),
    ("averaging", "_average_model", "training/ema.py, which inherits it"),
    ("averaging", "_latest_update_step", "training/ema.py, which inherits it"),
    ("averaging", "_swap_models", "training/ema.py, which inherits it"),
    ("averaging", "_copy_average_to_current", "training/ema.py, which inherits it"),
    ("cli", "_parse_ckpt_path", "cli.py, which overrides it"),
    ("cli", "_add_subcommands", "cli.py, which overrides it"),
    ("cli", "_dump_config", "cli.py, which calls it"),
]


@pytest.mark.parametrize(("where", "name", "user"), TAKEN)
def test_lightning_still_has_what_we_take_from_it(where: str, name: str, user: str, tmp_path: Path) -> None:
    owners = {
        "trainer": tiny.trainer(tmp_path),
        "saver": ModelCheckpoint(),
        "io": AsyncCheckpointIO(),
        "averaging": WeightAveraging(),
        "cli": LightningCLI,
    }
    found: Any = owners[where]
    for part in name.split("."):
        assert hasattr(found, part), f"Lightning has moved {name} of its {where}; {user} needs it"
        found = getattr(found, part)


def private_names(path: Path) -> list[tuple[str, str]]:
    """(owner, name) of every private attribute of something else, and of private imports from Lightning."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append((ast.unparse(node.value), node.attr))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [("lightning", name) for name in names if name.startswith("_")]
    return found


def reaches_into_lightning(owner: str, name: str) -> bool:
    last = owner.split(".")[-1]
    of_trainer = any(word in last for word in ("trainer", "strategy", "connector", "loop", "logger", "saver", "plugin"))
    return owner == "lightning" or of_trainer or name in ("_trainer", "_enable_version_counter")


def test_one_file_alone_reaches_into_lightning() -> None:
    offenders = {
        f"{path.relative_to(PACKAGE)}: {owner}.{name}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "lightning_internals.py"
        for owner, name in private_names(path)
        if reaches_into_lightning(owner, name)
    }
    assert offenders == set()


def test_all_that_this_file_takes_is_listed() -> None:
    path = Path(lightning_internals.__file__)
    classes, own = {"_WrappingCheckpointIO", "_CheckpointConnector"}, {"_named"}
    taken = {name for owner, name in private_names(path)} - classes - own
    assert taken == {
        part for _, name, user in TAKEN if "internals" in user for part in name.split(".") if part.startswith("_")
    } - {"_base_checkpoint_io_configured"}


@pytest.mark.parametrize("source", ["trainer._x", "self.trainer.strategy._x", "self._trainer", "a.fit_loop._x"])
def test_no_form_of_access_escapes(source: str, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(f"print({source})\n", encoding="utf-8")
    assert any(reaches_into_lightning(*found) for found in private_names(path))


def test_a_plugin_that_wraps_another_writes_through_ours(tmp_path: Path) -> None:
    chosen = AsyncCheckpointIO()
    trainer = tiny.trainer(tmp_path, plugins=[chosen])
    ours = AtomicCheckpointIO()
    lightning_internals.use_checkpoint_io(trainer, ours)
    assert trainer.strategy.checkpoint_io is chosen
    assert chosen.checkpoint_io is ours
