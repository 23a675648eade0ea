"""DAT with contrastive samples of all classes alike: chains by hand, which classes those are, and what it learns."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_lightning import DATBalancedModule, EnergyModel, SmallResNet
from dat_lightning.core import unbounded_ascent
from dat_lightning.core.random_streams import stream_seed
from dat_lightning.modules import JointLogits
from tests import tiny
from tests.modules import by_hand
from tests.modules.resumed import CONFIGS, TINY, epoch_that_goes_on
from tests.modules.two_steps import with_two_steps


def started(**kwargs: Any) -> Any:
    return with_two_steps(DATBalancedModule, **kwargs)


def test_the_loss_is_that_of_chains_to_classes_of_their_own() -> None:
    """In float64; the labels of the images enter nowhere, and the curriculum's AUC compares −E(x)."""
    module = started(energy_weight=2.0).double().train()
    net, batch = copy.deepcopy(module.energy_model).eval(), by_hand.batch()
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    loss = module.training_step({**batch, "y_gen": torch.zeros(6, dtype=torch.long)}, 0)
    loss.backward()

    labels = torch.tensor([stream_seed(0, "contrastive class", k) % 10 for k in batch["draw"].tolist()])
    assert len(labels.unique()) > 2
    x_contrast = by_hand.walk(net, batch["x_ood"], unbounded_ascent(0.4, 2), "logit", labels)
    x_adv = by_hand.walk(net, batch["x_clf"], tiny.ATTACK, "cross-entropy", batch["y_clf"])
    real, fake = net(batch["x_gen"]).logsumexp(1), net(x_contrast).logsumexp(1)
    bce = -(real.sigmoid().log().sum() + (1 - fake.sigmoid()).log().sum()) / 12
    expected = 2.0 * bce + by_hand.negative_log_likelihood(net(x_adv), batch["y_clf"])
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    wins = sum((float(a > b) + 0.5 * float(a == b)) / 36 for a in real for b in fake)
    assert logged["train/auc"] == pytest.approx(wins, rel=1e-6)


@pytest.mark.parametrize("count", [2, 10])
def test_classes_come_equally_often_whatever_their_number(count: int) -> None:
    """As labels below K, also for who overrides what the chain climbs; and the network is as it was."""
    module = started(energy_model=EnergyModel(SmallResNet(num_classes=count, widths=(4, 8)), mean=[0.3], std=[0.35]))
    seen: list[torch.Tensor] = []
    module.ascend = lambda ascent, x, y, draws: seen.append(y) or x  # type: ignore[func-returns-value]
    before = copy.deepcopy(module.train().state_dict())
    modes = [part.training for part in module.modules()]
    module.contrastive_samples(torch.rand(6000, 1, 16, 16), torch.zeros(6000).long(), torch.arange(6000))
    assert seen[0].tolist() == [stream_seed(0, "contrastive class", k) % count for k in range(6000)]
    found = torch.bincount(seen[0], minlength=count).double() / 6000
    assert float((found - 1 / count).abs().max()) < 0.02
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.network_evaluations == 0


def test_its_optimum_knows_how_common_classes_are() -> None:
    """Two places, one for each class, where chains arrive: energies that minimise the BCE are −log K p(y)."""
    module, shares = started(), torch.tensor([0.8, 0.2], dtype=torch.float64)
    energy = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    n = 1000
    real = torch.repeat_interleave(torch.arange(2), (shares * n).long())
    optimizer = torch.optim.LBFGS([energy], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        gen, contrast = (-energy[place].unsqueeze(1) for place in (real, torch.arange(n) % 2))
        loss: torch.Tensor = module.energy_loss(JointLogits(gen, contrast, gen[:0]))
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(-energy.detach(), (2 * shares).log(), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_configuration_trains_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = epoch_that_goes_on(tmp_path, monkeypatch, CONFIGS / "digits" / "dat_balanced.yaml", TINY)
    assert isinstance(trainer.lightning_module, DATBalancedModule)
