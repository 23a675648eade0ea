"""TRADES: what it minimises, what its attack climbs, and that it trains."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dat_lightning import EnergyModel, EnergyModule, ThreatModel
from dat_lightning.cli import DATCLI, main
from dat_lightning.core import AttackMode
from dat_lightning.core.random_streams import normal_noise
from dat_lightning.modules import TradesModule
from dat_lightning.modules.trades import START_NOISE
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def trades(**kwargs: Any) -> TradesModule:
    module = TradesModule(
        **{"energy_model": tiny.energy_model(), "optimizer": tiny.SGD, "threat_model": tiny.ATTACK, **kwargs}
    )
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module


def make_batch(n: int = 8, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    return {"x_clf": x, "y_clf": torch.randint(10, (n,), generator=generator), "draw": torch.arange(n) + 40}


def plain_divergence(net: nn.Module, x: Tensor, x_adv: Tensor) -> Tensor:
    """Σ_k p_k (log p_k − log q_k) of each image."""
    p, q = net(x).softmax(1), net(x_adv).softmax(1)
    divergence: Tensor = (p * (p.log() - q.log())).sum(1)
    return divergence


def plain_attack(net: nn.Module, x: Tensor, start: Tensor, threat: ThreatModel) -> Tensor:
    """Steps along the normalised gradient, back into the ball around ``x``, one image at a time."""
    rows = []
    for image, first in zip(x.split(1), start.split(1), strict=True):
        state, clean = first, net(image).softmax(1).detach()
        for _ in range(threat.num_steps):
            state = state.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((clean * -net(state).log_softmax(1)).sum(), state)
            # As close to the image the gradient is small, the method's 1e-10 counts.
            delta = state.detach() + threat.step_size * gradient / (gradient.norm() + 1e-10) - image
            state = (image + delta * min(1.0, threat.eps / float(delta.norm()))).clamp(0, 1)
        rows.append(state)
    return torch.cat(rows)


@pytest.mark.parametrize("beta", [0.0, 2.5])
def test_the_loss_is_that_of_the_paper(beta: float) -> None:
    """The loss and its gradient in float64, in train mode, from a loop that shares nothing with the package."""
    module = trades(beta=beta, attack_mode="eval").double().train()
    net, batch = copy.deepcopy(module.energy_model), make_batch()
    x = batch["x_clf"]
    # Labels that the network gets right, where the attack does not change its mind.
    y = batch["y_clf"] = copy.deepcopy(net)(x).argmax(1)
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    loss = module.training_step(batch, 0)
    loss.backward()

    noise = normal_noise(0, "trades start", range(40, 48), (1, 16, 16)).double()
    x_adv = plain_attack(net.eval(), x, (x + 0.001 * noise).clamp(0, 1), tiny.ATTACK)
    net.train()
    cross_entropy = -net(x).softmax(1)[torch.arange(8), y].log().mean()
    divergence = plain_divergence(net, x, x_adv).mean()
    expected = cross_entropy + beta * divergence
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
    # Both arguments of the divergence have a gradient.
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    right, right_adv = (float((net(z).argmax(1) == y).double().mean()) for z in (x, x_adv))
    assert right > right_adv
    values = (*(v.item() for v in (expected, cross_entropy, divergence)), right, right_adv)
    names = ("loss", "clean_loss", "robust_regularizer", "accuracy", "robust_accuracy")
    assert logged == {f"train/{n}": pytest.approx(v, rel=1e-6) for n, v in zip(names, values, strict=True)}


def test_without_beta_the_gradient_is_that_of_clean_training() -> None:
    module = trades(beta=0.0).double().train()
    net, batch = copy.deepcopy(module.energy_model), make_batch()
    module.training_step(batch, 0).backward()
    nn.CrossEntropyLoss()(net(batch["x_clf"]), batch["y_clf"]).backward()
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_divergence_has_the_gradient_of_finite_differences() -> None:
    module, generator = trades(), torch.Generator().manual_seed(1)
    clean, adv = (torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(module.divergence, (clean, adv))
    assert module.divergence(clean, clean).abs().max() < 1e-15
    two, other = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(module.divergence(two, other)) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_the_attack_raises_the_divergence_inside_the_ball(norm: Any, random_start: bool) -> None:
    eps = 1.0 if norm == "L2" else 0.05
    threat = ThreatModel(norm, eps, eps / 4, num_steps=10, random_start=random_start)
    module, x = trades(threat_model=threat).double().eval(), make_batch()["x_clf"]
    x_adv = module.adversarial_examples(x, torch.zeros(8).long())
    module.threat_model = ThreatModel(norm, eps, eps / 4, num_steps=0, random_start=random_start)
    start = module.adversarial_examples(x, torch.zeros(8).long())
    before, after = (plain_divergence(module, x, z).detach() for z in (start, x_adv))
    assert (after > 2 * before).all()
    order = 2 if norm == "L2" else math.inf
    assert torch.linalg.vector_norm((x_adv - x).flatten(1), ord=order, dim=1).max() <= eps + 1e-9
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    # A random start of the threat model takes the place of the small noise.
    assert ((start - x).abs().max() > 10 * START_NOISE) == random_start


def test_labels_do_not_move_the_attack() -> None:
    module, batch = trades().double(), make_batch()
    a, b = (module.adversarial_examples(batch["x_clf"], torch.full((8,), k)) for k in (0, 9))
    assert torch.equal(a, b)


def test_each_start_depends_on_the_draw_alone() -> None:
    module, batch = trades().double().eval(), make_batch()
    x, y, draws = batch["x_clf"], batch["y_clf"], batch["draw"]
    together = module.adversarial_examples(x, y, draws)
    order = torch.tensor([5, 0, 7])
    apart = module.adversarial_examples(x[order], y[order], draws[order])
    torch.testing.assert_close(apart, together[order], rtol=0, atol=1e-11)
    assert not torch.allclose(module.adversarial_examples(x, y, draws + 1), together, rtol=0, atol=1e-9)
    other_seed = trades(seed=1).double().eval()
    assert not torch.allclose(other_seed.adversarial_examples(x, y, draws), together, rtol=0, atol=1e-9)


def test_the_start_neither_reads_nor_moves_the_global_generator() -> None:
    module, batch = trades(), make_batch(dtype=torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = module.adversarial_examples(batch["x_clf"], batch["y_clf"])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(module.adversarial_examples(batch["x_clf"], batch["y_clf"]), first)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_running_statistics_are_those_of_the_two_training_passes(mode: Any) -> None:
    """Clean images first, then adversarial ones; the attack's passes do not count."""
    module, batch = trades(attack_mode=mode).double().train(), make_batch()
    x_adv = module.adversarial_examples(batch["x_clf"], batch["y_clf"], batch["draw"])
    stem, norm = (module.energy_model.backbone.get_submodule(name) for name in ("stem", "blocks.0.bn1"))
    with torch.no_grad():
        clean, adv = (stem((z - 0.3) / 0.35).mean((0, 2, 3)) for z in (batch["x_clf"], x_adv))
    assert torch.equal(norm.get_buffer("running_mean"), torch.zeros(4))
    module.training_step(batch, 0)
    torch.testing.assert_close(norm.get_buffer("running_mean"), 0.9 * 0.1 * clean + 0.1 * adv, rtol=1e-5, atol=1e-7)
    assert int(norm.get_buffer("num_batches_tracked")) == 2


def test_the_attack_sees_clean_predictions_in_its_own_mode() -> None:
    """In either mode the walk climbs from near zero: clean and noised images are judged by the same network."""
    seen: list[Tensor] = []

    class Spy(TradesModule):
        def divergence(self, logits_clean: Tensor, logits_adv: Tensor) -> Tensor:
            result = super().divergence(logits_clean, logits_adv)
            seen.append(result.detach().max())
            assert not logits_clean.requires_grad
            return result

    batch = make_batch()
    modes: tuple[AttackMode, ...] = ("eval", "train")
    for mode in modes:
        seen.clear()
        module = Spy(tiny.energy_model(), threat_model=tiny.ATTACK, attack_mode=mode).double().train()
        module.adversarial_examples(batch["x_clf"], batch["y_clf"])
        assert 30 * seen[0] < seen[1]


def test_the_attack_sees_the_network_in_train_mode() -> None:
    """With the statistics of the batch, by hand in one step of all its images; in eval mode they end elsewhere."""
    x, found = make_batch()["x_clf"], dict[str, Tensor]()
    one = ThreatModel(eps=1.0, step_size=0.5, num_steps=1)
    modes: tuple[AttackMode, ...] = ("eval", "train")
    for mode in modes:
        module = trades(attack_mode=mode, threat_model=one).double().train()
        found[mode] = module.adversarial_examples(x, torch.zeros(8).long())
    net = copy.deepcopy(module.energy_model).train()
    start = (x + 0.001 * normal_noise(0, "trades start", range(8), (1, 16, 16)).double()).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad((net(x).softmax(1).detach() * -net(start).log_softmax(1)).sum(), start)
    delta = start.detach() + 0.5 * gradient / (gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10) - x
    delta = delta / delta.flatten(1).norm(dim=1).clamp_min(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found["train"], (x + delta).clamp(0, 1), rtol=0, atol=1e-6)
    assert float((found["train"] - found["eval"]).flatten(1).norm(dim=1).min()) > 0.01
    assert all(map(torch.equal, module.energy_model.buffers(), tiny.energy_model().double().buffers()))


class Product(TradesModule):
    """A divergence whose gradient needs the clean logits themselves."""

    def divergence(self, logits_clean: Tensor, logits_adv: Tensor) -> Tensor:
        return -(logits_clean * logits_adv).sum(1)


@pytest.mark.parametrize("kind", [TradesModule, Product])
def test_attacks_work_in_inference_mode(kind: type[TradesModule]) -> None:
    module, batch = kind(tiny.energy_model(), threat_model=tiny.ATTACK), make_batch(dtype=torch.float32)
    expected = module.adversarial_examples(batch["x_clf"], batch["y_clf"])
    with torch.inference_mode():
        result = module.adversarial_examples(batch["x_clf"].clone(), batch["y_clf"].clone())
    assert torch.equal(result, expected)


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf])
def test_a_beta_that_is_no_weight_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta must be a finite number of at least 0, got {beta}"):
        trades(beta=beta)


def test_a_missing_part_is_named() -> None:
    batch = make_batch(dtype=torch.float32)
    del batch["x_clf"]
    with pytest.raises(ValueError, match=r"TradesModule needs 'x_clf' in its batch.*data\.streams has 'clf'"):
        trades().training_step(batch, 0)


def test_training_lowers_the_loss_and_logs_its_parts(tmp_path: Path) -> None:
    weak = ThreatModel(eps=0.2, step_size=0.2, num_steps=1)
    module = TradesModule(
        tiny.energy_model(), beta=2.0, threat_model=weak, optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9)
    )
    data = tiny.digits(batch_size=64, streams=["clf"])
    losses = []
    for epochs, batches in ((1, 1), (3, 22)):
        trainer = tiny.trainer(tmp_path, max_epochs=epochs, limit_train_batches=batches)
        trainer.fit(module, datamodule=data)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[1] < 0.7 * losses[0]
    logged = {name: float(v) for name, v in trainer.callback_metrics.items()}
    names = ("loss", "clean_loss", "robust_regularizer", "accuracy", "robust_accuracy")
    assert set(logged) == {f"train/{name}" for name in (*names, "network_evaluations")}
    parts = logged["train/clean_loss"] + 2.0 * logged["train/robust_regularizer"]
    assert logged["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert logged["train/accuracy"] >= logged["train/robust_accuracy"]


def test_a_subclass_changes_one_equation() -> None:
    class Symmetric(TradesModule):
        def divergence(self, logits_clean: Tensor, logits_adv: Tensor) -> Tensor:
            return super().divergence(logits_clean, logits_adv) + super().divergence(logits_adv, logits_clean)

    clean, adv = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    plain, symmetric = trades(), Symmetric(EnergyModel(nn.Identity()))
    assert torch.equal(symmetric.divergence(clean, adv), symmetric.divergence(adv, clean))
    assert symmetric.robust_regularizer(clean, adv) > plain.robust_regularizer(clean, adv)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_a_configuration_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1's config with another class and one more argument."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "configs" / "digits" / "stage1.yaml").read_text(encoding="utf-8"))
    config["model"]["class_path"] = "dat_lightning.modules.TradesModule"
    config["model"]["init_args"]["beta"] = 3.5
    Path("trades.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    made: list[tuple[EnergyModule, Trainer]] = []
    monkeypatch.setattr(DATCLI, "after_fit", lambda cli: made.append((cli.model, cli.trainer)), raising=False)
    main(["fit", "--config", "trades.yaml", "--config", str(ROOT / "tests" / "conf" / "tiny.yaml")])
    ((module, trainer),) = made
    assert isinstance(module, TradesModule)
    assert (module.beta, module.threat_model.num_steps) == (3.5, 2)
    assert trainer.global_step == 2
    assert "train/robust_regularizer" in trainer.callback_metrics
