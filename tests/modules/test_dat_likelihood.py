"""DAT with a likelihood term: the loss by hand, chains from the data, and that without weight it is DAT."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dat_lightning import DATLikelihoodModule, DualAdversarialModule, EnergyModel
from dat_lightning.core import unbounded_ascent
from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import stream_generator
from tests import tiny
from tests.modules import by_hand
from tests.modules.resumed import CONFIGS, TINY, epoch_that_goes_on
from tests.modules.two_steps import with_two_steps


def started(kind: type[DualAdversarialModule] = DATLikelihoodModule, **kwargs: Any) -> Any:
    return with_two_steps(kind, **kwargs)


def langevin(net: nn.Module, x: Tensor, draws: Tensor, steps: int, step_size: float, noise: float) -> Tensor:
    """One image at a time, with noise from its own streams."""
    rows = []
    for image, draw in zip(x.split(1), draws.tolist(), strict=True):
        state = image.clone()
        for number in range(steps):
            state = state.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(net(state)[0].exp().sum().log(), state)
            generator = stream_generator(0, f"noise of step {number}", draw)
            moved = step_size * gradient + noise * torch.randn(image.shape[1:], generator=generator)
            state = (state.detach() + moved).clamp(0, 1)
        rows.append(state.detach())
    return torch.cat(rows)


@pytest.mark.parametrize("merge", [True, False])
def test_the_loss_is_that_of_a_plain_loop(merge: bool) -> None:
    module = started(
        likelihood_weight=0.7,
        likelihood_steps=3,
        likelihood_step_size=0.5,
        likelihood_noise=0.1,
        energy_weight=2.0,
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
    x_chain = langevin(net, batch["x_gen"], batch["draw"], 3, 0.5, 0.1)
    real, fake = net(batch["x_gen"]).logsumexp(1), net(x_contrast).logsumexp(1)
    bce = -(real.sigmoid().log().sum() + (1 - fake.sigmoid()).log().sum()) / 12
    term = (net(x_chain).logsumexp(1).sum() - real.sum()) / 6
    expected = 2.0 * bce + by_hand.negative_log_likelihood(net(x_adv), batch["y_clf"]) + 0.7 * term
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-7, atol=1e-8)
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert logged["train/likelihood_loss"] == pytest.approx(term.item(), rel=1e-5, abs=1e-8)
    assert module.network_evaluations == 6 * (2 * 2 + 2 * 2 + 9 + 2 * 3 + 3)


class Bowl(nn.Module):
    """−E(x) = −a ‖x − ½‖² of two coordinates."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor) -> Tensor:
        return -self.a * (x - 0.5).flatten(1).square().sum(1, keepdim=True)


@pytest.mark.parametrize(("deviation", "sign"), [(0.05, 1.0), (0.2, -1.0)])
def test_a_bowl_becomes_steeper_for_narrow_data_and_flatter_for_broad(deviation: float, sign: float) -> None:
    """exp(−E) is a Gaussian of variance 1/(2a); at a = 50 its deviation is 0.1."""
    module = started(energy_model=EnergyModel(Bowl(50.0)), likelihood_steps=30, likelihood_step_size=5e-4)
    module.likelihood_chain = DATLikelihoodModule(
        module.energy_model, likelihood_steps=30, likelihood_step_size=5e-4, likelihood_noise=1e-3**0.5
    ).likelihood_chain
    x = (0.5 + deviation * torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    samples = module.chain_samples(x, torch.zeros(len(x)).long())
    energies = [-module.energy_model(part).squeeze(1) for part in (x, samples)]
    module.likelihood_loss(*energies).backward()
    # The loss falls where a moves against its gradient.
    assert -float(module.energy_model.backbone.a.grad) * sign > 0


def test_without_weight_it_is_dat_to_the_last_bit() -> None:
    batch, found = by_hand.batch(dtype=torch.float32), []
    for module in (started(DualAdversarialModule), started(likelihood_weight=0.0)):
        module.train().training_step(batch, 0).backward()
        found.append([p.grad for p in module.parameters()] + [torch.tensor(module.network_evaluations)])
    assert all(map(torch.equal, *found))


def test_what_is_refused() -> None:
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"likelihood_weight must be a finite number of at least 0, got {value}"):
            started(likelihood_weight=value)
    with pytest.raises(InputError, match="likelihood_steps must be at least 1, got 0"):
        started(likelihood_steps=0)
    with pytest.raises(InputError, match="noise must be a finite deviation of at least 0, got -1"):
        started(likelihood_noise=-1.0)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_configuration_trains_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = epoch_that_goes_on(tmp_path, monkeypatch, CONFIGS / "digits" / "dat_likelihood.yaml", TINY)
    assert isinstance(trainer.lightning_module, DATLikelihoodModule)
    assert {"train/likelihood_loss", "train/energy_loss", "val/fid"} <= set(trainer.callback_metrics)
