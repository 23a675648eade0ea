"""A test with evaluators on 1, 2 and 4 ranks; ``python -m tests.ddp.run_evaluators folder``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dat_lightning import CorruptImageError, PGDSampler, ThreatModel
from dat_lightning.data import SizedDataset, UniformNoise
from dat_lightning.evaluation import Calibration, Denoising, Editing, EnergyStatistics, Inpainting, OODDetection
from tests import tiny
from tests.ddp.ranks import launch, strategy
from tests.ddp.uneven import uneven_digits


class OneImage(Sequence[Any]):
    """A data set of which one image can be read, so that other ranks have none; smaller than four ranks."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        if index != 1:
            raise CorruptImageError(f"{index}.png", "it is truncated")
        return torch.full((1, 16, 16), 0.3)


def main(devices: int, folder: Path) -> None:
    """Tests on this process's share and writes every rank's figures."""
    folder.mkdir(exist_ok=True)
    attack = ThreatModel(eps=0.5, step_size=0.2, num_steps=2, random_start=True)
    datasets: dict[str, SizedDataset] = {"noise": UniformNoise(31, (1, 16, 16)), "one": OneImage()}
    kept = str(folder / "kept")
    evaluators = [
        Calibration(dirpath=kept),
        OODDetection(datasets, attack=attack, batch_size=7, dirpath=kept),
        EnergyStatistics(num_images=33, batch_size=7, dirpath=kept),
        # Fewer parts than some ranks.
        Editing([Inpainting(num_steps=2), Denoising(num_steps=1)], max_images=50, batch_size=20, dirpath=kept),
    ]
    sampler = PGDSampler(num_samples=15, num_steps=[1, 2], step_size=0.5, batch_size=10)
    trainer = tiny.trainer(folder, [*evaluators, sampler], devices=devices, strategy=strategy(devices))
    for k in range(2):
        # The second time from the files.
        trainer.test(tiny.stage1(threat_model=attack), datamodule=uneven_digits(), verbose=False)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        (folder / f"logged-{k}-{trainer.global_rank}.json").write_text(json.dumps(logged))
        figures = {f.name: [f.value, f.num_samples, dict(f.details)] for e in evaluators for f in e.figures}
        (folder / f"figures-{k}-{trainer.global_rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    for num_ranks in (1, 4):
        launch(main, num_ranks, num_ranks, Path(sys.argv[1]) / str(num_ranks))
