"""What the two stages compute, and what they move and leave alone."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_lightning import (
    AUCCurriculum,
    DualAdversarialModule,
    EnergyModel,
    EnergyModule,
    JEMModule,
    RATIOModule,
    RobustClassifierModule,
    ThreatModel,
    TradesModule,
)
from dat_lightning.core.errors import TrainingFailureError
from dat_lightning.modules import JointLogits
from tests import tiny

BATCH_KEYS = ("x_gen", "y_gen", "x_clf", "y_clf", "x_ood")


def make_batch(n: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = {f"x_{k}": torch.rand(n, 1, 16, 16, generator=generator).to(dtype) for k in ("gen", "clf", "ood")}
    labels = {f"y_{k}": torch.randint(0, 10, (n,), generator=generator) for k in ("gen", "clf")}
    return {**images, **labels, "draw": torch.arange(n)}


def silent(module: EnergyModule) -> EnergyModule:
    """A module whose training_step can be called without a Trainer."""
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module


def step(module: EnergyModule, batch: dict[str, Tensor]) -> Tensor:
    loss = module.training_step(batch, 0)
    assert isinstance(loss, Tensor)
    return loss


def steps_of(module: DualAdversarialModule, num_steps: int) -> None:
    module.curriculum.num_steps.fill_(num_steps)


def plain_ascent(net: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], step: float, count: int) -> Tensor:
    for _ in range(count):
        x = x.detach().requires_grad_()
        objective(net(x)).sum().backward()
        gradient = x.grad if x.grad is not None else torch.zeros_like(x)
        rows = [g / (g.square().sum().sqrt() + 1e-10) for g in gradient]
        x = (x + step * torch.stack(rows)).clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize("level", [0.0, -1.5])
def test_stage2_loss_is_the_one_of_the_method(level: float) -> None:
    """The loss and its gradient in float64, from loops that share nothing with the package."""
    module = silent(tiny.stage2(threat_model=tiny.ATTACK, energy_level=level)).double()
    assert isinstance(module, DualAdversarialModule)
    steps_of(module, 2)
    batch = make_batch(dtype=torch.float64)
    net = copy.deepcopy(module.energy_model)
    loss = module.training_step(batch, 0)
    loss.backward()

    x_contrast = plain_ascent(net, batch["x_ood"], lambda f: f[torch.arange(8), batch["y_gen"]], 0.4, 2)
    x_adv = batch["x_clf"]
    for _ in range(2):
        moved = plain_ascent(net, x_adv, lambda f: F.cross_entropy(f, batch["y_clf"], reduction="none"), 0.5, 1)
        delta = moved - batch["x_clf"]
        scale = torch.stack([min(torch.tensor(1.0).double(), 1.0 / d.norm()) for d in delta]).view(-1, 1, 1, 1)
        x_adv = (batch["x_clf"] + delta * scale).clamp(0, 1)
    net.zero_grad()
    real, contrast = net(batch["x_gen"]).exp().sum(1).log(), net(x_contrast).exp().sum(1).log()
    bce = (-torch.sigmoid(real + level).log().sum() - torch.sigmoid(-contrast - level).log().sum()) / 16
    p = net(x_adv).softmax(1)
    ce = -p[torch.arange(8), batch["y_clf"]].log().mean()
    (bce + ce).backward()
    torch.testing.assert_close(loss.detach(), (bce + ce).detach(), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


def test_merging_the_forwards_changes_nothing() -> None:
    results = []
    for merge in (True, False):
        module = silent(tiny.stage2(merge_forwards=merge, r1_weight=0.01)).double()
        assert isinstance(module, DualAdversarialModule)
        steps_of(module, 2)
        loss = module.training_step(make_batch(dtype=torch.float64), 0)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["energy", "classification"])
def test_weights_scale_their_terms(name: str) -> None:
    def loss(**kwargs: float) -> float:
        module = silent(tiny.stage2(**kwargs))
        return float(step(module, make_batch()).detach())

    both, without = loss(), loss(**{f"{name}_weight": 0.0})
    assert loss(**{f"{name}_weight": 3.0}) == pytest.approx(without + 3 * (both - without), rel=1e-5)


def test_what_stage2_moves(tmp_path: Path) -> None:
    module = tiny.stage2()
    before = copy.deepcopy(module.state_dict())
    tiny.trainer(tmp_path).fit(module, datamodule=tiny.digits())
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    parameters = {name for name, _ in module.named_parameters()}
    curriculum = {f"curriculum.{name}" for name in ("num_steps", "values", "count", "window")}
    assert moved == parameters | {name for name in curriculum if name in moved}
    assert "curriculum.num_steps" in moved
    running = [name for name in before if "running_" in name or "num_batches" in name]
    assert len(running) == 3 * 5  # five batch norm layers: all frozen


def test_what_stage1_moves(tmp_path: Path) -> None:
    module = tiny.stage1()
    before = copy.deepcopy(module.state_dict())
    tiny.trainer(tmp_path).fit(module, datamodule=tiny.digits(streams=["clf"]))
    unmoved = {name for name, value in module.state_dict().items() if torch.equal(value, before[name])}
    assert unmoved == {"energy_model.mean", "energy_model.std"}
    # Six batches: the attack's passes did not count.
    assert int(module.state_dict()["energy_model.backbone.norm.num_batches_tracked"]) == 6


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_stage1_statistics_are_those_of_the_training_pass(mode: Any, tmp_path: Path) -> None:
    """One step from known statistics: the running mean is what the batch of adversarial examples alone gives."""
    module = silent(tiny.stage1(attack_mode=mode))
    assert isinstance(module, RobustClassifierModule)
    batch = make_batch()
    x_adv = module.adversarial_examples(batch["x_clf"], batch["y_clf"])
    stem = module.energy_model.backbone.get_submodule("stem")
    with torch.no_grad():
        mean = stem((x_adv - 0.3) / 0.35).mean((0, 2, 3))
    norm = module.energy_model.backbone.get_submodule("blocks.0.bn1")
    assert torch.equal(norm.get_buffer("running_mean"), torch.zeros(4))
    module.training_step(batch, 0)
    torch.testing.assert_close(norm.get_buffer("running_mean"), 0.1 * mean, rtol=1e-4, atol=1e-6)


class LayerNormNet(nn.Module):
    """A backbone without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.LayerNorm(256), nn.Dropout(0.5), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


def test_layer_norm_and_dropout_keep_training() -> None:
    backbone = LayerNormNet()
    module = tiny.stage2(energy_model=EnergyModel(backbone))
    module.train()
    assert all(m.training for m in module.modules())
    silent(module).training_step(make_batch(), 0)
    assert all(m.training for m in module.modules())
    module.eval()
    assert not any(m.training for m in module.modules())


def test_batch_norm_stays_frozen_whoever_calls_train() -> None:
    module = silent(tiny.stage2())
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for call in (module.train, module.energy_model.train, module.eval, module.train):
        call()
        assert not any(m.training for m in norms)
    assert module.energy_model.backbone.get_submodule("blocks").training
    norms[0].train()  # behind the module's back
    before = norms[0].get_buffer("running_mean").clone()
    module.training_step(make_batch(), 0)
    assert torch.equal(norms[0].get_buffer("running_mean"), before)
    assert not norms[0].training


@pytest.mark.parametrize("key", BATCH_KEYS)
def test_a_missing_part_is_named(key: str) -> None:
    batch = make_batch()
    del batch[key]
    stream = key.split("_")[1]
    with pytest.raises(ValueError, match=rf"needs '{key}' in its batch.*data\.streams has '{stream}'"):
        silent(tiny.stage2()).training_step(batch, 0)


class NoNumbers(nn.Module):
    """A network that has broken: NaN for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1)) * torch.nan
        return logits


@pytest.mark.parametrize("kind", [RobustClassifierModule, DualAdversarialModule, TradesModule, JEMModule, RATIOModule])
def test_a_broken_network_is_right_about_nothing(
    kind: type[EnergyModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all images are of the class that argmax takes NaN for."""
    module = kind(EnergyModel(NoNumbers()), threat_model=tiny.ATTACK)
    module.trainer = tiny.trainer(tmp_path)
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(module, "log_training", lambda scalars, *args, **kwargs: logged.update(scalars))
    batch = {**make_batch(), "y_clf": torch.zeros(8, dtype=torch.long)}
    with nullcontext() if kind is not JEMModule else pytest.raises(TrainingFailureError):
        module.training_step(batch, 0)
    found = {name: float(value) for name, value in logged.items() if "accuracy" in name}
    assert found
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("name", ["energy_weight", "classification_weight", "r1_weight"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_weights_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0, got {value}"):
        tiny.stage2(**{name: value})


def test_training_improves_both_terms(tmp_path: Path) -> None:
    """A hundred steps of each stage: the robust loss falls, then energies of real and contrastive images part."""
    weak = ThreatModel(eps=0.2, step_size=0.2, num_steps=1)
    first = tiny.stage1(threat_model=weak, optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9))
    data = tiny.digits(batch_size=64)
    trainer = tiny.trainer(tmp_path, max_epochs=4, limit_train_batches=22)
    loss = float(step(silent(tiny.stage1(threat_model=weak)), make_batch()).detach())
    trainer.fit(first, datamodule=data)
    assert float(trainer.callback_metrics["train/loss"]) < 0.8 * loss
    second = tiny.stage2(
        energy_model=first.energy_model,
        threat_model=weak,
        curriculum=AUCCurriculum(max_steps=0),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    )
    trainer = tiny.trainer(tmp_path, max_epochs=2, limit_train_batches=22)
    trainer.fit(second, datamodule=data)
    scalars = trainer.callback_metrics
    assert float(scalars["train/energy_real"]) < float(scalars["train/energy_contrast"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_auc_compares_the_images_of_all_ranks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.stage2()
    others = torch.tensor([[-1.0, -2.0], [4.0, -3.0]])  # f(x_gen)[y] and f(x_contrast)[y] on the other rank
    calls: list[torch.dtype] = []

    def all_gather(parts: list[Tensor], scores: Tensor) -> None:
        calls.append(scores.dtype)
        for part, found in zip(parts, (scores, others), strict=True):
            part.copy_(found)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    gen, contrast = torch.tensor([[3.0], [1.0]], dtype=dtype), torch.tensor([[0.0], [2.0]], dtype=dtype)
    logits = JointLogits(gen, contrast, gen)
    value = module.separation(logits, torch.zeros(2, dtype=torch.long))
    assert calls == [torch.float32]
    # 3, 1, -1 and -2 are above three, two, one and one of 0, 2, 4 and -3. The mean of the ranks' own AUCs is 5/8.
    assert float(value) == 7 / 16
