"""DAT whose chains go on: by hand in float64, what it costs, resuming, and that without a buffer it is DAT."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dat_lightning import AUCCurriculum, DATContinuedChainsModule, DualAdversarialModule, ThreatModel
from dat_lightning.core import unbounded_ascent
from dat_lightning.core.errors import InputError
from dat_lightning.modules import JointLogits
from tests import tiny
from tests.keeper import fitted
from tests.modules import by_hand
from tests.modules.resumed import CONFIGS, TINY, epoch_that_goes_on
from tests.modules.two_steps import with_two_steps

# So small that of a few chains none begins anew that can go on.
HARDLY_EVER = 1e-6


def started(**kwargs: Any) -> Any:
    """A module without a run, with T = 2, which does not move."""
    return with_two_steps(DATContinuedChainsModule, **kwargs)


def test_without_a_buffer_it_is_dat_to_the_last_bit() -> None:
    batch, found = by_hand.batch(dtype=torch.float32), []
    modules = with_two_steps(DualAdversarialModule), started(restart_share=1.0)
    for module in modules:
        module.train().training_step(batch, 0).backward()
        found.append([p.grad for p in module.parameters()] + [torch.tensor(module.network_evaluations)])
    assert all(map(torch.equal, *found))
    assert modules[1].replay_buffer is None


def chains(net: nn.Module, x: Tensor, y: int, steps: int) -> Tensor:
    """Steps up f(x)[y] from each image, by hand."""
    return by_hand.walk(net, x, unbounded_ascent(0.4, steps), "logit", torch.full((len(x),), y))


def test_chains_that_go_on_are_those_of_a_plain_loop() -> None:
    """In float64: the first step fills places, the second goes on from them, each from another one of its class."""
    module = started(restart_share=HARDLY_EVER, buffer_size=20, energy_weight=2.0).double().train()
    net, batch = copy.deepcopy(module.energy_model).eval(), by_hand.batch(8)
    batch["y_gen"] = torch.tensor([3, 5, 3, 3, 0, 9, 5, 3])  # four of class 3, which has two places
    module.training_step(batch, 0)
    first = module.replay_buffer.clone()
    ends = torch.cat([chains(net, x[None], int(y), 2) for x, y in zip(batch["x_ood"], batch["y_gen"], strict=True)])
    filled = first.flatten(1).isfinite().all(1)
    assert filled.view(10, 2).sum(1).tolist() == [1, 0, 0, 2, 0, 2, 0, 0, 0, 1]
    for label, kept in ((0, 1), (3, 2), (5, 2), (9, 1)):
        mine = first[2 * label : 2 * label + 2][filled[2 * label : 2 * label + 2]]
        expected = ends[batch["y_gen"] == label][:kept]  # of more than there are places the first ones
        assert len(mine) == kept
        distances = (mine[:, None] - expected[None]).flatten(2).norm(dim=2)
        assert float(distances.amin(1).max()) < 1e-9
        assert float(distances.amin(0).max()) < 1e-9

    second = {**by_hand.batch(3), "y_gen": torch.tensor([3, 8, 3]), "draw": torch.arange(3) + 80}
    second["x_ood"] = 1 - second["x_ood"]
    x_contrast = module.contrastive_samples(second["x_ood"], second["y_gen"], second["draw"])
    went_on = chains(net, first[6:8], 3, 1)
    # Class 8 had no end yet; that of class 3 swaps places or does not.
    order = [0, 1] if torch.allclose(x_contrast[0], went_on[0], atol=1e-9) else [1, 0]
    torch.testing.assert_close(x_contrast[[0, 2]], went_on[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(x_contrast[1:2], chains(net, second["x_ood"][1:2], 8, 2), rtol=0, atol=1e-9)
    torch.testing.assert_close(module.replay_buffer[6:8], went_on, rtol=0, atol=1e-9)
    assert torch.equal(module.replay_buffer[[0, 1, 10, 11]].nan_to_num(), first[[0, 1, 10, 11]].nan_to_num())
    assert module._anew.tolist() == [False, True, False]
    assert not any("replay" in name for name in module.state_dict())


def test_the_loss_is_that_of_a_plain_loop() -> None:
    """In float64: two steps, in the second of which all chains go on."""
    module = started(restart_share=HARDLY_EVER, buffer_size=10, energy_weight=2.0).double().train()
    net, batch = copy.deepcopy(module.energy_model).eval(), by_hand.batch()
    batch["y_gen"] = torch.tensor([7, 2, 0, 6, 4, 1])  # of one class each, whose places cannot be swapped
    before = batch["x_ood"]
    x_adv = by_hand.walk(net, batch["x_clf"], tiny.ATTACK, "cross-entropy", batch["y_clf"])
    for steps in (2, 1):
        loss = module.training_step(batch, 0)
        before = by_hand.walk(net, before, unbounded_ascent(0.4, steps), "logit", batch["y_gen"])
        real, fake = net(batch["x_gen"]).logsumexp(1), net(before).logsumexp(1)
        bce = -(real.sigmoid().log().sum() + (1 - fake.sigmoid()).log().sum()) / 12
        expected = 2.0 * bce + by_hand.negative_log_likelihood(net(x_adv), batch["y_clf"])
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    assert module.network_evaluations == 6 * ((2 * 2 + 2 * 2 + 9) + (2 * 1 + 2 * 2 + 9))


def test_chains_begin_anew_by_their_share_and_their_draws() -> None:
    module = started(restart_share=0.3, buffer_size=4000)
    module.curriculum.num_steps.fill_(0)
    x, y, draws = torch.rand(2000, 1, 16, 16), torch.arange(2000) % 10, torch.arange(2000)
    module._restored_buffer = torch.full((4000, 1, 16, 16), 0.5)
    ends = module.contrastive_samples(x, y, draws)
    anew = (ends != 0.5).flatten(1).any(1)
    assert torch.equal(anew, module._anew)
    assert torch.equal(ends[anew], x[anew])
    assert float(anew.float().mean()) == pytest.approx(0.3, abs=0.03)
    module.replay_buffer[:] = 0.5
    module.contrastive_samples(x[:3], y[:3], draws[700:703])
    assert torch.equal(module._anew, anew[700:703])
    module.contrastive_samples(x[:200], y[:200], draws[700:900])
    assert torch.equal(module._anew, anew[700:900])


def test_what_is_not_finite_does_not_stay_in_the_buffer() -> None:
    """A step that a guard skips has moved the chains."""
    module = started(restart_share=HARDLY_EVER, buffer_size=20)
    x, y, draws = torch.rand(3, 1, 16, 16), torch.tensor([3, 3, 7]), torch.arange(3)
    seeds = x.clone()
    seeds[1, 0, 4] = torch.nan
    ends = module.contrastive_samples(seeds, y, draws)
    assert ends.flatten(1).isfinite().all(1).tolist() == [True, False, True]
    assert module.contrastive_samples(x, y, draws).isfinite().all()
    assert not module._anew.any()


def test_the_auc_is_that_of_chains_that_began_anew() -> None:
    module = started(restart_share=0.5, buffer_size=40)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randint(4, (12, 10), generator=generator).float() for _ in range(3)]
    y = torch.randint(10, (12,), generator=generator)
    for anew in ([0, 3, 4, 9, 11], list(range(12)), [5]):
        module._anew = torch.zeros(12, dtype=torch.bool)
        module._anew[anew] = True
        found = module.separation(JointLogits(*logits), y)
        pairs = [(float(logits[0][a, y[a]]), float(logits[1][b, y[b]])) for a in range(12) for b in anew]
        expected = sum((r > c) + 0.5 * (r == c) for r, c in pairs) / len(pairs)
        assert float(found) == pytest.approx(expected, abs=1e-6)
    module._anew = torch.zeros(12, dtype=torch.bool)
    assert math.isnan(float(module.separation(JointLogits(*logits), y)))


def run(path: Path, steps: int, resume: Path | None = None, **kwargs: Any) -> tuple[Trainer, Any, Tensor]:
    curriculum = AUCCurriculum(max_steps=4, auc_threshold=0.0, window_samples=64)
    fixed = {"energy_model": tiny.energy_model(), "threat_model": ThreatModel(step_size=0.3, num_steps=3)}
    chains = {"restart_share": 0.4, "buffer_size": 100, **kwargs}
    module = DATContinuedChainsModule(**{**fixed, "optimizer": tiny.SGD, "curriculum": curriculum, **chains})
    trainer, kept = fitted(module, "replay_buffer", path, steps, resume)
    return trainer, module, kept


def test_a_run_that_goes_on_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """In the middle of the second epoch, while there are places that no chain has reached."""
    _, whole, whole_buffer = run(tmp_path, 10)
    trainer, _, buffer = run(tmp_path, 8)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["replay_buffer"]
    torch.testing.assert_close(saved, buffer, rtol=0, atol=0, equal_nan=True)
    assert 50 < int(saved.flatten(1).isfinite().all(1).sum()) < 100
    _, resumed, resumed_buffer = run(tmp_path, 10, tmp_path / "a.ckpt")
    torch.testing.assert_close(resumed_buffer, whole_buffer, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(resumed_buffer.nan_to_num(), buffer.nan_to_num())
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed.network_evaluations == whole.network_evaluations
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "replay_buffer" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("restart_share", 1.5, r"lie in \(0, 1\]"),
        ("restart_share", 0.0, r"lie in \(0, 1\]"),
        ("restart_share", math.nan, r"lie in \(0, 1\]"),
        ("continued_steps", -1, "be a whole number of at least 0"),
        ("continued_steps", 1.5, "be a whole number of at least 0"),
        ("buffer_size", 0, "be a whole number of at least 1"),
        ("buffer_size", 10.5, "be a whole number of at least 1"),
    ],
)
def test_numbers_outside_their_ranges_are_refused(argument: str, value: float, expected: str) -> None:
    with pytest.raises(InputError, match=f"^{argument} must {expected}, got {value}$"):
        started(**{argument: value})


def test_a_buffer_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    module = started(buffer_size=25)
    with pytest.raises(InputError, match="buffer_size must be a multiple of classes times processes, 10 · 1, got 25"):
        module.training_step(by_hand.batch(dtype=torch.float32), 0)
    trainer, _, _ = run(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="and be 100 as in the checkpoint; got 80"):
        run(tmp_path, 3, tmp_path / "a.ckpt", buffer_size=80)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_configuration_trains_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [CONFIGS / "digits" / "dat.yaml", CONFIGS / "studies" / "digits" / "cost_continued.yaml", TINY]
    trainer = epoch_that_goes_on(tmp_path, monkeypatch, *given)
    assert isinstance(trainer.lightning_module, DATContinuedChainsModule)
    assert trainer.lightning_module.restart_share == 0.25
    assert {"train/energy_loss", "val/robust_accuracy", "val/fid"} <= set(trainer.callback_metrics)
