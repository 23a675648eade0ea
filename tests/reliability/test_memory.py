"""Memory does not grow with the number of steps and evaluations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.benchmarks.rss import Memory, growth, train

# A batch of 14 has 14 × 3 × 256 pixels, its logits and gradients: one that is kept costs more than this.
BYTES_PER_STEP = 14 * 3 * 256 * 4 / 4


class Leaks(Callback):
    """Keeps the images of every batch, as a list of outputs would."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.kept.append(batch["x_gen"])


def test_no_tensor_of_a_step_outlives_it(tmp_path: Path) -> None:
    """As many tensors live within each epoch after the first; and a leak of one tensor a step would be seen."""
    memory = Memory(every_n_steps=3, offset=2)
    train(tmp_path, 24, 4, memory)
    counts = {step: tensors for step, _, tensors in memory.records}
    assert counts[8] == counts[11] == counts[14] == counts[17] == counts[20] == counts[23], counts
    leaking = Memory(every_n_steps=3, offset=2)
    train(tmp_path, 12, 2, leaking, [Leaks()])
    counts = {step: tensors for step, _, tensors in leaking.records}
    assert counts[11] == counts[8] + 3, counts


def test_the_slope_finds_a_leak_among_an_allocators_blocks() -> None:
    steps = range(0, 2000, 50)
    blocks = [(s, 400 * 2**20 + 2**22 * (s > 900) + 2**16 * (s % 300 == 0), 100) for s in steps]
    assert growth(blocks)[0] < BYTES_PER_STEP / 10
    leak = [(s, size + round(2 * BYTES_PER_STEP) * s, tensors + s) for s, size, tensors in blocks]
    assert growth(leak) == pytest.approx((2 * BYTES_PER_STEP, 1), rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_2000_steps_and_20_evaluations_have_flat_memory(tmp_path: Path) -> None:
    memory = Memory(every_n_steps=50, offset=1)
    train(tmp_path, 2000, 20, memory)
    assert memory.records[-1][0] == 1951
    per_step, tensors = growth(memory.records)
    assert per_step < BYTES_PER_STEP, memory.records
    assert tensors == 0, memory.records
