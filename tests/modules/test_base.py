"""Evaluation, prediction, initial weights and optimisers."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader

from dat_lightning import (
    AUCCurriculum,
    DATBalancedModule,
    DATContinuedChainsModule,
    DATNoiseContrastiveModule,
    EnergyModel,
    EnergyModule,
    SmallResNet,
    ThreatModel,
    TradesModule,
    ascend,
)
from dat_lightning.core import cross_entropy
from dat_lightning.core.errors import InputError
from dat_lightning.modules.replay_buffer import ReplayBufferModule
from tests import tiny


def test_validation_logs_the_figures_of_a_plain_loop(tmp_path: Path) -> None:
    """Uneven batches; every figure against a loop over single images."""
    module = tiny.stage1(eval_threat_model=ThreatModel(eps=0.7, step_size=0.3, num_steps=3))
    data = tiny.digits(eval_batch_size=7)
    trainer = tiny.trainer(tmp_path, limit_val_batches=1.0)
    (logged,) = trainer.validate(module, datamodule=data, verbose=False)
    sums = dict.fromkeys(("loss", "accuracy", "robust_accuracy", "energy", "r1"), 0.0)
    module.eval()
    validation = data.in_distribution("val")
    for image, label in (validation[k] for k in range(len(validation))):
        x, y = image.unsqueeze(0), torch.tensor([label])
        logits = module(x)[0].detach()
        sums["loss"] -= float(logits.log_softmax(0)[label])
        sums["accuracy"] += float(logits.argmax() == label)
        x_adv = ascend(module, x, y, cross_entropy, ThreatModel(eps=0.7, step_size=0.3, num_steps=3))
        sums["robust_accuracy"] += float(module(x_adv)[0].argmax() == label)
        sums["energy"] -= math.log(sum(math.exp(float(f)) for f in logits))
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(module(x).logsumexp(1).sum(), x)
        sums["r1"] += float(gradient.square().sum())
    assert len(validation) == 20
    for name, total in sums.items():
        assert logged[f"val/{name}"] == pytest.approx(total / 20, rel=1e-4), name


def test_evaluation_works_in_inference_mode(tmp_path: Path) -> None:
    """The Trainer's default: no hook of another project's Trainer has to know that attacks need gradients."""
    figures = []
    for inference_mode in (True, False):
        trainer = tiny.trainer(tmp_path, limit_val_batches=1.0, inference_mode=inference_mode)
        figures.append(trainer.validate(tiny.stage2(), datamodule=tiny.digits(), verbose=False))
    assert figures[0] == figures[1]


def test_predictions(tmp_path: Path) -> None:
    module = tiny.stage1()
    data = tiny.digits(eval_batch_size=100)
    batches = tiny.trainer(tmp_path).predict(module, datamodule=data)
    assert batches is not None
    index = torch.cat([b["index"] for b in batches])  # type: ignore[call-overload]
    assert index.tolist() == list(range(360))
    test = data.in_distribution("test")
    x = torch.stack([test[k][0] for k in range(360)])
    with torch.no_grad():
        logits = module.eval()(x)
    prediction = torch.cat([b["prediction"] for b in batches])  # type: ignore[call-overload]
    assert torch.equal(prediction, logits.argmax(1))
    energy = torch.cat([b["energy"] for b in batches])  # type: ignore[call-overload]
    torch.testing.assert_close(energy, -logits.logsumexp(1))
    confidence = torch.cat([b["confidence"] for b in batches])  # type: ignore[call-overload]
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1))


def test_initial_weights_come_from_a_file_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny.energy_model(seed=3)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    module = tiny.stage2(init_from=str(tmp_path / "weights.pt"))
    trainer = tiny.trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    with caplog.at_level("INFO"):
        trainer.validate(module, datamodule=tiny.digits(), verbose=False)
    assert f"weights from {tmp_path / 'weights.pt'}: plain state dict; same input normalisation" in caplog.messages
    torch.testing.assert_close(module.energy_model.state_dict(), source.state_dict())
    trainer.fit(module, datamodule=tiny.digits())
    trained = {name: value.clone() for name, value in module.energy_model.state_dict().items()}
    assert not torch.equal(trained["backbone.fc.weight"], source.state_dict()["backbone.fc.weight"])
    # A later run with the same module goes on from what it has learnt.
    trainer.test(module, datamodule=tiny.digits(), verbose=False)
    torch.testing.assert_close(module.energy_model.state_dict(), trained, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [tiny.stage1, tiny.stage2])
def test_initial_weights_of_other_classes_need_a_new_head(stage: Callable[..., EnergyModule], tmp_path: Path) -> None:
    source = EnergyModel(SmallResNet(num_classes=7, widths=(4, 8)))
    torch.save(source.backbone.state_dict(), tmp_path / "seven.pt")
    trainer = tiny.trainer(tmp_path, limit_val_batches=1)
    with pytest.raises(ValueError, match=r"only the number of classes differs: .*--model\.new_head true"):
        trainer.validate(stage(init_from=str(tmp_path / "seven.pt")), datamodule=tiny.digits(), verbose=False)
    module = stage(init_from=str(tmp_path / "seven.pt"), new_head=True)
    head = module.energy_model.state_dict()["backbone.fc.weight"].clone()
    trainer.validate(module, datamodule=tiny.digits(), verbose=False)
    loaded = module.energy_model.backbone.state_dict()
    torch.testing.assert_close(loaded["stem.weight"], source.backbone.state_dict()["stem.weight"], rtol=0, atol=0)
    torch.testing.assert_close(loaded["fc.weight"], head, rtol=0, atol=0)


def test_missing_initial_weights_are_named(tmp_path: Path) -> None:
    module = tiny.stage2(init_from=str(tmp_path / "nowhere.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.ckpt"):
        tiny.trainer(tmp_path).fit(module, datamodule=tiny.digits())


def test_a_resumed_run_does_not_need_its_initial_weights(tmp_path: Path) -> None:
    torch.save(tiny.energy_model().state_dict(), tmp_path / "weights.pt")
    module = tiny.stage1(init_from=str(tmp_path / "weights.pt"))
    trainer = tiny.trainer(tmp_path, limit_train_batches=2)
    trainer.fit(module, datamodule=tiny.digits())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    (tmp_path / "weights.pt").unlink()
    resumed = tiny.stage1(init_from=str(tmp_path / "weights.pt"))
    trainer = tiny.trainer(tmp_path, max_epochs=1)
    trainer.validate(resumed, datamodule=tiny.digits(), ckpt_path=str(tmp_path / "run.ckpt"), verbose=False)
    torch.testing.assert_close(resumed.state_dict(), module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("interval", "rate"), [("step", 0.05 * 0.5**6), ("epoch", 0.05 * 0.5)])
def test_schedules_count_what_they_are_told(interval: str, rate: float, tmp_path: Path) -> None:
    schedule = partial(StepLR, step_size=1, gamma=0.5)
    module = tiny.stage1(lr_scheduler=schedule, lr_interval=interval)
    trainer = tiny.trainer(tmp_path)
    trainer.fit(module, datamodule=tiny.digits(streams=["clf"]))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_a_schedule_that_ends_too_early_is_named(tmp_path: Path) -> None:
    schedule = partial(OneCycleLR, max_lr=0.1, total_steps=5)
    module = tiny.stage1(lr_scheduler=schedule, lr_interval="step")
    with pytest.raises(ValueError, match=r"lr_scheduler has total_steps=5, but .* ask for 6 steps"):
        tiny.trainer(tmp_path).fit(module, datamodule=tiny.digits(streams=["clf"]))


def test_overfit_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"overfit_batches=2 cannot work with an endless stream"):
        tiny.trainer(tmp_path, overfit_batches=2).fit(tiny.stage1(), datamodule=tiny.digits())


def test_a_second_fit_goes_on_in_the_data(tmp_path: Path) -> None:
    data, module = tiny.digits(streams=["clf"]), tiny.stage1()
    seen: list[int] = []

    class Watch(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: object, batch: dict[str, torch.Tensor], i: int
        ) -> None:
            seen.append(int(batch["draw"][0]))

    trainer = tiny.trainer(tmp_path, [Watch()], limit_train_batches=3)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=data)
    assert seen == [0, 32, 64, 96, 128, 160]


def test_a_run_that_max_steps_ended_within_an_epoch_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    def train(folder: str, max_steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        path = tmp_path / folder
        module, last = tiny.stage2(), ModelCheckpoint(path, "last", save_on_train_epoch_end=True)
        trainer = tiny.trainer(path, [last], max_steps=max_steps, max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, datamodule=tiny.digits(), ckpt_path=str(path / "last.ckpt") if resume else None)
        assert trainer.global_step == max_steps
        return module.state_dict()

    expected = train("whole", 15)
    train("parts", 9)  # an epoch has 6 steps; Lightning counts the second one as over
    torch.testing.assert_close(train("parts", 15, resume=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_labels_that_the_network_has_no_logit_for_are_an_error_before_the_first_step(run: str, tmp_path: Path) -> None:
    network = EnergyModel(SmallResNet(num_classes=7, widths=(4, 8)), mean=[0.3], std=[0.35])
    module = tiny.stage1(energy_model=network)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = tiny.trainer(tmp_path, limit_val_batches=1, limit_test_batches=1)
    with pytest.raises(ValueError, match=r"network has 7 logits, but y(_clf)? has labels 0 … 9.*num_classes"):
        getattr(trainer, run)(module, datamodule=tiny.digits())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_cosine_schedule_that_would_rise_again_is_refused(tmp_path: Path) -> None:
    module = tiny.stage1(lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2))
    with pytest.raises(ValueError, match="T_max=2, but training has 3 epochs"):
        tiny.trainer(tmp_path, max_epochs=3).fit(module, datamodule=tiny.digits())
    tiny.trainer(tmp_path, max_epochs=2).fit(module, datamodule=tiny.digits())


def _made(module: Callable[..., EnergyModule], **arguments: Any) -> EnergyModule:
    return module(energy_model=tiny.energy_model(), optimizer=tiny.SGD, threat_model=tiny.ATTACK, **arguments)


def _own_loader(numbered: bool, count: int = 6) -> Any:
    """A loader of one's own, of batches of eight."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for first in range(0, 8 * count, 8):
        images = {name: torch.rand(8, 1, 16, 16, generator=generator) for name in ("x_gen", "x_clf", "x_ood")}
        labels = {name: torch.arange(8) % 10 for name in ("y_gen", "y_clf")}
        batches.append({**images, **labels, **({"draw": torch.arange(first, first + 8)} if numbered else {})})
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize(
    "make",
    [
        partial(tiny.stage1, threat_model=replace(tiny.ATTACK, random_start=True)),
        partial(tiny.stage2, threat_model=replace(tiny.ATTACK, random_start=True)),
        tiny.jem,
        partial(_made, TradesModule),
        partial(_made, DATBalancedModule, curriculum=AUCCurriculum(initial_steps=1)),
        partial(_made, DATNoiseContrastiveModule),
        partial(_made, DATContinuedChainsModule, restart_share=0.5, buffer_size=40),
    ],
)
def test_examples_without_numbers_are_counted(make: Callable[..., EnergyModule], tmp_path: Path) -> None:
    """As those of data that number them; where gradients are accumulated, too."""

    def trained(numbered: bool) -> list[Any]:
        module = make()
        trainer = tiny.trainer(tmp_path, limit_train_batches=4, accumulate_grad_batches=2)
        trainer.fit(module, _own_loader(numbered))
        buffer = [module.replay_buffer] if isinstance(module, ReplayBufferModule) else []
        assert None not in buffer
        return [*buffer, *(p.detach() for p in module.parameters())]

    for one, other in zip(trained(numbered=False), trained(numbered=True), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # places not reached yet are NaN


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_after_a_smaller_batch_no_number_comes_again(tmp_path: Path) -> None:
    """Twenty examples in batches of eight, eight and four, twice."""
    seen: list[int] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, i: int) -> None:
            seen.extend(pl_module.draws_of(batch).tolist())

    examples = [{"x_clf": torch.rand(1, 16, 16), "y_clf": k % 10} for k in range(20)]
    tiny.trainer(tmp_path, [Watch()], max_epochs=2).fit(tiny.stage1(), DataLoader(examples, 8))  # type: ignore[arg-type]
    assert len(seen) == len(set(seen)) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attack_mode": "evl"}, r"attack_mode must be one of \('eval', 'train'\), got 'evl'"),
        ({"energy_model": nn.Identity()}, r"energy_model must be of the class EnergyModel, got Identity\(\)"),
    ],
)
def test_arguments_that_would_do_something_else_in_silence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.stage1(**arguments)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_the_count_of_examples_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, i: int) -> None:
            seen.append(int(pl_module.draws_of(batch)[0]))

    last = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    trainer = tiny.trainer(tmp_path, [Watch(), last], max_epochs=2, enable_checkpointing=True)
    trainer.fit(tiny.stage1(), _own_loader(numbered=False, count=3))
    trainer = tiny.trainer(tmp_path, [Watch(), last], max_epochs=3, enable_checkpointing=True)
    trainer.fit(tiny.stage1(), _own_loader(numbered=False, count=3), ckpt_path=str(tmp_path / "last.ckpt"))
    assert seen == [*range(0, 48, 8), *range(48, 72, 8)]
