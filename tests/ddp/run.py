"""Tests, fits Stage 2, and tests again, on 1, 2 and 4 ranks; ``python -m tests.ddp.run folder``."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from dat_lightning import (
    AUCCurriculum,
    DigitsFeatures,
    FrechetDistance,
    PGDSampler,
    SampleBatch,
    SampleConsumer,
    SampleGrid,
    SampleWriter,
    ThreatModel,
)
from tests import tiny
from tests.ddp.ranks import launch, strategy
from tests.ddp.uneven import uneven_digits

NUM_SAMPLES, BATCH_SIZE = 55, 10


class RankWriter(SampleConsumer):
    """Keeps this rank's samples in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: list[SampleBatch] = []

    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        self.batches.append(batch)

    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        samples = {int(i): b.images[2][k] for b in self.batches for k, i in enumerate(b.indices)}
        torch.save(samples, self.folder / f"samples-{trainer.global_rank}.pt")
        self.batches = []


def fewer_images_than_ranks(trainer: Trainer, module: LightningModule) -> str:
    """Returns the error of a test with three images, which each rank must raise: otherwise some would wait."""
    data = uneven_digits()
    data.num_test = 3
    try:
        trainer.test(module, datamodule=data, verbose=False)
    except ValueError as error:
        return str(error)
    return ""


def main(devices: int, folder: Path) -> None:
    """Runs on this process's share and writes what rank zero knows."""
    folder.mkdir(parents=True, exist_ok=True)
    fid = FrechetDistance(DigitsFeatures(), cache_dir=str(folder / "cache"))
    sampler = PGDSampler(num_samples=NUM_SAMPLES, num_steps=[1, 2], step_size=0.5, batch_size=BATCH_SIZE)
    writer = SampleWriter(str(folder / "written"), stages=["test"])
    grid = SampleGrid(num_rows=3, dirpath=str(folder / "grids"))
    keeper = RankWriter(folder / "before")
    keeper.folder.mkdir(exist_ok=True)
    callbacks = [keeper, sampler, fid, writer, grid]
    trainer = tiny.trainer(folder, callbacks, devices=devices, strategy=strategy(devices))
    random_start = ThreatModel(eps=1.0, step_size=0.5, num_steps=2, random_start=True)
    module = tiny.stage2(
        curriculum=AUCCurriculum(max_steps=4, auc_threshold=0.0, window_samples=64),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        threat_model=random_start,
    )
    data = uneven_digits()
    (before,) = trainer.test(module, datamodule=data, verbose=False)
    keeper.folder = folder / "after"
    keeper.folder.mkdir(exist_ok=True)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.test(module, datamodule=data, verbose=False)
    if devices == 4:
        (folder / f"too_few-{trainer.global_rank}.txt").write_text(fewer_images_than_ranks(trainer, module))
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "state.pt")
        (folder / "figures.json").write_text(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    for num_ranks in (1, 2, 4):
        launch(main, num_ranks, num_ranks, Path(sys.argv[1]) / str(num_ranks))
