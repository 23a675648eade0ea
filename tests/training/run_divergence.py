"""What a process of a guarded run does: four steps of two batches, two of which fail on one rank; ``… folder``."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_lightning import RobustClassifierModule
from dat_lightning.modules.trained import Batch
from dat_lightning.training import DivergenceGuard
from tests import tiny


class Failing(RobustClassifierModule):
    """In the second step rank 1's loss is infinite, with finite gradients; in the third rank 0's gradient is NaN.

    Both at once, in the first of the step's two batches; ``seen`` has a statistic after each batch.
    """

    seen: list[Tensor]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.global_rank == 1:
            loss = loss + torch.inf
        if batch_idx == 4 and self.global_rank == 0:
            weight = next(p for p in self.parameters() if p.dim() == 4)
            loss = loss + (0 * weight).square().sum().sqrt()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seen.append(self.state_dict()["energy_model.backbone.norm.running_mean"].clone())


def main(folder: Path) -> None:
    """Trains and writes this rank's state."""
    module = Failing(tiny.energy_model(), optimizer=tiny.SGD, threat_model=tiny.ATTACK)
    module.seen = []
    guard = DivergenceGuard("skip")
    two = {"devices": 2, "strategy": "ddp"}
    trainer = tiny.trainer(folder, [guard], **two, limit_train_batches=8, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=tiny.digits(streams=["clf"]))
    weights = {name: p.detach() for name, p in module.named_parameters()}
    counts = {name: count for name, count in guard.state_dict().items() if name != "num_saved"}
    moments = trainer.optimizers[0].state_dict()["state"]
    state = {"weights": weights, "guard": counts, "moments": moments, "seen": module.seen}
    torch.save(state, folder / f"state-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
