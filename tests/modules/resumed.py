"""A run of the command line that stops after an epoch and goes on, against one that does not stop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from dat_lightning.cli import DATCLI, main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = ROOT / "tests" / "conf" / "tiny.yaml"


def epoch_that_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *files: Path, arguments: Sequence[str] = ()
) -> Any:
    """Trains an epoch of two steps by configurations; returns its Trainer, once it went on as two in one.

    T has to grow.
    """
    monkeypatch.chdir(folder)
    made: list[Trainer] = []
    monkeypatch.setattr(DATCLI, "after_fit", lambda cli: made.append(cli.trainer), raising=False)
    given = ["fit", *(word for path in files for word in ("--config", str(path))), *arguments]
    given += ["--model.curriculum.auc_threshold=0", "--model.curriculum.window_samples=32"]
    main([*given, "--trainer.max_epochs=1"])
    assert made[0].global_step == 2
    last = Path("runs/checkpoints/last.ckpt")
    main([*given, "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    resumed = torch.load(last, weights_only=True)
    last.unlink()
    main([*given, "--trainer.max_epochs=2"])
    whole = torch.load(last, weights_only=True)
    assert int(whole["state_dict"]["curriculum.num_steps"]) > 0
    assert resumed["network_evaluations"] == whole["network_evaluations"] > 0
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    return made[0]
