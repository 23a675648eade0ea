"""What a process of a test run does: test with all evaluators; ``python -m tests.ddp.run_evaluators 2 folder``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dat_lightning import CorruptImageError, PGDSampler, ThreatModel
from dat_lightning.callbacks import Calibration, EnergyStatistics, OODDetection
from dat_lightning.core import SizedDataset
from dat_lightning.data import UniformNoise
from tests import tiny


class OneImage(Sequence[Any]):
    """A data set of which one image can be read: one of two ranks has none."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        if index != 1:
            raise CorruptImageError(f"{index}.png", "it is truncated")
        return torch.full((1, 16, 16), 0.3)


def main(devices: int, folder: Path) -> None:
    """Tests on this process's share and writes every rank's figures."""
    attack = ThreatModel(eps=0.5, step_size=0.2, num_steps=2, random_start=True)
    datasets: dict[str, SizedDataset] = {"noise": UniformNoise(31, (1, 16, 16)), "one": OneImage()}
    kept = str(folder / "kept")
    evaluators = [
        Calibration(dirpath=kept),
        OODDetection(datasets, attack=attack, batch_size=7, dirpath=kept),
        EnergyStatistics(num_images=33, batch_size=7, dirpath=kept),
    ]
    sampler = PGDSampler(num_samples=15, num_steps=[1, 2], step_size=0.5, batch_size=10)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = tiny.trainer(folder, [*evaluators, sampler], devices=devices, strategy=strategy)
    for k in range(2):
        # 360 test images in batches of 60 and 61; the second time from the files.
        trainer.test(tiny.stage1(threat_model=attack), datamodule=tiny.digits(eval_batch_size=61), verbose=False)
        figures = {f.name: [f.value, f.num_samples, dict(f.details)] for e in evaluators for f in e.figures}
        (folder / f"figures-{k}-{trainer.global_rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
