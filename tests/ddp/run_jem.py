"""JEM on two ranks, whole and in two lives; ``python -m tests.ddp.run_jem folder``."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from tests import tiny
from tests.ddp.ranks import launch, strategy
from tests.keeper import Keeper

NUM_STEPS, STOP = 4, 2


class KeeperInValidation(Keeper):
    """Keeps besides what a checkpoint says in the middle of validation."""

    saved: Tensor | None = None

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        # As a signal does in validation: rank zero alone.
        if trainer.is_global_zero:
            self.saved = trainer._checkpoint_connector.dump_checkpoint(False)["replay_buffer"]


def main(folder: Path, name: str, steps: int, resume: Path | None) -> None:
    keeper = KeeperInValidation("replay_buffer")
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": steps, "limit_val_batches": 1, "val_check_interval": 2}
    trainer = tiny.trainer(folder, [keeper], devices=2, strategy=strategy(2), **options)
    trainer.fit(tiny.jem(), tiny.digits(), ckpt_path=resume, weights_only=True)
    keeper.save(trainer, folder, name, in_validation=keeper.saved)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    launch(main, 2, where, "whole", NUM_STEPS, None)
    launch(main, 2, where, "first", STOP, None)
    launch(main, 2, where, "second", NUM_STEPS, where / "first.ckpt")
