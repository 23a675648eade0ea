"""What only a GPU shows; skipped, with this reason, where there is none."""

from pathlib import Path

import pytest
import torch

from dat_lightning import DigitsFeatures, ExponentialMovingAverage, FrechetDistance, PGDSampler, ThreatModel, ascend
from dat_lightning.core import cross_entropy
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_stage2_trains_and_samples(precision: str, tmp_path: Path) -> None:
    module = tiny.stage2()
    fid = FrechetDistance(DigitsFeatures(), cache_dir=str(tmp_path))
    sampler = PGDSampler(num_samples=100, num_steps=[1, 3], step_size=0.5)
    callbacks = [ExponentialMovingAverage(), sampler, fid]
    trainer = tiny.trainer(
        tmp_path, callbacks, accelerator="gpu", devices=1, precision=precision, limit_val_batches=1, deterministic=False
    )
    trainer.fit(module, datamodule=tiny.digits())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert fid.scores.keys() == {1, 3}
    assert int(module.curriculum.num_steps) > 0


def test_the_attack_agrees_with_the_cpu() -> None:
    model = tiny.energy_model().eval()
    x = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(16) % 10
    threat_model = ThreatModel(eps=0.5, step_size=0.2, num_steps=5, random_start=True)
    on_cpu = ascend(model, x, y, cross_entropy, threat_model)
    on_gpu = ascend(model.cuda(), x.cuda(), y.cuda(), cross_entropy, threat_model).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-3)
