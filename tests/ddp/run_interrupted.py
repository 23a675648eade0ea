"""Generation that two ranks began and four finish; ``python -m tests.ddp.run_interrupted folder``."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dat_lightning import PGDSampler, SampleBatch, SampleConsumer
from dat_lightning.core import Logits
from tests import tiny
from tests.ddp.ranks import launch, strategy


class Keeper(SampleConsumer):
    """Keeps this rank's samples, or fails at its first batch."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.samples: dict[int, Tensor] = {}

    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        if self.fails:
            raise InterruptedError("the power is gone")
        self.samples |= {int(i): batch.images[3][k] for k, i in enumerate(batch.indices)}


class Counting(PGDSampler):
    """Notes with which sample each batch that is generated begins."""

    begun: list[int]

    def generate(self, logits: Logits, seeds: Tensor, indices: Tensor, num_classes: int) -> SampleBatch:
        self.begun.append(int(indices[0]))
        return super().generate(logits, seeds, indices, num_classes)


def main(devices: int, folder: Path, dirpath: str | None) -> None:
    """Tests on this process's share; two ranks are interrupted."""
    keeper = Keeper(fails=devices == 2)
    sampler = Counting(num_samples=25, num_steps=[1, 3], step_size=0.5, batch_size=10, dirpath=dirpath)
    sampler.begun = []
    trainer = tiny.trainer(folder, [keeper, sampler], devices=devices, strategy=strategy(devices), limit_test_batches=1)
    with suppress(InterruptedError):
        trainer.test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    torch.save(keeper.samples, folder / f"samples-{devices}-{trainer.global_rank}.pt")
    (folder / f"begun-{devices}-{trainer.global_rank}.json").write_text(json.dumps(sampler.begun))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    for num_ranks, kept in ((2, str(where / "kept")), (4, str(where / "kept")), (1, None)):
        launch(main, num_ranks, num_ranks, where, kept)
