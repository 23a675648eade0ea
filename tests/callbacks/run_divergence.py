"""What a process of a guarded run does: four steps, of which two fail on one rank; ``python -m … folder``."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from dat_lightning import RobustClassifierModule
from dat_lightning.callbacks import DivergenceGuard
from dat_lightning.modules.base import Batch
from tests import tiny


class Failing(RobustClassifierModule):
    """In the second step rank 1's loss is infinite, with finite gradients; in the third rank 0's gradient is NaN."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1 and self.global_rank == 1:
            loss = loss + torch.inf
        if batch_idx == 2 and self.global_rank == 0:
            weight = next(p for p in self.parameters() if p.dim() == 4)
            loss = loss + (0 * weight).square().sum().sqrt()
        return loss


def main(folder: Path) -> None:
    """Trains and writes this rank's state."""
    module = Failing(tiny.energy_model(), optimizer=tiny.SGD, threat_model=tiny.ATTACK)
    guard = DivergenceGuard("skip")
    trainer = tiny.trainer(folder, [guard], devices=2, strategy="ddp", limit_train_batches=4)
    trainer.fit(module, datamodule=tiny.digits(streams=["clf"]))
    weights = {name: p.detach() for name, p in module.named_parameters()}
    counts = {name: count for name, count in guard.state_dict().items() if name != "num_saved"}
    moments = trainer.optimizers[0].state_dict()["state"]
    torch.save({"weights": weights, "guard": counts, "moments": moments}, folder / f"state-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
