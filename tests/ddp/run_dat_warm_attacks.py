"""Warm attacks on one and two ranks, whole and in two lives; ``python -m tests.ddp.run_dat_warm_attacks folder``."""

import sys
from pathlib import Path
from typing import Any

from dat_lightning import AUCCurriculum, DATWarmAttacksModule, ThreatModel
from tests import tiny
from tests.ddp.ranks import launch, strategy
from tests.keeper import Keeper

NUM_STEPS, STOP = 9, 5  # of 128 images: each of the 437 comes twice at least


def main(folder: Path, name: str, precision: Any, ranks: int, steps: int, resume: Path | None) -> None:
    curriculum = AUCCurriculum(max_steps=4, auc_threshold=0.3, window_samples=128)
    attack = ThreatModel(step_size=0.3, num_steps=3)
    module = DATWarmAttacksModule(tiny.energy_model(), threat_model=attack, optimizer=tiny.SGD, curriculum=curriculum)
    keeper = Keeper("perturbations")
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": steps, "devices": ranks, "strategy": strategy(ranks)}
    trainer = tiny.trainer(folder, [keeper], precision=precision, **options)
    data = tiny.digits(batch_size=128, validation_size=1000)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    keeper.save(trainer, folder, name)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    launch(main, 2, where, "two", "64-true", 2, NUM_STEPS, None)
    # Lightning loads a checkpoint before it makes the module one of float64.
    launch(main, 2, where, "whole", "32-true", 2, NUM_STEPS, None)
    launch(main, 2, where, "first", "32-true", 2, STOP, None)
    launch(main, 2, where, "second", "32-true", 2, NUM_STEPS, where / "first.ckpt")
    launch(main, 1, where, "one", "64-true", 1, NUM_STEPS, None)
