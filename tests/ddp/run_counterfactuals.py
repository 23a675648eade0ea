"""Counterfactuals and memorisation on 1, 2 and 4 ranks; ``python -m tests.ddp.run_counterfactuals folder``."""

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from dat_lightning import DigitsFeatures, PGDSampler
from dat_lightning.evaluation import Counterfactuals
from dat_lightning.features.extractors import digits_feature_network
from dat_lightning.sampling import Memorisation
from tests import tiny
from tests.ddp.ranks import launch, strategy
from tests.ddp.uneven import uneven_digits


def main(devices: int, folder: Path) -> None:
    """Tests on this process's share; each rank writes what it knows."""
    folder.mkdir(exist_ok=True)
    # Some class has too few images for a Fréchet distance, which the callback says.
    warnings.filterwarnings("ignore", "Counterfactuals: .* have fewer than min_class_images")
    extractor = DigitsFeatures()
    judge = digits_feature_network()
    judge.load_state_dict(extractor.network.state_dict())
    pictures = str(folder / "pictures")
    counterfactuals = Counterfactuals(
        [2.0], num_steps=3, judge=judge, extractor=extractor, num_pictures=10, picture_dirpath=pictures
    )
    memorisation = Memorisation(DigitsFeatures(), quantile=0.99, metric="cosine", dirpath=pictures)
    sampler = PGDSampler(num_samples=55, num_steps=[2, 5], step_size=0.5, batch_size=10)
    trainer = tiny.trainer(
        folder, [counterfactuals, memorisation, sampler], devices=devices, strategy=strategy(devices)
    )
    trainer.test(tiny.stage1(), datamodule=uneven_digits(), verbose=False)
    figures = [asdict(figure) for figure in [*counterfactuals.figures, *memorisation.figures]]
    (folder / f"figures-{trainer.global_rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    for num_ranks in (1, 4):
        launch(main, num_ranks, num_ranks, Path(sys.argv[1]) / str(num_ranks))
