"""Where samples of the plane are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dat_lightning import PGDSampler, RareDigitsDataModule, SampleConsumer, SampleSupport
from dat_lightning.core.errors import InputError
from tests import tiny
from tests.evaluation.planes import examples_of, plane_module, points


class Kept(SampleConsumer):
    """Keeps samples."""

    stages = ("test",)

    def on_samples_batch(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        self.images = batch.images


def test_the_share_of_samples_on_the_support(tmp_path: Path) -> None:
    data, support, kept = points("moons"), SampleSupport(left_out=0.2), Kept()
    sampler = PGDSampler(num_samples=30, num_steps=[0, 30], step_size=0.05)
    tiny.trainer(tmp_path, [sampler, support, kept]).test(plane_module(2), datamodule=data, verbose=False)
    x, _ = examples_of(data)
    threshold = np.quantile(data.log_density(x, x).numpy(), 0.2)
    expected = {n: float((data.log_density(s, s) >= threshold).double().mean()) for n, s in kept.images.items()}
    found = {figure.name: figure for figure in support.figures}
    assert {n: found[f"sample_support_{n}_steps"].value for n in (0, 30)} == pytest.approx(expected)
    assert found["sample_support"].value == max(expected.values())
    assert found["sample_support"].details["sweep"] == list(expected.values())


def test_what_cannot_be_measured_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"left_out must lie in \(0, 1\), got 1.0"):
        SampleSupport(left_out=1.0)
    for data in (tiny.digits(), RareDigitsDataModule("ink", num_ood=50, num_held_out=50)):
        callbacks = [kept := Kept(), SampleSupport(), PGDSampler(num_samples=10, num_steps=[0])]
        with pytest.raises(InputError, match=f"SampleSupport needs a PlaneDataModule, .*, got {type(data).__name__}"):
            tiny.trainer(tmp_path, callbacks).test(tiny.stage1(), datamodule=data, verbose=False)
        assert not hasattr(kept, "images")
