"""DAT with a noise-contrastive term: the loss by hand for both proposals, its optimum, and what it is fitted to."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from scipy import optimize  # type: ignore[import-untyped]
from torch import Tensor

from dat_lightning import DATNoiseContrastiveModule, DualAdversarialModule
from dat_lightning.core import TiedGaussians, unbounded_ascent
from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import stream_generator
from tests import tiny
from tests.core.test_noise_contrastive import images, log_q
from tests.modules import by_hand
from tests.modules.resumed import CONFIGS, TINY, epoch_that_goes_on
from tests.modules.two_steps import with_two_steps


def started(kind: type[DualAdversarialModule] = DATNoiseContrastiveModule, **kwargs: Any) -> Any:
    return with_two_steps(kind, **kwargs)


def standard(name: str, draws: Tensor, shape: tuple[int, ...], kind: Any = torch.randn) -> Tensor:
    return torch.stack([kind(shape, generator=stream_generator(0, name, int(k))) for k in draws]).double()


@pytest.mark.parametrize(("proposal", "noise"), [("uniform", 0.0), ("gaussians", 0.2)])
def test_the_loss_is_that_of_a_plain_loop(proposal: Any, noise: float) -> None:
    """In float64, with weights, from a loop that shares the names of random streams with the package."""
    module = started(nce_weight=0.7, nce_scale=1.5, proposal=proposal, data_noise=noise, energy_weight=2.0)
    data, labels = images()
    module.double().train()
    if proposal == "gaussians":
        module.gaussians = TiedGaussians.fitted(data, labels, noise)
    net, batch = copy.deepcopy(module.energy_model).eval(), by_hand.batch()
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    loss = module.training_step(batch, 0)
    loss.backward()

    x_contrast = by_hand.walk(net, batch["x_ood"], unbounded_ascent(0.4, 2), "logit", batch["y_gen"])
    x_adv = by_hand.walk(net, batch["x_clf"], tiny.ATTACK, "cross-entropy", batch["y_clf"])
    real, fake = net(batch["x_gen"]).logsumexp(1), net(x_contrast).logsumexp(1)
    bce = -(real.sigmoid().log().sum() + (1 - fake.sigmoid()).log().sum()) / 12
    cross_entropy = by_hand.negative_log_likelihood(net(x_adv), batch["y_clf"])
    x_data = batch["x_gen"] + noise * standard("data noise", batch["draw"], (1, 16, 16))
    if proposal == "uniform":
        x_q = standard("proposal", batch["draw"], (1, 16, 16), torch.rand)
        q_data = q_q = torch.zeros(6, dtype=torch.float64)
    else:
        rows = data.flatten(1).numpy()
        means = np.stack([rows[labels.numpy() == k].mean(0) for k in range(3)])
        spread = rows - means[labels.numpy()]
        factor = np.linalg.cholesky(spread.T @ spread / len(rows) + noise**2 * np.eye(256))
        ends = np.cumsum([14 / 40, 13 / 40])  # and 13 of the last
        u = standard("proposal component", batch["draw"], (), torch.rand).numpy()
        component = [int((value >= ends).sum()) for value in u]
        moved = standard("proposal", batch["draw"], (1, 16, 16)).flatten(1).numpy() @ factor.T
        x_q = torch.from_numpy(means[component] + moved).view(6, 1, 16, 16)
        q_data, q_q = (torch.from_numpy(log_q(x, data, labels, noise)) for x in (x_data, x_q))
    a, b = 1.5 * net(x_data).logsumexp(1) - q_data, 1.5 * net(x_q).logsumexp(1) - q_q

    def value(c: float) -> float:
        return float(np.logaddexp(0, -(a.detach().numpy() + c)).sum() + np.logaddexp(0, b.detach().numpy() + c).sum())

    around = -0.5 * float((a.mean() + b.mean()).detach())
    c = optimize.minimize_scalar(value, bracket=(around - 50, around, around + 50), tol=1e-12).x
    nce = ((1 + (-(a + c)).exp()).log().sum() + (1 + (b + c).exp()).log().sum()) / 12
    expected = 2.0 * bce + cross_entropy + 0.7 * nce
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-7, atol=1e-8)
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert logged["train/nce_loss"] == pytest.approx(nce.item(), rel=1e-6)


def test_the_optimum_of_the_term_is_the_density_where_energies_are_free() -> None:
    """On four places with known p, uniform q: −s E − log p is the same on all."""
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    energy = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    module = started(nce_scale=2.0)
    n = 400
    counts = (p * n).long()
    data, uniform = (torch.repeat_interleave(torch.arange(4), c) for c in (counts, torch.full((4,), n // 4)))
    optimizer = torch.optim.LBFGS([energy], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = module.noise_contrastive_loss(-2.0 * energy[data], -2.0 * energy[uniform])
        loss.backward()
        return loss

    optimizer.step(closure)
    apart = -2.0 * energy.detach() - p.log()
    assert float(apart.max() - apart.min()) < 1e-4


def test_without_weight_it_is_dat_to_the_last_bit() -> None:
    batch, found = by_hand.batch(dtype=torch.float32), []
    for module in (started(DualAdversarialModule), started(nce_weight=0.0)):
        module.train().training_step(batch, 0).backward()
        found.append([p.grad for p in module.parameters()] + [torch.tensor(module.network_evaluations)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("noise", "more"), [(0.0, 3), (0.1, 6)])
def test_network_evaluations_are_those_of_dat_and_of_the_proposals(noise: float, more: int) -> None:
    module = started(proposal="gaussians" if noise else "uniform", data_noise=noise).train()
    if noise:
        data, labels = images()
        module.gaussians = TiedGaussians.fitted(data.float(), labels, noise)
    module.training_step(by_hand.batch(dtype=torch.float32), 0)
    assert module.network_evaluations == 6 * (2 * 2 + 2 * 2 + 9 + more)


def test_gaussians_are_there_for_whoever_trains_before_the_fit_begins(tmp_path: Path) -> None:
    """As a search for a learning rate does, in a callback's ``on_fit_start``."""

    class Early(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.found = pl_module.proposals([3], torch.zeros(1, 1, 16, 16))  # type: ignore[operator]

    early, module = Early(), DATNoiseContrastiveModule(tiny.energy_model(), proposal="gaussians", data_noise=0.1)
    tiny.trainer(tmp_path, [early], max_steps=1, limit_val_batches=0).fit(module, tiny.digits())
    assert torch.equal(early.found, module.proposals([3], torch.zeros(1, 1, 16, 16)))
    assert early.found.min() < 0  # uniform noise is not


def test_proposals_are_those_of_float32_in_mixed_precision() -> None:
    """As their density is; a product in bfloat16 would round them."""
    module, x = started(proposal="gaussians", data_noise=0.1), torch.zeros(2, 1, 16, 16)
    module.gaussians = TiedGaussians.fitted(*images(), 0.1)
    expected = module.proposals([3, 4], x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.proposals([3, 4], x), expected)


def test_gaussians_are_converted_once() -> None:
    """From float64; a covariance is large."""
    module, x = started(proposal="gaussians", data_noise=0.1), torch.zeros(2, 1, 16, 16)
    module.gaussians = TiedGaussians.fitted(*images(), 0.1)
    module.proposals([3, 4], x)
    kept = module.gaussians
    assert kept.factor.dtype == kept.means.dtype == torch.float32
    module.proposal_log_density(x)
    assert module.gaussians.factor is kept.factor
    assert module.gaussians.means is kept.means


def test_images_too_large_for_a_covariance_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16×16 values each; no further one is read."""
    module = DATNoiseContrastiveModule(tiny.energy_model(), proposal="gaussians", data_noise=0.1)
    monkeypatch.setattr("dat_lightning.modules.dat_nce.MOST_VALUES", 255)
    with pytest.raises(InputError, match=r"images of at most 255 values, .* got 1×16×16$"):
        tiny.trainer(tmp_path).fit(module, tiny.digits())
    monkeypatch.setattr("dat_lightning.modules.dat_nce.MOST_VALUES", 256)
    tiny.trainer(tmp_path, limit_train_batches=1).fit(module, tiny.digits())


def test_what_is_refused(tmp_path: Path) -> None:
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"nce_weight must be a finite number of at least 0, got {value}"):
            started(nce_weight=value)
        with pytest.raises(InputError, match=f"data_noise must be a finite number of at least 0, got {value}"):
            started(data_noise=value)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"nce_scale must be positive and finite, got {value}"):
            started(nce_scale=value)
    for proposal, noise in (("normal", 0.1), ("gaussians", 0.0), ("uniform", 0.1)):
        with pytest.raises(InputError, match=f"proposal must be .*, got '{proposal}' and {noise}"):
            started(proposal=proposal, data_noise=noise)
    module = DATNoiseContrastiveModule(tiny.energy_model(), proposal="gaussians", data_noise=0.1)
    with pytest.raises(InputError, match="fits Gaussians to the training images of a PairedDataModule"):
        tiny.trainer(tmp_path).fit(module, [by_hand.batch(dtype=torch.float32)], [])


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_configuration_trains_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = epoch_that_goes_on(tmp_path, monkeypatch, CONFIGS / "digits" / "dat_nce.yaml", TINY)
    module = trainer.lightning_module
    assert isinstance(module, DATNoiseContrastiveModule)
    assert module.gaussians is not None
    assert module.gaussians.means.shape == (10, 256)
    assert {"train/nce_loss", "train/energy_loss", "val/robust_accuracy", "val/fid"} <= set(trainer.callback_metrics)
