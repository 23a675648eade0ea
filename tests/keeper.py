"""What a training has at its end, kept before Lightning puts it away."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tests import tiny


class Keeper(Callback):
    """Keeps the losses of all ranks, and the weights and an entry of a module as this rank has them at the end.

    Attributes:
        entry: A tensor of the module that is none of its weights, such as a buffer of images.
    """

    def __init__(self, entry: str) -> None:
        self.entry = entry
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.kept = getattr(pl_module, self.entry).clone()

    def save(self, trainer: Trainer, folder: Path, name: str, **further: Any) -> None:
        """Writes a checkpoint, and for each rank what was kept."""
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        kept = {"losses": self.losses, "weights": self.weights, self.entry: self.kept, **further}
        torch.save(kept, folder / f"{name}-{trainer.global_rank}.pt")


def saved_by(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """Returns what a rank kept."""
    found: dict[str, Any] = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
    return found


def fitted(module: LightningModule, entry: str, path: Path, steps: int, resume: Path | None) -> tuple[Trainer, Tensor]:
    """Trains on digits up to a number of steps; returns the Trainer, and the module's entry at the end."""
    keeper = Keeper(entry)
    trainer = tiny.trainer(path, [keeper], max_epochs=-1, max_steps=steps, limit_val_batches=1)
    trainer.fit(module, tiny.digits(), ckpt_path=resume, weights_only=True)
    return trainer, keeper.kept
