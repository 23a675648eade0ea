"""What only a GPU shows; skipped, with this reason, where there is none."""

from pathlib import Path

import pytest
import torch

from dat_lightning import (
    DigitsFeatures,
    ExponentialMovingAverage,
    FrechetDistance,
    PGDSampler,
    ThreatModel,
    ascend,
    unbounded_ascent,
)
from dat_lightning.core import cross_entropy, targeted_logit
from dat_lightning.speed import CompileMode, Execution, NetworkForms
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("precision", "compile"),
    [("32-true", False), ("bf16-mixed", False), ("bf16-mixed", True), ("bf16-mixed", "reduce-overhead")],
)
def test_stage2_trains_and_samples(precision: str, compile: CompileMode, tmp_path: Path) -> None:
    module = tiny.stage2(execution=Execution(compile=compile, fold_batch_norm=compile is not False))
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


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_compiled_ascents_agree_with_eager_ones(mode: CompileMode, fold: bool) -> None:
    """Chains of several lengths replay the same graph, and see weights that change between them."""
    model = tiny.energy_model().eval().cuda()
    x, y = torch.rand(16, 1, 16, 16).cuda(), torch.arange(16).cuda() % 10
    forms = NetworkForms(mode, fold)
    forms.expect(16)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for steps in (1, 4, 7):
            chain = unbounded_ascent(0.1, steps)
            expected = ascend(model, x, y, targeted_logit, chain)
            found = ascend(forms.for_ascents(model), x, y, targeted_logit, chain)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.05)


def test_passes_of_a_run_with_cuda_graphs_can_be_kept_and_added_up(tmp_path: Path) -> None:
    """Two batches' gradients make one step, and evaluation looks at logits of several passes."""
    module = tiny.stage2(execution=Execution(compile="reduce-overhead", fold_batch_norm=True))
    trainer = tiny.trainer(
        tmp_path, accelerator="gpu", devices=1, accumulate_grad_batches=2, limit_val_batches=2, deterministic=False
    )
    trainer.fit(module, datamodule=tiny.digits())
    assert trainer.global_step == 3
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_the_attack_agrees_with_the_cpu() -> None:
    model = tiny.energy_model().eval()
    x = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(16) % 10
    threat_model = ThreatModel(eps=0.5, step_size=0.2, num_steps=5, random_start=True)
    on_cpu = ascend(model, x, y, cross_entropy, threat_model)
    on_gpu = ascend(model.cuda(), x.cuda(), y.cuda(), cross_entropy, threat_model).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-3)


def weights_after_six_steps(path: Path, accelerator: str) -> tuple[dict[str, torch.Tensor], int]:
    """Of Stage 2 in float64, with averaged weights; and T."""
    module = tiny.stage2(execution=Execution(fold_batch_norm=True))
    trainer = tiny.trainer(
        path, [ExponentialMovingAverage()], accelerator=accelerator, devices=1, precision="64-true", deterministic=False
    )
    trainer.fit(module, datamodule=tiny.digits())
    assert trainer.global_step == 6
    return {name: value.cpu() for name, value in module.state_dict().items()}, int(module.curriculum.num_steps)


def test_first_steps_are_those_of_the_cpu(tmp_path: Path) -> None:
    """In float64, where rounding has no room to grow along six steps and their attacks."""
    expected, expected_steps = weights_after_six_steps(tmp_path, "cpu")
    found, steps = weights_after_six_steps(tmp_path, "gpu")
    assert steps == expected_steps > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
