"""DAT for fewer evaluations: each way by hand in float64, what it costs, resuming, and that without any it is DAT."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from dat_lightning import AUCCurriculum, DualAdversarialModule, ThreatModel, ThriftyDATModule
from dat_lightning.cli import DATCLI, main
from dat_lightning.core import unbounded_ascent
from dat_lightning.core.errors import InputError
from dat_lightning.modules import JointLogits
from tests import tiny
from tests.modules import by_hand
from tests.modules.resumed import check_resumed_after_an_epoch

ROOT = Path(__file__).resolve().parents[2]
ALL: dict[str, Any] = {"restart_share": 0.4, "buffer_size": 40, "warm_attacks": True}


def started(path: Path, kind: type[DualAdversarialModule] = ThriftyDATModule, steps: int = 2, **kwargs: Any) -> Any:
    """A module in a Trainer, without a run, whose T does not move."""
    curriculum = AUCCurriculum(max_steps=6, auc_threshold=1.0)
    curriculum.num_steps.fill_(steps)
    fixed = {"energy_model": tiny.energy_model(), "threat_model": tiny.ATTACK, "contrastive_step_size": 0.4}
    module = kind(**{**fixed, "optimizer": tiny.SGD, "curriculum": curriculum, **kwargs})
    module.trainer = tiny.trainer(path)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module


def test_without_any_way_it_is_dat_to_the_last_bit(tmp_path: Path) -> None:
    batch, found = by_hand.batch(dtype=torch.float32), []
    for kind in (DualAdversarialModule, ThriftyDATModule):
        module = started(tmp_path, kind)
        module.train().training_step(batch, 0).backward()
        found.append([p.grad for p in module.parameters()] + [torch.tensor(module.network_evaluations)])
    assert all(map(torch.equal, *found))
    assert module.replay_buffer is None
    assert module.perturbations is None


def chains(net: nn.Module, x: Tensor, y: int, steps: int) -> Tensor:
    """Steps up f(x)[y] from each image, by hand."""
    return by_hand.walk(net, x, unbounded_ascent(0.4, steps), "logit", torch.full((len(x),), y))


def test_chains_that_go_on_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """In float64: the first step fills places, the second goes on from them, each from another one of its class."""
    module = started(tmp_path, restart_share=0.0, continued_steps=1, buffer_size=20, energy_weight=2.0).double().train()
    net, batch = copy.deepcopy(module.energy_model).eval(), by_hand.batch(8)
    batch["y_gen"] = torch.tensor([3, 5, 3, 3, 0, 9, 5, 3])  # four of class 3, which has two places
    module.training_step(batch, 0)
    first = module.replay_buffer.clone()
    ends = torch.cat([chains(net, x[None], int(y), 2) for x, y in zip(batch["x_ood"], batch["y_gen"], strict=True)])
    filled = first.flatten(1).isfinite().all(1)
    assert filled.tolist() == [k in (0, 1, 6, 7, 10, 11, 18, 19) and bool(filled[k]) for k in range(20)]
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
    assert not any("replay" in name or "perturb" in name for name in module.state_dict())


def test_the_loss_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """In float64: two steps, in the second of which all chains go on."""
    module = started(tmp_path, restart_share=0.0, buffer_size=10, energy_weight=2.0).double().train()
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


def test_chains_begin_anew_by_their_share_and_their_draws(tmp_path: Path) -> None:
    module = started(tmp_path, steps=0, restart_share=0.3, buffer_size=4000)
    x, y, draws = torch.rand(2000, 1, 16, 16), torch.arange(2000) % 10, torch.arange(2000)
    module._buffer_of(x)[:] = 0.5
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
    module.replay_buffer[:] = torch.inf  # of a step that a guard has skipped
    assert module.contrastive_samples(x[:9], y[:9], draws[:9]).isfinite().all()


def test_the_auc_is_that_of_chains_that_began_anew(tmp_path: Path) -> None:
    module = started(tmp_path, restart_share=0.5, buffer_size=40)
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


def shift_between(image: Tensor, moved: Tensor) -> tuple[int, int]:
    """By how many pixels, down and to the right, an image over black was moved."""
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            if torch.equal(shifted(image, down, right), moved):
                return down, right
    raise AssertionError("no shift gives the image")


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    result = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                result[..., i, j] = image[..., i - down, j - right]
    return result


def attack(net: nn.Module, x: Tensor, start: Tensor, y: Tensor, steps: int) -> Tensor:
    """Steps of 0.5 in L2 up the cross-entropy of one image, inside ε 1 around ``x``, by hand."""
    state = start
    for number in range(steps + 1):
        delta = state - x
        state = (x + delta * min(1.0, 1.0 / max(float(delta.norm()), 1e-12))).clamp(0, 1)
        if number == steps:
            return state
        state = state.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(by_hand.negative_log_likelihood(net(state), y), state)
        state = state.detach() + 0.5 * gradient / (gradient.norm() + 1e-10)
    raise AssertionError


def test_warm_attacks_go_on_through_the_shifts_of_both_draws(tmp_path: Path) -> None:
    """In float64, by loops over pixels: three passes over the same images, each with shifts of its own."""
    module = started(tmp_path, warm_attacks=True, threat_model=ThreatModel(eps=1.0, step_size=0.5, num_steps=1))
    data, net = tiny.digits(), copy.deepcopy(module.double().energy_model).eval()
    module.trainer.datamodule = data
    stream: Any = data.training_stream("clf")
    size, images = stream.size, [3, 700, 1000]
    kept = {index: torch.zeros(1, 16, 16, dtype=torch.float64) for index in images}
    moves = set()
    for number in range(3):
        draw_of = {stream.index(draw): draw for draw in range(number * size, (number + 1) * size)}
        draws = [draw_of[index] for index in images]
        drawn = [stream(draw) for draw in draws]
        x, y = (
            torch.stack([image for image, _ in drawn]).double(),
            torch.tensor([int(label or 0) for _, label in drawn]),
        )
        x_adv = module.adversarial_examples(x, y, torch.tensor(draws))
        for k, index in enumerate(images):
            down, right = shift_between(stream.dataset[index][0].double(), x[k])
            moves.add((down, right))
            expected = attack(net, x[k : k + 1], x[k : k + 1] + shifted(kept[index], down, right), y[k : k + 1], 1)
            torch.testing.assert_close(x_adv[k : k + 1], expected, rtol=0, atol=1e-9)
            back = shifted(expected[0] - x[k], -down, -right)
            seen = shifted(shifted(torch.ones(1, 16, 16), down, right), -down, -right) > 0
            kept[index] = torch.where(seen, back, kept[index])
    assert len(moves) > 2
    assert sum(int((row != 0).any()) for row in module.perturbations) == 3
    assert module.perturbations.shape == (size, 1, 256)


def test_of_an_image_twice_in_a_batch_the_last_perturbation_is_kept(tmp_path: Path) -> None:
    """And nothing that is not finite."""
    module = started(tmp_path, warm_attacks=True)
    table, ends = torch.ones(5, 1, 4), torch.arange(12.0).view(3, 1, 4)
    ends[2, 0, 1:] = torch.tensor([torch.nan, torch.inf, 7.0])
    module._keep(table, torch.tensor([3, 1, 3]), ends)
    assert table[:, 0].tolist() == [[1.0] * 4, [4.0, 5.0, 6.0, 7.0], [1.0] * 4, [8.0, 0.0, 0.0, 7.0], [1.0] * 4]


class Keeper(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.state = [pl_module.replay_buffer.clone(), pl_module.perturbations.clone()]


def run(path: Path, steps: int, resume: Path | None = None, **kwargs: Any) -> tuple[Trainer, Any, list[Tensor]]:
    curriculum = AUCCurriculum(max_steps=4, auc_threshold=0.0, window_samples=64)
    fixed = {"energy_model": tiny.energy_model(), "threat_model": ThreatModel(step_size=0.3, num_steps=3)}
    module = ThriftyDATModule(**{**fixed, "optimizer": tiny.SGD, "curriculum": curriculum, **ALL, **kwargs})
    keeper = Keeper()
    trainer = tiny.trainer(path, [keeper], max_epochs=-1, max_steps=steps, limit_val_batches=1)
    trainer.fit(module, tiny.digits(), ckpt_path=resume, weights_only=True)
    return trainer, module, keeper.state


def test_a_run_that_goes_on_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """With everything on, in the middle of the second epoch."""
    _, whole, whole_state = run(tmp_path, 10)
    trainer, _, state = run(tmp_path, 8)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(saved["replay_buffer"].nan_to_num(), state[0].nan_to_num())
    assert torch.equal(saved["perturbations"], state[1])
    assert 0 < int(state[1].flatten(1).any(1).sum()) <= 8 * 32
    _, resumed, resumed_state = run(tmp_path, 10, tmp_path / "a.ckpt")
    for ours, theirs, before in zip(resumed_state, whole_state, state, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        assert not torch.equal(ours.nan_to_num(), before.nan_to_num())
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed.network_evaluations == whole.network_evaluations
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert not {"replay_buffer", "perturbations"} & set(torch.load(tmp_path / "weights.ckpt", weights_only=True))


def test_what_is_refused(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"restart_share": 1.5}, r"restart_share must lie in \[0, 1\], got 1.5"),
        ({"continued_steps": -1}, "continued_steps must be at least 0, got -1"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        ({"warm_attacks": True, "threat_model": ThreatModel(random_start=True)}, "warm_attacks and .*random_start"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            started(tmp_path, **arguments)
    batch = by_hand.batch(dtype=torch.float32)
    module = started(tmp_path, restart_share=0.5, buffer_size=25)
    with pytest.raises(InputError, match="buffer_size must be a multiple of classes times processes, 10 · 1, got 25"):
        module.training_step(batch, 0)
    module = started(tmp_path, warm_attacks=True)
    with pytest.raises(
        InputError, match=r"warm_attacks needs data whose x_clf are draws of one data set.*got NoneType"
    ):
        module.training_step(batch, 0)
    with pytest.raises(InputError, match="warm_attacks needs numbered draws"):
        module.adversarial_examples(batch["x_clf"], batch["y_clf"])
    trainer, _, _ = run(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="and be 40 as in the checkpoint; got 80"):
        run(tmp_path, 3, tmp_path / "a.ckpt", buffer_size=80)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_configuration_trains_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[Any] = []
    monkeypatch.setattr(DATCLI, "after_fit", lambda cli: made.append(cli.trainer), raising=False)
    given = [str(ROOT / "configs" / "digits" / "stage2.yaml"), str(ROOT / "tests" / "conf" / "tiny.yaml")]
    arguments = ["fit", *(word for path in given for word in ("--config", path))]
    arguments += ["--model.curriculum.auc_threshold=0", "--model.curriculum.window_samples=32"]
    arguments += ["--model.restart_share=0.5", "--model.warm_attacks=true"]
    main([*arguments, "--trainer.max_epochs=1"])
    assert made[0].global_step == 2
    assert isinstance(made[0].lightning_module, ThriftyDATModule)
    assert {"train/energy_loss", "val/robust_accuracy", "val/fid"} <= set(made[0].callback_metrics)
    check_resumed_after_an_epoch(arguments)
