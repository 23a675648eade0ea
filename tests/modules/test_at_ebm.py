"""AT-EBM: its loss against a plain loop, networks with several logits, evaluation and samples without classes."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dat_lightning import (
    ATEBMModule,
    AUCCurriculum,
    EnergyModel,
    EnergyStatistics,
    PGDSampler,
    SampleBatch,
    SampleConsumer,
    SmallResNet,
    Steepest,
    ascend,
    unbounded_ascent,
)
from dat_lightning.core import targeted_logit
from dat_lightning.core.errors import InputError
from dat_lightning.modules import JointLogits
from tests import tiny
from tests.modules import by_hand
from tests.modules.resumed import CONFIGS, TINY, epoch_that_goes_on


def one_logit() -> EnergyModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EnergyModel(SmallResNet(widths=(4, 8), num_classes=1), mean=[0.3], std=[0.35])


def at_ebm(**kwargs: Any) -> ATEBMModule:
    curriculum = AUCCurriculum(max_steps=4, auc_threshold=1.0)
    curriculum.num_steps.fill_(2)
    fixed = {"energy_model": one_logit(), "optimizer": tiny.SGD, "curriculum": curriculum, "contrastive_step_size": 0.4}
    return ATEBMModule(**{**fixed, **kwargs})


def silent(module: ATEBMModule) -> ATEBMModule:
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("r1_weight", [0.0, 0.5])
def test_the_loss_is_that_of_a_plain_loop(r1_weight: float, merge: bool) -> None:
    """In float64, from a loop that shares nothing with the package; no labels, no strong augmentation in the batch."""
    module = at_ebm(r1_weight=r1_weight, energy_weight=2.0, merge_forwards=merge).double().train()
    net = copy.deepcopy(module.energy_model).eval()
    batch = {name: part for name, part in by_hand.batch().items() if name in ("x_gen", "x_ood")}
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    loss = module.training_step(batch, 0)
    loss.backward()

    x_contrast = by_hand.walk(net, batch["x_ood"], unbounded_ascent(0.4, 2), "energy")
    x_gen = batch["x_gen"].clone().requires_grad_()
    real, fake = net(x_gen)[:, 0], net(x_contrast)[:, 0]
    (gradient,) = torch.autograd.grad(real.sum(), x_gen, create_graph=True)
    r1 = 0.5 * gradient.square().sum((1, 2, 3)).mean()
    bce = -(real.sigmoid().log().sum() + (1 - fake.sigmoid()).log().sum()) / 12
    expected = 2.0 * bce + r1_weight * r1
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(module.energy_model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    wins = sum((float(a > b) + 0.5 * float(a == b)) / 36 for a in real for b in fake)
    values = {"loss": expected.item(), "energy_loss": bce.item(), "auc": wins, "contrastive_steps": 2.0}
    values |= {"energy_real": -real.mean().item(), "energy_contrast": -fake.mean().item()}
    values |= {"r1_penalty": r1.item()} if r1_weight else {}
    assert logged == {f"train/{name}": pytest.approx(value, rel=1e-6) for name, value in values.items()}


def test_the_equation_at_logits_by_hand() -> None:
    """−E of a real image log 3, of a contrastive one 0: −½(log ¾ + log ½)."""
    logits = JointLogits(torch.tensor([[math.log(3.0)]]), torch.zeros(1, 1), torch.zeros(0, 1))
    expected = 0.5 * (math.log(4 / 3) + math.log(2))
    assert float(at_ebm().energy_loss(logits)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("merge", "sizes"), [(True, [12]), (False, [6, 6])])
def test_the_network_sees_real_and_contrastive_images_alone(merge: bool, sizes: list[int]) -> None:
    """No empty batch in the place of attacked ones."""
    module, seen = silent(at_ebm(r1_weight=0.0, merge_forwards=merge)).train(), []
    module.curriculum.num_steps.fill_(0)
    module.energy_model.backbone.register_forward_hook(lambda net, args, logits: seen.append(len(logits)))
    module.training_step(by_hand.batch(dtype=torch.float32), 0)
    assert seen == sizes


def test_network_evaluations_have_no_attack_on_a_classification() -> None:
    """A chain of two steps, two training passes, and R1's, which is trained through."""
    for r1_weight, more in ((0.0, 0), (0.01, 6)):
        module = silent(at_ebm(r1_weight=r1_weight)).train()
        module.training_step(by_hand.batch(dtype=torch.float32), 0)
        assert module.network_evaluations == 6 * (2 * 2 + 2 * 3 + more)


def test_the_weight_of_r1_is_the_papers() -> None:
    assert ATEBMModule(one_logit()).r1_weight == 0.01


def test_networks_of_several_logits_and_negative_weights_are_refused(tmp_path: Path) -> None:
    said = "ATEBMModule needs a network of one logit, got 10: set the backbone's num_classes to 1"
    module = at_ebm(energy_model=tiny.energy_model())
    with pytest.raises(InputError, match=said):
        tiny.trainer(tmp_path).fit(module, tiny.digits(streams=["gen", "ood"]))
    for loop in ("validate", "test", "predict"):
        run: Any = getattr(tiny.trainer(tmp_path, limit_val_batches=1), loop)
        with pytest.raises(InputError, match=said):
            run(module, tiny.digits())
    for name in ("energy_weight", "r1_weight"):
        with pytest.raises(InputError, match=f"{name} must be a finite number of at least 0, got -1"):
            at_ebm(**{name: -1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classification_weight", 1.0),
        ("threat_model", tiny.ATTACK),
        ("eval_threat_model", tiny.ATTACK),
        ("attack_rule", Steepest()),
        ("attack_mode", "eval"),
    ],
)
def test_what_it_has_no_use_for_is_no_argument(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        at_ebm(**{name: value})


def test_statistics_of_energies_attack_no_classification(tmp_path: Path) -> None:
    """Which would need classes."""
    statistics = EnergyStatistics()
    (figures,) = tiny.trainer(tmp_path, [statistics]).test(at_ebm(), tiny.digits(), verbose=False)
    assert "test/energy_test" in figures
    assert not any("adversarial" in name for name in figures)


class Samples(SampleConsumer):
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: Any) -> None:
        self.batches: list[SampleBatch] = []

    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        self.batches.append(batch)


def test_evaluation_has_energies_and_samples_of_the_one_class(tmp_path: Path) -> None:
    """Labels of ten classes do no harm."""
    module, samples = at_ebm(), Samples()
    sampler = PGDSampler(num_samples=12, num_steps=[2], step_size=0.5)
    trainer = tiny.trainer(tmp_path, [sampler, samples])
    (figures,) = trainer.test(module, tiny.digits(), verbose=False)
    assert {"test/energy", "test/r1"} == set(figures)
    images: Tensor = torch.cat([part["x"] for part in trainer.datamodule.test_dataloader()])  # type: ignore[attr-defined]
    with torch.no_grad():
        assert figures["test/energy"] == pytest.approx(float(-module.eval()(images).mean()), rel=1e-5)
    (batch,) = samples.batches
    assert batch.labels.tolist() == [0] * 12
    walked = ascend(module.energy_model.eval(), batch.seeds, batch.labels, targeted_logit, unbounded_ascent(0.5, 2))
    torch.testing.assert_close(batch.images[2], walked)
    found: Any = tiny.trainer(tmp_path).predict(module, tiny.digits())
    assert set(found[0]) == {"index", "energy"}


def test_training_parts_energies_and_moves_t(tmp_path: Path) -> None:
    module = at_ebm(curriculum=AUCCurriculum(max_steps=2, auc_threshold=0.6, window_samples=64))
    trainer = tiny.trainer(tmp_path, max_epochs=3, limit_train_batches=22)
    trainer.fit(module, tiny.digits(streams=["gen", "ood"], batch_size=64))
    scalars = trainer.callback_metrics
    assert float(scalars["train/energy_real"]) < float(scalars["train/energy_contrast"])
    assert module.curriculum is not None
    assert int(module.curriculum.num_steps) > 0


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_configuration_trains_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    for name in ("threat_model", "eval_threat_model"):
        del small["model"]["init_args"][name]  # it has none
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    trainer = epoch_that_goes_on(tmp_path, monkeypatch, CONFIGS / "digits" / "at_ebm.yaml", tmp_path / "tiny.yaml")
    assert isinstance(trainer.lightning_module, ATEBMModule)
    assert {"train/r1_penalty", "val/energy", "val/fid"} <= set(trainer.callback_metrics)
    assert not any("accuracy" in name for name in trainer.callback_metrics)
