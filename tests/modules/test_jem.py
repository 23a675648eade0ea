"""JEM: its loss against a plain loop, the replay buffer, resuming, and divergence."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dat_lightning import JEMModule
from dat_lightning.core.errors import InputError, TrainingFailureError
from tests import tiny
from tests.keeper import fitted


def attached(path: Path, module: JEMModule) -> JEMModule:
    """In a Trainer, without a run."""
    module.trainer = tiny.trainer(path)
    return module


def batch(size: int, first_draw: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(first_draw)
    images = {
        name: torch.rand(size, 1, 16, 16, generator=generator, dtype=torch.float64) for name in ("x_gen", "x_clf")
    }
    return {**images, "y_clf": torch.arange(size) % 10, "draw": torch.arange(first_draw, first_draw + size)}


def test_the_loss_and_the_chains_are_those_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 and without random numbers, for two steps of half the buffer each."""
    module = attached(tmp_path, tiny.jem(noise=0.0, data_noise=0.0, restart_share=0.0, energy_weight=0.5)).double()
    monkeypatch.setattr(JEMModule, "log", lambda *args, **kwargs: None)
    before: Tensor | None = None
    for first in (0, 8):
        entries = batch(8, first)
        if before is None:
            module._buffer_of(entries["x_gen"])
        assert module.replay_buffer is not None
        before = module.replay_buffer.clone()
        loss = module.training_step(entries, 0)
        moved = (module.replay_buffer != before).flatten(1).any(1)
        assert int(moved.sum()) == 8
        network = module.energy_model
        ends = []
        for x in before[moved]:
            for _ in range(3):
                image = x.unsqueeze(0).clone().requires_grad_()
                (gradient,) = torch.autograd.grad(network(image).exp().sum().log(), image)
                x = (x + gradient[0]).clamp(0, 1)
            ends.append(x)
        torch.testing.assert_close(module.replay_buffer[moved], torch.stack(ends), rtol=0, atol=1e-10)
        expected = torch.zeros((), dtype=torch.float64)
        for k in range(8):
            logits = network(entries["x_clf"][k : k + 1])[0]
            likely = network(entries["x_gen"][k : k + 1]).exp().sum().log(), network(ends[k][None]).exp().sum().log()
            expected += (-logits.log_softmax(0)[entries["y_clf"][k]] + 0.5 * (likely[1] - likely[0])) / 8
        torch.testing.assert_close(loss, expected)
    assert not any("replay" in name for name in module.state_dict())


def test_random_numbers_are_those_of_the_paper(tmp_path: Path) -> None:
    """Data noise, restarts and the chain's noise by their statistics, and as functions of the draw."""
    module = attached(tmp_path, tiny.jem(num_steps=1, step_size=0.0, noise=0.01, buffer_size=4000))
    x = torch.full((2000, 1, 16, 16), 0.5)
    noised = module.noised(x, range(2000), "gen")
    assert float((noised - x).std()) == pytest.approx(0.03, rel=0.01)
    assert torch.equal(module.noised(x[:3], [7, 8, 9], "gen"), noised[7:10])
    assert not torch.equal(module.noised(x, range(2000), "clf"), noised)
    buffer = torch.full((4000, 1, 16, 16), 0.5)
    ends = module.chain_samples(buffer, range(2000))
    anew = (ends - 0.5).abs().flatten(1).amax(1) > 0.2
    assert float(anew.float().mean()) == pytest.approx(0.05, abs=0.015)
    assert float((ends - 0.5)[~anew].std()) == pytest.approx(0.01, rel=0.02)
    assert float(ends[anew].mean()) == pytest.approx(0.5, abs=0.01)
    assert int((buffer != 0.5).flatten(1).any(1).sum()) == 2000
    spoiled = torch.full((4, 1, 16, 16), torch.nan)
    assert module.chain_samples(spoiled, range(4)).isfinite().all()


def run(path: Path, steps: int, resume: Path | None = None) -> tuple[Trainer, JEMModule, Tensor]:
    module = tiny.jem()
    trainer, kept = fitted(module, "replay_buffer", path, steps, resume)
    return trainer, module, kept


def test_a_run_that_goes_on_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """In the middle of the second epoch."""
    _, whole, whole_buffer = run(tmp_path, 10)
    trainer, _, buffer = run(tmp_path, 8)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(saved["replay_buffer"], buffer)
    assert not torch.equal(buffer, whole_buffer)
    _, resumed, resumed_buffer = run(tmp_path, 10, tmp_path / "a.ckpt")
    assert torch.equal(resumed_buffer, whole_buffer)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "replay_buffer" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    again = JEMModule.load_from_checkpoint(tmp_path / "a.ckpt", energy_model=tiny.energy_model(seed=4))
    assert torch.equal(again.energy_model.backbone.get_parameter("fc.weight"), saved["state_dict"][_FC])


def test_another_run_begins_with_another_buffer(tmp_path: Path) -> None:
    """Not with the chains of the former one, nor with what a validation that failed had collected."""
    _, module, buffer = run(tmp_path, 4)
    module._collected_buffer = buffer.clone()
    trainer = tiny.trainer(tmp_path, max_steps=1, max_epochs=-1, limit_val_batches=0)
    trainer.fit(module, tiny.digits())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    first = module.first_images(range(64), (1, 16, 16))
    untouched = (torch.load(tmp_path / "b.ckpt", weights_only=True)["replay_buffer"] == first).flatten(1).all(1)
    assert int(untouched.sum()) == 32  # the first batch's chains are in the other half


_FC = "energy_model.backbone.fc.weight"


def test_divergence_is_a_sentence(tmp_path: Path) -> None:
    module = tiny.jem(optimizer=partial(torch.optim.SGD, lr=1e4), max_energy_gap=50.0)
    with pytest.raises(TrainingFailureError, match=r"^JEM has diverged at step 11: .* max_energy_gap 50, .*lower"):
        tiny.trainer(tmp_path, max_epochs=2).fit(module, tiny.digits())


def test_the_size_of_the_buffer_has_to_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="buffer_size must be at least the batch size, 32, got 16"):
        tiny.trainer(tmp_path).fit(tiny.jem(buffer_size=16), tiny.digits())
    trainer, _, _ = run(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="number of processes, 1, and be 64 as in the checkpoint; got 128"):
        tiny.trainer(tmp_path, max_epochs=3).fit(
            tiny.jem(buffer_size=128), tiny.digits(), ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("restart_share", 1.5, r"lie in \[0, 1\]"),
        ("restart_share", float("nan"), r"lie in \[0, 1\]"),
        ("buffer_size", 0, "be a whole number of at least 1"),
        ("buffer_size", 10.5, "be a whole number of at least 1"),
        ("data_noise", -1.0, "be at least 0"),
        ("data_noise", float("nan"), "be at least 0"),
        ("energy_weight", -1.0, "be at least 0"),
        ("max_energy_gap", 0.0, "be positive"),
        ("max_energy_gap", float("nan"), "be positive"),
    ],
)
def test_numbers_outside_their_ranges_are_refused(argument: str, value: float, expected: str) -> None:
    with pytest.raises(InputError, match=f"^{argument} must {expected}, got {value}$"):
        tiny.jem(**{argument: value})
