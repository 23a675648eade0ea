"""A signal to one rank of two in validation, and a save that needs both; ``python -m tests.ddp.run_sharded_save F``."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from dat_lightning.runs.resume import protect
from dat_lightning.runs.signal_checkpoint import StoppedBySignal
from tests import tiny
from tests.ddp.ranks import launch


class NeedsAllRanks(DDPStrategy):
    """Gathers something in a save, as FSDP and DeepSpeed gather weights; a rank alone would wait for the others."""

    saves = 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.saves += 1
        torch.distributed.all_reduce(torch.ones(1))
        super().save_checkpoint(*args, **kwargs)


class Interrupt(Callback):
    """Sends one rank a signal in the middle of validation, and notes whether the others went on."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.batches = 0

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.batches += 1
        if self.batches == 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    """Trains until the signal ends the run on both ranks."""
    strategy = NeedsAllRanks(timeout=timedelta(seconds=60))
    interrupt, saver = Interrupt(rank=0), ModelCheckpoint(dirpath=folder / "saved", monitor=None, save_top_k=0)
    parts: dict[str, Any] = {"devices": 2, "strategy": strategy, "limit_val_batches": 3, "enable_checkpointing": True}
    trainer = tiny.trainer(folder, [interrupt, saver], limit_train_batches=2, max_epochs=3, **parts)
    protect(trainer)
    end: StoppedBySignal | None = None
    try:
        trainer.fit(tiny.stage1(), datamodule=tiny.digits(eval_batch_size=8))
    except StoppedBySignal as stop:
        end = stop
    said = {
        "saves": strategy.saves,
        "batches": interrupt.batches,
        "path": end and end.path,
        "step": trainer.global_step,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    launch(main, 2, Path(sys.argv[1]))
