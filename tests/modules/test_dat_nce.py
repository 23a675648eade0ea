"""DAT with a noise-contrastive term: the loss by hand for both proposals, q's density, its samples, and c."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from scipy import optimize, stats  # type: ignore[import-untyped]
from torch import Tensor

from dat_lightning import DATNoiseContrastiveModule, DualAdversarialModule
from dat_lightning.cli import DATCLI, main
from dat_lightning.core import unbounded_ascent
from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import stream_generator
from dat_lightning.modules.dat_nce import TiedGaussians, best_offset
from tests import tiny
from tests.modules import by_hand
from tests.modules.resumed import check_resumed_after_an_epoch
from tests.modules.two_steps import with_two_steps

ROOT = Path(__file__).resolve().parents[2]


def started(kind: type[DualAdversarialModule] = DATNoiseContrastiveModule, **kwargs: Any) -> Any:
    return with_two_steps(kind, **kwargs)


def images(n: int = 40, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, 1, side, side, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def log_q(x: Tensor, data: Tensor, labels: Tensor, noise: float) -> np.ndarray:
    """Log q by scipy, from means and the mean covariance within classes of NumPy."""
    rows = data.flatten(1).numpy()
    means = [rows[labels.numpy() == k].mean(0) for k in range(3)]
    spread = np.concatenate([rows[labels.numpy() == k] - means[k] for k in range(3)])
    covariance = spread.T @ spread / len(rows) + noise**2 * np.eye(rows.shape[1])
    each = [stats.multivariate_normal(mean, covariance).logpdf(x.flatten(1).numpy()) for mean in means]
    shares = np.log(np.bincount(labels.numpy()) / len(labels))[:, None]
    return np.asarray(np.logaddexp.reduce(shares + np.stack(each)))


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


def test_log_q_is_that_of_scipy_and_samples_have_its_moments() -> None:
    data, labels = images(60, side=2)
    q = TiedGaussians.fitted(data, labels, 0.1)
    x = torch.randn(30, 1, 2, 2, dtype=torch.float64)
    np.testing.assert_allclose(q.log_prob(x).numpy(), log_q(x, data, labels, 0.1), rtol=1e-10)
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    samples = q.sample(uniform, torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64)).flatten(1)
    rows = data.flatten(1)
    torch.testing.assert_close(samples.mean(0), rows.mean(0), rtol=0, atol=0.01)
    # Within and between classes: the covariance of all images, and that of the noise.
    covariance = torch.cov(rows.T, correction=0) + 0.01 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(samples.T), covariance, rtol=0, atol=0.01)


def test_a_class_of_one_image_is_a_component_of_its_own() -> None:
    data, labels = images(9, side=2)
    labels = torch.tensor([4, 4, 4, 4, 7, 7, 7, 7, 9])
    q = TiedGaussians.fitted(data, labels, 0.1)
    assert q.weights.tolist() == pytest.approx([4 / 9, 4 / 9, 1 / 9])
    torch.testing.assert_close(q.means[2], data[8].flatten())


def test_c_is_the_best_and_that_of_separated_logits_lies_between() -> None:
    a, b = torch.randn(50, dtype=torch.float64) + 300, torch.randn(50, dtype=torch.float64) + 299

    def value(c: float) -> float:
        return float(np.logaddexp(0, -(a.numpy() + c)).sum() + np.logaddexp(0, b.numpy() + c).sum())

    c = float(best_offset(a, b))
    assert c == pytest.approx(optimize.minimize_scalar(value, bracket=(-310, -300, -290), tol=1e-10).x, abs=1e-5)
    assert -1000 < float(best_offset(torch.tensor([1000.0]), torch.tensor([-7.0]))) < 7


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
    monkeypatch.chdir(tmp_path)
    made: list[Any] = []
    monkeypatch.setattr(DATCLI, "after_fit", lambda cli: made.append(cli.trainer), raising=False)
    given = [str(ROOT / "configs" / "digits" / "dat_nce.yaml"), str(ROOT / "tests" / "conf" / "tiny.yaml")]
    arguments = ["fit", *(word for path in given for word in ("--config", path))]
    arguments += ["--model.curriculum.auc_threshold=0", "--model.curriculum.window_samples=32"]
    main([*arguments, "--trainer.max_epochs=1"])
    assert made[0].global_step == 2
    module = made[0].lightning_module
    assert isinstance(module, DATNoiseContrastiveModule)
    assert module.gaussians is not None
    assert module.gaussians.means.shape == (10, 256)
    assert {"train/nce_loss", "train/energy_loss", "val/robust_accuracy", "val/fid"} <= set(made[0].callback_metrics)
    check_resumed_after_an_epoch(arguments)
