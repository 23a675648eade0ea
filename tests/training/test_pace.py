"""A run that becomes slow says so once, with the reason that an injected machine shows."""

import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dat_lightning import Diagnostics
from dat_lightning.threads import CoreTimes
from dat_lightning.training import pace
from dat_lightning.training.pace import WARM_UP, WINDOW, MachineTimes, Pace, Step
from tests import tiny


class Machine:
    """Two cores; tests move its counters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.busy, self.own, self.reads = 0.0, 0.0, 0.0, 0
        monkeypatch.setattr(MachineTimes, "now", self.now)

    def now(self) -> MachineTimes:
        return MachineTimes(CoreTimes(2, self.clock, self.busy, self.own), self.reads)


def run(machine: Machine, step: Step, number: int, looks: Pace, others: float = 0.0, reads: int = 0) -> list[str]:
    """Sentences of so many equal steps, in which this process uses a core and a half."""
    said = []
    for _ in range(number):
        machine.clock += step.total
        machine.own += 1.5 * step.total
        machine.busy += (1.5 + others) * step.total
        machine.reads += reads
        said += [each for each in [looks.add(step)] if each is not None]
    return said


def started(machine: Machine, others: float = 0.0) -> Pace:
    looks = Pace()
    # The first steps compile.
    assert run(machine, Step(0.0, 60.0, 100), WARM_UP, looks) == []
    assert run(machine, Step(0.1, 1.0, 100), WINDOW, looks, others) == []
    return looks


def test_a_step_that_does_more_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    looks = started(machine)
    assert run(machine, Step(0.1, 10.0, 1000), 10 * WINDOW, looks) == []
    assert run(machine, Step(0.1, 2.5, 100), 10 * WINDOW, looks) == []
    # Nor do single steps count, which save a checkpoint, say.
    for _ in range(10):
        assert run(machine, Step(0.1, 1.0, 100), WINDOW // 2 + 1, looks) == []
        assert run(machine, Step(0.1, 90.0, 100), WINDOW - WINDOW // 2 - 1, looks) == []


@pytest.mark.parametrize(
    ("step", "others", "reads", "reason"),
    [
        (Step(3.0, 4.0, 100), 1.0, 100, "it waits for data in 75% of the time"),
        (Step(0.1, 4.0, 100), 1.0, 100, "memory is read back from disk 100 times a step"),
        (Step(0.1, 4.0, 100), 0.9, 0, "other processes use 0.9 of the 2 cores, 0.2 before"),
        (Step(0.1, 4.0, 100), 0.4, 0, "this process sees no reason on the machine"),
    ],
)
def test_the_reason(step: Step, others: float, reads: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    looks = started(machine, others=0.2)
    assert run(machine, step, WINDOW - 1, looks, others, reads) == []
    (said,) = run(machine, step, 10 * WINDOW, looks, others, reads)  # once
    assert said.startswith(f"training is 4.0 times slower than in its first steps, at equal work: {reason}")


class Brake(Callback):
    """Slows a run down, in its steps or by its loader, after so many of them."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.after:
            time.sleep(0.3)


def test_a_run_tells_it_once_in_its_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "WARM_UP", 1)
    monkeypatch.setattr(pace, "WINDOW", 2)
    said: list[str] = []
    monkeypatch.setattr("dat_lightning.training.diagnostics.rank_zero_warn", said.append)
    diagnostics = Diagnostics()
    for _ in range(2):
        said.clear()
        module = tiny.stage1(threat_model=tiny.ATTACK)
        options: dict[str, Any] = {"limit_train_batches": 9, "max_epochs": 1}
        tiny.trainer(tmp_path, [diagnostics, Brake(after=5)], **options).fit(module, tiny.digits(batch_size=2))
        assert len(said) == 1
        assert "times slower than in its first steps" in said[0]
