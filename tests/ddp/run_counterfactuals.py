"""One process of a test with counterfactuals and memorisation; ``python -m tests.ddp.run_counterfactuals 2 folder``."""

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from dat_lightning import DigitsFeatures, PGDSampler
from dat_lightning.callbacks import Counterfactuals, Memorisation
from dat_lightning.metrics.features import digits_feature_network
from tests import tiny


def main(devices: int, folder: Path) -> None:
    """Tests on this process's share; each rank writes what it knows."""
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
    sampler = PGDSampler(num_samples=55, num_steps=[5], step_size=0.5, batch_size=10)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = tiny.trainer(folder, [counterfactuals, memorisation, sampler], devices=devices, strategy=strategy)
    trainer.test(tiny.stage1(), datamodule=tiny.digits(eval_batch_size=61), verbose=False)
    figures = [asdict(figure) for figure in [*counterfactuals.figures, *memorisation.figures]]
    (folder / f"figures-{trainer.global_rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
