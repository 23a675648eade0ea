"""JEM on two ranks, whole and in two lives; ``python -m tests.ddp.run_jem folder``."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from tests import tiny
from tests.ddp.ranks import launch, strategy

NUM_STEPS, STOP = 4, 2


class Keeper(Callback):
    """Keeps what each rank has at the end, and what a checkpoint says in the middle of validation."""

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        # As a signal does in validation: rank zero alone.
        if trainer.is_global_zero:
            self.saved = trainer._checkpoint_connector.dump_checkpoint(False)["replay_buffer"]

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.buffer = pl_module.replay_buffer.clone()
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def main(folder: Path, name: str, steps: int, resume: Path | None) -> None:
    keeper = Keeper()
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": steps, "limit_val_batches": 1, "val_check_interval": 2}
    trainer = tiny.trainer(folder, [keeper], devices=2, strategy=strategy(2), **options)
    trainer.fit(tiny.jem(), tiny.digits(), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    kept = {"buffer": keeper.buffer, "weights": keeper.weights, "in_validation": getattr(keeper, "saved", None)}
    torch.save(kept, folder / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    launch(main, 2, where, "whole", NUM_STEPS, None)
    launch(main, 2, where, "first", STOP, None)
    launch(main, 2, where, "second", NUM_STEPS, where / "first.ckpt")
