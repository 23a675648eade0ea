"""Memory of a long run: Stage-2 steps with evaluations in between, measured; ``python -m tests.benchmarks.rss``."""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dat_lightning import Diagnostics, DigitsFeatures, ExponentialMovingAverage, FrechetDistance, PGDSampler, SampleGrid
from dat_lightning.core.curriculum import AUCCurriculum
from dat_lightning.training import DivergenceGuard
from tests import tiny


def resident_bytes() -> int:
    """Memory of this process that is in use (Linux)."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def live_tensors() -> int:
    """Tensors that the interpreter still holds, but for those that gc.freeze() put aside."""
    gc.collect()
    # type(), because isinstance would ask lazy objects, which then do what they put off.
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor))


class Memory(Callback):
    """Records step, resident memory and the number of live tensors.

    Args:
        every_n_steps: Steps between two records.
        offset: First step of which there is one; counts differ at the start of an epoch, before anything is logged.
    """

    def __init__(self, every_n_steps: int, offset: int = 0) -> None:
        self.every_n_steps = every_n_steps
        self.offset = offset
        self.records: list[tuple[int, int, int]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gc.collect()
        # A million objects of libraries need not be looked through each time.
        gc.freeze()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        gc.unfreeze()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step > 0 and step % self.every_n_steps == self.offset:
            self.records.append((step, resident_bytes(), live_tensors()))


def train(folder: Path, steps: int, evaluations: int, memory: Memory, callbacks: Sequence[Callback] = ()) -> None:
    """Trains Stage 2 with a tiny network and everything that a run has: average, watch, samples, Fréchet distance."""
    module = tiny.stage2(
        curriculum=AUCCurriculum(max_steps=3, auc_threshold=0.3, window_samples=64),
        optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    )
    parts: list[Callback] = [
        *(ExponentialMovingAverage(), DivergenceGuard("skip"), Diagnostics(every_n_steps=5, action="warn")),
        PGDSampler(num_samples=20, num_steps=[1, 2], step_size=0.5, batch_size=10),
        *(FrechetDistance(DigitsFeatures(), cache_dir=str(folder)), SampleGrid(num_rows=2, dirpath=str(folder))),
        *(memory, *callbacks),
    ]
    epoch = steps // evaluations
    settings = {"max_epochs": evaluations, "limit_train_batches": epoch, "limit_val_batches": 2}
    trainer = tiny.trainer(folder, parts, **settings)
    # An epoch of the digits is 1417 // batch size steps.
    trainer.fit(module, datamodule=tiny.digits(batch_size=min(16, 1400 // epoch), eval_batch_size=16))


def growth(records: Sequence[tuple[int, int, int]]) -> tuple[float, float]:
    """Bytes of memory and number of tensors per step after the first quarter: the median slope (Theil and Sen).

    A median of slopes does not mind an allocator that takes a block now and then.
    """
    kept = np.array(records[len(records) // 4 :], dtype=np.float64)
    first, second = np.triu_indices(len(kept), 1)
    slopes = (kept[second, 1:] - kept[first, 1:]) / (kept[second, :1] - kept[first, :1])
    memory, tensors = np.median(slopes, axis=0)
    return float(memory), float(tensors)


def main(args: Sequence[str] | None = None) -> None:
    """Prints the curve and its slope."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evaluations", type=int, default=20)
    options = parser.parse_args(args)
    memory = Memory(every_n_steps=max(2, options.steps // 40), offset=1)
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), options.steps, options.evaluations, memory)
    for step, size, tensors in memory.records:
        sys.stdout.write(f"{step:6d} steps  {size / 2**20:8.1f} MiB  {tensors:6d} tensors\n")
    per_step, tensors_per_step = growth(memory.records)
    figures = {"bytes_per_step": per_step, "tensors_per_step": tensors_per_step}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
