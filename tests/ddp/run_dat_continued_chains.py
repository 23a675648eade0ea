"""Chains that go on, on two ranks, whole and in two lives; ``python -m tests.ddp.run_dat_continued_chains folder``."""

import sys
from pathlib import Path
from typing import Any

from dat_lightning import AUCCurriculum, DATContinuedChainsModule
from tests import tiny
from tests.ddp.ranks import launch, strategy
from tests.keeper import Keeper

NUM_STEPS, STOP = 6, 3


def main(folder: Path, name: str, steps: int, resume: Path | None) -> None:
    curriculum = AUCCurriculum(max_steps=4, auc_threshold=0.3, window_samples=128)
    fixed: dict[str, Any] = {"energy_model": tiny.energy_model(), "threat_model": tiny.ATTACK, "restart_share": 0.4}
    module = DATContinuedChainsModule(**{**fixed, "buffer_size": 40, "optimizer": tiny.SGD, "curriculum": curriculum})
    keeper = Keeper("replay_buffer")
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": steps, "devices": 2, "strategy": strategy(2)}
    trainer = tiny.trainer(folder, [keeper], **options)
    trainer.fit(module, tiny.digits(batch_size=64), ckpt_path=resume, weights_only=True)
    keeper.save(trainer, folder, name)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    launch(main, 2, where, "whole", NUM_STEPS, None)
    launch(main, 2, where, "first", STOP, None)
    launch(main, 2, where, "second", NUM_STEPS, where / "first.ckpt")
