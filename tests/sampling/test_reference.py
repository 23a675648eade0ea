"""Training images as evaluation sees them: corrupt ones are left out, and leave nothing behind."""

import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from torch import Tensor

from dat_lightning import DigitsFeatures, FrechetDistance, PGDSampler, SampleMetrics
from dat_lightning.data.draws import EvaluationBatches
from dat_lightning.data.entries import SizedDataset
from dat_lightning.data.pixels import CorruptImageError
from dat_lightning.features.fidelity import FidelitySettings
from dat_lightning.features.layers import DigitsLayers
from tests import tiny


class Damaged:
    """A data set some of whose images cannot be read."""

    def __init__(self, whole: SizedDataset, damaged: range) -> None:
        self.whole = whole
        self.damaged = damaged

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.damaged:
            raise CorruptImageError(f"digit {index}", "its bytes are gone")
        entry: tuple[Tensor, int] = self.whole[index]
        return entry


def evaluate(path: Path, callback: Callback, damaged: range) -> None:
    data = tiny.digits()
    whole = data.reference_data()
    data.reference_data = lambda: EvaluationBatches(Damaged(whole.dataset, damaged), whole.transform)  # type: ignore
    sampler = PGDSampler(num_samples=25, num_steps=[1], step_size=1.0)
    tiny.trainer(path, [callback, sampler]).test(tiny.stage2(), data, verbose=False)


def callbacks(cache: Path) -> list[Any]:
    return [
        FrechetDistance(DigitsFeatures(), cache_dir=str(cache), batch_size=500),
        SampleMetrics(DigitsLayers(), ["fid"], FidelitySettings(), cache_dir=str(cache)),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_a_reference_with_gaps_is_used_but_not_cached(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dat_lightning"):
        evaluate(tmp_path, callbacks(tmp_path / "cache")[number], range(700, 703))
    assert "left out 3 training images that cannot be read" in caplog.text
    assert "skipped an image (1 different ones so far): digit 700 is not a readable image" in caplog.text
    assert not list(tmp_path.glob("cache/*"))
    # What is whole is kept.
    evaluate(tmp_path, callbacks(tmp_path / "cache")[number], range(0))
    assert len(list(tmp_path.glob("cache/*"))) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_reference_with_many_gaps_is_an_error(number: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="20 of 1437 reference images could not be read"):
        evaluate(tmp_path, callbacks(tmp_path / "cache")[number], range(20))
    assert not list(tmp_path.glob("cache/*"))
