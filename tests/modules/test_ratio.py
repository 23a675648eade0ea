"""RATIO: what it minimises, what its two attacks climb, whose statistics batch norm takes, and that it trains."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dat_lightning import EnergyModel, RATIOModule, ThreatModel
from dat_lightning.cli import DATCLI, main
from tests import tiny
from tests.modules import by_hand

ROOT = Path(__file__).resolve().parents[2]
OOD_ATTACK = ThreatModel(eps=0.8, step_size=0.5, num_steps=3)


def ratio(**kwargs: Any) -> RATIOModule:
    module = RATIOModule(
        **{
            "energy_model": tiny.energy_model(),
            "optimizer": tiny.SGD,
            "threat_model": tiny.ATTACK,
            "ood_threat_model": OOD_ATTACK,
            **kwargs,
        }
    )
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_loss_is_that_of_the_paper(weight: float) -> None:
    """The loss and its gradient in float64, in train mode, from a loop that shares nothing with the package."""
    module = ratio(ood_weight=weight).double().train()
    net, batch = copy.deepcopy(module.energy_model), by_hand.batch()
    x, y, x_ood = (batch[name] for name in ("x_clf", "y_clf", "x_ood"))
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    loss = module.training_step(batch, 0)
    loss.backward()

    net.eval()
    x_adv = by_hand.walk(net, x, tiny.ATTACK, "cross-entropy", y)
    x_ood_adv = by_hand.walk(net, x_ood, OOD_ATTACK, "uniform")
    net.train()
    logits = net(torch.cat([x, x_adv, x_ood_adv]))
    clean, adversarial = (by_hand.negative_log_likelihood(part, y) for part in (logits[:6], logits[6:12]))
    divergence = by_hand.divergence_of_uniform(logits[12:]).mean()
    expected = (clean + adversarial) / 2 + weight / 2 * divergence
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    right, right_adv = (float((part.argmax(1) == y).double().mean()) for part in (logits[:6], logits[6:12]))
    values = (*(v.item() for v in (expected, clean, adversarial, divergence)), right, right_adv)
    names = ("loss", "clean_loss", "adversarial_loss", "ood_loss", "accuracy", "robust_accuracy")
    assert logged == {f"train/{n}": pytest.approx(v, rel=1e-6) for n, v in zip(names, values, strict=True)}


class Given(RATIOModule):
    """Logits by hand in the place of the network's, and no attacks."""

    logits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.logits

    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        return x

    def ood_adversarial_examples(self, x_ood: Tensor, draws: Tensor | None = None) -> Tensor:
        return x_ood


def test_the_equation_at_logits_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities (¾, ¼) on a clean image of class 0, (½, ½) on its adversarial one, (¾, ¼) on the other; λ = 2."""
    module = Given(EnergyModel(nn.Identity()), ood_weight=2.0)
    monkeypatch.setattr(module, "log_training", lambda *args, **kwargs: None)
    module.logits = torch.tensor([[math.log(3.0), 0.0], [1.0, 1.0], [math.log(3.0), 0.0]])
    images = torch.zeros(1, 1, 2, 2)
    loss = module.training_step({"x_clf": images, "y_clf": torch.tensor([0]), "x_ood": images}, 0)
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(loss) == pytest.approx(0.5 * (math.log(4 / 3) + math.log(2)) + 0.5 * 2 * divergence, rel=1e-6)


def test_the_attack_raises_confidence_inside_its_own_ball() -> None:
    module = ratio(ood_threat_model=ThreatModel(eps=2.0, step_size=0.4, num_steps=10)).double().eval()
    x = by_hand.batch()["x_ood"]
    x_adv = module.ood_adversarial_examples(x)
    before, after = (by_hand.divergence_of_uniform(module(z).detach()) for z in (x, x_adv))
    assert (after > before).all()
    assert (module(x_adv).softmax(1).amax(1) > module(x).softmax(1).amax(1)).all()
    distance = (x_adv - x).flatten(1).norm(dim=1)
    assert (distance > 1.0).all()
    assert (distance <= 2.0 + 1e-9).all()
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_running_statistics_are_those_of_all_three_parts_together(mode: Any) -> None:
    """One batch of clean, adversarial and attacked images; passes of the attacks do not count."""
    module, batch = ratio(attack_mode=mode).double().train(), by_hand.batch()
    x_adv = module.adversarial_examples(batch["x_clf"], batch["y_clf"], batch["draw"])
    x_ood_adv = module.ood_adversarial_examples(batch["x_ood"], batch["draw"])
    stem, norm = (module.energy_model.backbone.get_submodule(name) for name in ("stem", "blocks.0.bn1"))
    with torch.no_grad():
        together = stem((torch.cat([batch["x_clf"], x_adv, x_ood_adv]) - 0.3) / 0.35).mean((0, 2, 3))
    assert torch.equal(norm.get_buffer("running_mean"), torch.zeros(4))
    module.training_step(batch, 0)
    torch.testing.assert_close(norm.get_buffer("running_mean"), 0.1 * together, rtol=1e-5, atol=1e-7)
    assert int(norm.get_buffer("num_batches_tracked")) == 1


def test_both_attacks_see_the_network_in_train_mode() -> None:
    """With the statistics of the batch, by hand in one step of all its images; in eval mode they end elsewhere."""
    one = ThreatModel(eps=1.0, step_size=0.5, num_steps=1)
    batch, found = by_hand.batch(), dict[str, list[Tensor]]()
    x, y, x_ood = (batch[name] for name in ("x_clf", "y_clf", "x_ood"))
    for mode in ("eval", "train"):
        module = ratio(attack_mode=mode, threat_model=one, ood_threat_model=one).double().train()
        found[mode] = [module.adversarial_examples(x, y), module.ood_adversarial_examples(x_ood)]
    net = copy.deepcopy(module.energy_model).train()
    heights = [by_hand.negative_log_likelihood(net(x.requires_grad_()), y)]
    heights.append(by_hand.divergence_of_uniform(net(x_ood.requires_grad_())).mean())
    for images, height, trained, evaluated in zip((x, x_ood), heights, found["train"], found["eval"], strict=True):
        (gradient,) = torch.autograd.grad(height, images)
        step = 0.5 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        torch.testing.assert_close(trained, (images.detach() + step).clamp(0, 1), rtol=0, atol=1e-6)
        assert float((trained - evaluated).flatten(1).norm(dim=1).min()) > 0.01
    assert all(map(torch.equal, module.energy_model.buffers(), tiny.energy_model().double().buffers()))


def test_network_evaluations_are_two_attacks_and_three_training_passes() -> None:
    module, batch = ratio().train(), by_hand.batch(dtype=torch.float32)
    module.training_step(batch, 0)
    assert module.network_evaluations == 6 * (2 * 2 + 2 * 3 + 3 * 3)


def test_the_default_attack_is_the_papers() -> None:
    threat = RATIOModule(tiny.energy_model()).ood_threat_model
    assert (threat.norm, threat.eps, threat.num_steps, threat.random_start) == ("L2", 1.0, 20, False)


def test_what_is_refused() -> None:
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"ood_weight must be a finite number of at least 0, got {weight}"):
            ratio(ood_weight=weight)
    with pytest.raises(ValueError, match="ood_threat_model must be of the class ThreatModel"):
        ratio(ood_threat_model={"eps": 1.0})
    batch = by_hand.batch(dtype=torch.float32)
    del batch["x_ood"]
    with pytest.raises(ValueError, match=r"RATIOModule needs 'x_ood' in its batch.*data\.streams has 'ood'"):
        ratio().training_step(batch, 0)


def test_training_makes_digits_certain_and_photographs_uncertain(tmp_path: Path) -> None:
    weak = ThreatModel(eps=0.2, step_size=0.2, num_steps=1)
    module = RATIOModule(
        tiny.energy_model(),
        threat_model=weak,
        ood_threat_model=weak,
        optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9),
    )
    losses = []
    for epochs, batches in ((1, 1), (3, 22)):
        trainer = tiny.trainer(tmp_path, max_epochs=epochs, limit_train_batches=batches)
        trainer.fit(module, datamodule=tiny.digits(batch_size=64, streams=["clf", "ood"]))
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[1] < 0.7 * losses[0]
    logged = {name: float(v) for name, v in trainer.callback_metrics.items()}
    parts = logged["train/clean_loss"] + logged["train/adversarial_loss"] + logged["train/ood_loss"]
    assert logged["train/loss"] == pytest.approx(parts / 2, rel=1e-5)
    assert logged["train/ood_loss"] < 1


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_configuration_trains_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, with samples; then two more from the checkpoint end as four that were not interrupted."""
    monkeypatch.chdir(tmp_path)
    made: list[Any] = []
    monkeypatch.setattr(DATCLI, "after_fit", lambda cli: made.append(cli.trainer), raising=False)
    given = [str(ROOT / "configs" / "digits" / "ratio.yaml"), str(ROOT / "tests" / "conf" / "tiny.yaml")]
    arguments = ["fit", *(word for path in given for word in ("--config", path))]
    main([*arguments, "--trainer.max_epochs=1"])
    assert made[0].global_step == 2
    assert isinstance(made[0].lightning_module, RATIOModule)
    assert set(made[0].datamodule.streams) == {"clf", "ood"}
    assert {"train/ood_loss", "val/robust_accuracy", "val/fid"} <= set(made[0].callback_metrics)
    main([*arguments, "--trainer.max_epochs=2", "--ckpt_path=runs/checkpoints/last.ckpt"])
    resumed = torch.load("runs/checkpoints/last.ckpt", weights_only=True)
    Path("runs/checkpoints/last.ckpt").unlink()
    main([*arguments, "--trainer.max_epochs=2"])
    whole = torch.load("runs/checkpoints/last.ckpt", weights_only=True)
    assert resumed["network_evaluations"] == whole["network_evaluations"] > 0
    assert resumed["global_step"] == whole["global_step"] == 4
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
