"""DAT with RATIO's term: the loss by hand for both sources, what it costs, and that without weight it is DAT."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_lightning import DATRatioModule, DualAdversarialModule, ThreatModel
from dat_lightning.core import unbounded_ascent
from tests import tiny
from tests.modules import by_hand
from tests.modules.resumed import CONFIGS, TINY, epoch_that_goes_on
from tests.modules.two_steps import with_two_steps

OOD_ATTACK = ThreatModel(eps=0.8, step_size=0.5, num_steps=3)


def started(kind: type[DualAdversarialModule] = DATRatioModule, **kwargs: Any) -> Any:
    return with_two_steps(kind, **kwargs)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("source", ["attack", "chain"])
def test_the_loss_is_that_of_a_plain_loop(source: Any, merge: bool) -> None:
    """In float64, with weights and R1, from a loop that shares nothing with the package."""
    module = started(
        ood_source=source,
        ood_weight=0.7,
        ood_threat_model=OOD_ATTACK,
        energy_weight=2.0,
        classification_weight=0.5,
        r1_weight=0.1,
        merge_forwards=merge,
    )
    module.double().train()
    net, batch = copy.deepcopy(module.energy_model).eval(), by_hand.batch()
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    loss = module.training_step(batch, 0)
    loss.backward()

    x_contrast = by_hand.walk(net, batch["x_ood"], unbounded_ascent(0.4, 2), "logit", batch["y_gen"])
    x_adv = by_hand.walk(net, batch["x_clf"], tiny.ATTACK, "cross-entropy", batch["y_clf"])
    x_gen = batch["x_gen"].clone().requires_grad_()
    real, fake = net(x_gen).logsumexp(1), net(x_contrast).logsumexp(1)
    bce = -(real.sigmoid().log().sum() + (1 - fake.sigmoid()).log().sum()) / 12
    (gradient,) = torch.autograd.grad(real.sum(), x_gen, create_graph=True)
    r1 = 0.5 * gradient.square().sum((1, 2, 3)).mean()
    x_uncertain = x_contrast if source == "chain" else by_hand.walk(net, batch["x_ood"], OOD_ATTACK, "uniform")
    term = by_hand.divergence_of_uniform(net(x_uncertain)).mean()
    cross_entropy = by_hand.negative_log_likelihood(net(x_adv), batch["y_clf"])
    expected = 2.0 * bce + 0.5 * cross_entropy + 0.1 * r1 + 0.7 * term
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    assert logged["train/loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert logged["train/ood_loss"] == pytest.approx(term.item(), rel=1e-6)


@pytest.mark.parametrize("source", ["attack", "chain"])
def test_without_weight_it_is_dat_to_the_last_bit(source: Any) -> None:
    batch, found = by_hand.batch(dtype=torch.float32), []
    for module in (started(DualAdversarialModule), started(ood_weight=0.0, ood_source=source)):
        module.train().training_step(batch, 0).backward()
        found.append([p.grad for p in module.parameters()] + [torch.tensor(module.network_evaluations)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("source", "more"), [("attack", 2 * 3 + 3), ("chain", 0)])
def test_network_evaluations_are_those_of_dat_and_of_the_attack(source: Any, more: int) -> None:
    module = started(ood_source=source, ood_threat_model=OOD_ATTACK).train()
    module.training_step(by_hand.batch(dtype=torch.float32), 0)
    assert module.network_evaluations == 6 * (2 * 2 + 2 * 2 + 9 + more)


def test_what_is_refused() -> None:
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"ood_weight must be a finite number of at least 0, got {weight}"):
            started(ood_weight=weight)
    with pytest.raises(ValueError, match="ood_source must be 'attack' or 'chain', got 'chains'"):
        started(ood_source="chains")
    with pytest.raises(ValueError, match="energy_weight must be a finite number of at least 0, got -1"):
        started(energy_weight=-1.0)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
@pytest.mark.parametrize("source", ["attack", "chain"])
def test_the_configuration_trains_it_and_goes_on(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [f"--model.ood_source={source}"]
    trainer = epoch_that_goes_on(
        tmp_path, monkeypatch, CONFIGS / "digits" / "dat_ratio.yaml", TINY, arguments=arguments
    )
    assert isinstance(trainer.lightning_module, DATRatioModule)
    assert {"train/ood_loss", "train/energy_loss", "val/robust_accuracy", "val/fid"} <= set(trainer.callback_metrics)
