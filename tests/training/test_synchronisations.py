"""How often a training step waits for the device: once, with all callbacks that look after a run."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dat_lightning import (
    AUCCurriculum,
    DATContinuedChainsModule,
    DATWarmAttacksModule,
    Diagnostics,
    DivergenceGuard,
    ExponentialMovingAverage,
    SignalCheckpoint,
)
from tests import tiny

# What hands values of a tensor to Python; on a GPU each of them waits for all that has been asked of it.
READERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__")
# Batches are put together on the CPU, whatever trains.
ON_THE_HOST = ("dat_lightning/data/", "torch/utils/data/")


class Counting(Callback):
    """Counts reads from the start of a batch to the start of the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Counter[str]] = []
        self.inside = False
        self.numbers: Tensor | None = None  # of draws, which stay on the host: see the last test
        for name in READERS:
            monkeypatch.setattr(Tensor, name, self.counted(name, getattr(Tensor, name)))

    def counted(self, name: str, original: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.steps and not self.inside and tensor is not self.numbers:
                self.inside = True
                frames = traceback.extract_stack()[:-1]
                if not any(part in frame.filename for frame in frames for part in ON_THE_HOST):
                    self.steps[-1][f"{name} in {Path(frames[-1].filename).name}:{frames[-1].name}"] += 1
                self.inside = False
            return original(tensor, *args, **kwargs)

        return read

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.steps.append(Counter())
        self.numbers = batch["draw"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(Counter())


def reads(path: Path, monkeypatch: pytest.MonkeyPatch, module: LightningModule, *callbacks: Callback) -> list[Any]:
    """What was read in each of the steps 2 to 5: checks of the first batch are once; a bar reads what it shows."""
    with monkeypatch.context() as patch:
        counting = Counting(patch)
        trainer = tiny.trainer(path, [counting, *callbacks], enable_checkpointing=True)
        trainer.fit(module, tiny.digits())
    assert len(counting.steps) == 7
    return [dict(step) for step in counting.steps[1:5]]


def growing() -> AUCCurriculum:
    return AUCCurriculum(max_steps=6, auc_threshold=0.0, window_samples=32)


def test_a_step_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = {"__int__ in curriculum.py:steps_on_host": 1}
    assert reads(tmp_path, monkeypatch, tiny.stage2(curriculum=growing())) == [chain] * 4
    assert reads(tmp_path, monkeypatch, tiny.stage1()) == [{}] * 4
    guard = {"tolist in divergence.py:_look": 1}
    callbacks = [ExponentialMovingAverage(), DivergenceGuard(), Diagnostics(every_n_steps=50), SignalCheckpoint()]
    module = tiny.stage2(curriculum=growing())
    assert reads(tmp_path, monkeypatch, module, *callbacks) == [guard] * 4
    assert int(module.curriculum.num_steps) == 6


@pytest.mark.parametrize("guarded", [False, True])
def test_a_step_that_keeps_images_waits_no_more(guarded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains are shared out on the host, which reads the classes with T."""
    common: dict[str, Any] = {"threat_model": tiny.ATTACK, "optimizer": tiny.SGD}
    warm = DATWarmAttacksModule(tiny.energy_model(), curriculum=growing(), **common)
    chains = DATContinuedChainsModule(tiny.energy_model(), curriculum=growing(), **common)
    guard = {"tolist in divergence.py:_look": 1} if guarded else {}
    callbacks = [DivergenceGuard()] if guarded else []
    expected = guard or {"__int__ in curriculum.py:steps_on_host": 1}
    assert reads(tmp_path, monkeypatch, warm, *callbacks) == [expected] * 4
    expected = {**guard, "tolist in dat_continued_chains.py:contrastive_samples": 1}
    assert reads(tmp_path, monkeypatch, chains, *callbacks) == [expected] * 4
    assert warm.perturbations is not None
    assert chains._anew is not None
    assert 0 < int(chains._anew.sum()) < 32


def test_the_chain_is_as_long_as_t_whoever_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T grows in every step, and somebody else moves it once."""
    lengths: list[list[int]] = []

    class Set(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                pl_module.curriculum.num_steps.fill_(0)
            lengths[-1].append(int(pl_module.curriculum.num_steps))

    for callbacks in ([], [DivergenceGuard()]):
        lengths.append([])
        seen: list[int] = []
        module = tiny.stage2(curriculum=growing())
        original = module.curriculum.steps_on_host
        monkeypatch.setattr(module.curriculum, "steps_on_host", lambda o=original, s=seen: (s.append(o()), s[-1])[1])
        tiny.trainer(tmp_path, [Set(), *callbacks]).fit(module, tiny.digits())
        assert seen == lengths[-1] == [0, 1, 2, 0, 1, 2]


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_a_skipped_step_leaves_the_chain_as_long_as_it_was(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(int(pl_module.curriculum.num_steps))
            told.append(pl_module.curriculum.steps_on_host())
            if batch_idx == 2:
                batch["x_clf"].fill_(torch.nan)

    seen: list[int] = []
    told: list[int] = []
    tiny.trainer(tmp_path, [Spoil(), DivergenceGuard("skip")]).fit(tiny.stage2(curriculum=growing()), tiny.digits())
    assert seen == told == [0, 1, 2, 2, 3, 4]


def test_numbers_of_draws_stay_where_random_streams_are_named() -> None:
    """Random starts, JEM and walks of random length read them, and need not wait for a device that computes."""
    batch = {"x_gen": torch.rand(2, 1, 16, 16), "draw": torch.tensor([4, 5])}
    moved = tiny.digits().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert (moved["x_gen"].device.type, moved["draw"].tolist()) == ("meta", [4, 5])
