"""Each failure signature is provoked, and its message names cause and remedy."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dat_lightning import (
    ATEBMModule,
    AUCCurriculum,
    Diagnostics,
    DigitsDataModule,
    DivergenceGuard,
    DualAdversarialModule,
    EnergyModel,
    SmallResNet,
)
from dat_lightning.core import jacobian_norm
from dat_lightning.core.errors import InputError
from dat_lightning.data import SizedDataset
from dat_lightning.data.digits import digits, split_indices
from dat_lightning.training import TrainingFailureError
from tests import tiny


def fit(path: Path, module: Any, data: Any = None, **kwargs: Any) -> Any:
    diagnostics = Diagnostics(**{"every_n_steps": 1, **kwargs})
    trainer = tiny.trainer(path, [diagnostics])
    trainer.fit(module, datamodule=data or tiny.digits())
    return trainer


def test_a_healthy_run_passes_and_logs_the_gradient(tmp_path: Path) -> None:
    module = tiny.stage2(optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = fit(tmp_path, module)
    data = tiny.digits()
    data.setup("fit")
    last = list(data.train_dataloader())[5]
    x = last["x_gen"].requires_grad_()
    (gradient,) = torch.autograd.grad(module.eval()(x).logsumexp(1).sum(), x)
    expected = gradient.square().flatten(1).sum(1).mean()
    assert float(trainer.callback_metrics["train/r1"]) == pytest.approx(float(expected), rel=1e-4)
    assert all(p.requires_grad for p in module.parameters())


def test_the_jacobians_norm_is_logged_if_asked_for(tmp_path: Path) -> None:
    module = tiny.stage2(optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = fit(tmp_path, module, jacobian_images=3)
    data = tiny.digits()
    data.setup("fit")
    x = list(data.train_dataloader())[5]["x_gen"][:3]
    iterated = float(jacobian_norm(module.eval().energy_model, x).mean())
    module.double()
    expected = []
    for image in x.double():
        jacobian = torch.autograd.functional.jacobian(module.energy_model, image[None])
        expected.append(float(torch.linalg.svdvals(jacobian.flatten(2)[0])[0]))
    found = float(trainer.callback_metrics["train/jacobian_norm"])
    assert found == pytest.approx(iterated, rel=1e-5)
    assert found == pytest.approx(sum(expected) / 3, rel=0.02)
    assert all(p.requires_grad for p in module.parameters())
    assert "train/jacobian_norm" not in fit(tmp_path, tiny.stage2()).callback_metrics


def test_looking_at_the_jacobian_changes_no_weight(tmp_path: Path) -> None:
    runs = []
    for count in (0, 3):
        torch.manual_seed(0)
        runs.append(tiny.stage2())
        fit(tmp_path, runs[-1], jacobian_images=count)
    for one, other in zip(*(run.state_dict().values() for run in runs), strict=True):
        assert torch.equal(one, other)


class Thawed(DualAdversarialModule):
    """The mistake: batch norm goes back to train mode."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Never mind."""

    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
        return x


def test_batch_norm_in_train_mode(tmp_path: Path) -> None:
    module = Thawed(tiny.energy_model(), AUCCurriculum(max_steps=2), optimizer=tiny.SGD, threat_model=tiny.ATTACK)
    with pytest.raises(TrainingFailureError, match=r"batch norm layers are in train mode.*freeze_batch_norm\(\)"):
        fit(tmp_path, module)


def test_nan(tmp_path: Path) -> None:
    module = tiny.stage2(optimizer=partial(torch.optim.SGD, lr=1e20))
    with pytest.raises(
        TrainingFailureError,
        match=r"is NaN or infinite in DualAdversarialModule\..*contrastive step.*earlier",
    ):
        fit(tmp_path, module)
    first = tiny.stage1(optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(TrainingFailureError, match=r"train/loss is NaN or infinite in RobustClassifierModule"):
        fit(tmp_path, first)


def test_jem_trains_an_energy_too(tmp_path: Path) -> None:
    module = tiny.jem(optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = fit(tmp_path, module)
    data = tiny.digits()
    data.setup("fit")
    x = list(data.train_dataloader())[5]["x_gen"].requires_grad_()
    (gradient,) = torch.autograd.grad(module.eval()(x).logsumexp(1).sum(), x)
    expected = gradient.square().flatten(1).sum(1).mean()
    assert float(trainer.callback_metrics["train/r1"]) == pytest.approx(float(expected), rel=1e-4)
    # It has no r1_weight to advise.
    with pytest.raises(TrainingFailureError, match=r"the energy drifts\..* frozen, lower the learning rate\.$"):
        fit(tmp_path, tiny.jem(), max_energy=1e-9)
    with pytest.raises(TrainingFailureError, match=r"clean images: lower the learning rate\.$"):
        fit(tmp_path, tiny.jem(), max_gradient=1e-9)
    with pytest.raises(TrainingFailureError, match=r"infinite in JEMModule\. Mostly .* a learning rate too large"):
        fit(tmp_path, tiny.jem(optimizer=partial(torch.optim.SGD, lr=1e20), max_energy_gap=float("inf")))


def test_remedies_of_at_ebm_are_its_own(tmp_path: Path) -> None:
    """It has R1, and no classification whose attack could be kept."""
    network = EnergyModel(SmallResNet(num_classes=1, widths=(4, 8)), mean=[0.3], std=[0.35])
    said = r"beyond 1e-09\. R1 alone holds it down here: raise r1_weight, which is 0\.01, or lower the learning rate\.$"
    with pytest.raises(TrainingFailureError, match=said):
        fit(tmp_path, ATEBMModule(network, optimizer=tiny.SGD), max_gradient=1e-9)
    for weight, advice in ((0.0, r"set r1_weight to 0\.01 … 1"), (0.5, r"raise r1_weight, which is 0\.5")):
        module = ATEBMModule(network, optimizer=tiny.SGD, r1_weight=weight)
        with pytest.raises(TrainingFailureError, match=rf"lower the learning rate, or {advice}\.$"):
            fit(tmp_path, module, max_energy=1e-9)


@pytest.mark.parametrize(
    ("limit", "message"),
    [("max_energy", r"train/energy_\w+ has reached .*: the energy drifts"), ("max_gradient", "keep its attack")],
)
def test_explosions(limit: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailureError, match=message):
        fit(tmp_path, tiny.stage2(), **{limit: 1e-9})
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, tiny.stage2(), **{limit: 1e-9}, action="warn")


class SameData(DigitsDataModule):
    """The mistake: seeds are the training images."""

    def out_of_distribution(self, split: str) -> SizedDataset:
        return digits(split_indices(self.validation_size)["train"])


def test_ood_data_equal_to_training_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images of SameData are the training images: 100%"):
        fit(tmp_path, tiny.stage2(), SameData(batch_size=32))


class HiddenSameData(SameData):
    """The same images, brighter by a hair, which no comparison of bytes finds."""

    def out_of_distribution(self, split: str) -> SizedDataset:
        images = super().out_of_distribution(split)
        return [image[0] * 0.999 for image in (images[k] for k in range(len(images)))]


def test_t_stuck_at_zero(tmp_path: Path) -> None:
    stuck = partial(AUCCurriculum, max_steps=5, auc_threshold=1.0, window_samples=32)
    with pytest.warns(UserWarning, match="T is still 0 after 3 steps: the AUC .* does not reach its threshold 1.0"):
        fit(tmp_path, tiny.stage2(curriculum=stuck()), patience=3)
    module = tiny.stage2(curriculum=stuck(), optimizer=partial(torch.optim.SGD, lr=1e-6))
    with pytest.warns(UserWarning, match="cannot be told from training images at all: is the OOD set the training set"):
        fit(tmp_path, module, HiddenSameData(batch_size=256), patience=3)


def test_a_second_run_is_warned_anew(tmp_path: Path) -> None:
    diagnostics = Diagnostics(every_n_steps=1, patience=3)
    for _ in range(2):
        module = tiny.stage2(curriculum=AUCCurriculum(max_steps=5, auc_threshold=1.0, window_samples=32))
        with pytest.warns(UserWarning, match="T is still 0 after 3 steps"):
            tiny.trainer(tmp_path, [diagnostics]).fit(module, tiny.digits())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_looks_at_every_nth_step_once(accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 steps at 3, 6, 9 and 12, of two batches each or of one."""
    looks: list[int] = []

    class Noting(Diagnostics):
        def _largest_values(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
            looks.append(trainer.global_step)
            return super()._largest_values(trainer, pl_module, batch)

    options = {"accumulate_grad_batches": accumulated, "limit_train_batches": 1.0}
    batches: Any = DataLoader([torch.ones(2, 3)] * 14 * accumulated, batch_size=None)  # type: ignore[arg-type]
    monkeypatch.setattr(Sparse, "training_step", lambda self, batch, _: self.linear(batch).square().mean())
    tiny.trainer(tmp_path, [Noting(every_n_steps=3)], **options).fit(Sparse(epoch=False), batches)
    assert looks == [3, 6, 9, 12]


def test_counts_are_whole_and_limits_positive() -> None:
    for name, least in (("every_n_steps", 1), ("patience", 1), ("jacobian_images", 0)):
        for value in (least - 1, 2.5):
            with pytest.raises(InputError, match=f"{name} must be a whole number of at least {least}, got {value}"):
                Diagnostics(**{name: value})  # type: ignore[arg-type]
    for name in ("max_energy", "max_gradient"):
        with pytest.raises(InputError, match=f"{name} must be positive, got 0"):
            Diagnostics(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"action must be one of \('stop', 'warn'\), got 'Stop'"):
        Diagnostics(action="Stop")  # type: ignore[arg-type]


class Sparse(LightningModule):
    """Logs its loss every fourth step or as the epoch's mean; the loss of step 3 is NaN."""

    def __init__(self, *, epoch: bool, guarded_energy: float = 0.0) -> None:
        super().__init__()
        self.epoch, self.guarded_energy = epoch, guarded_energy
        self.linear = nn.Linear(3, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.linear(batch * math.nan if self.global_step == 2 else batch).square().mean()
        if self.epoch:
            self.log("train/loss", loss, on_step=False, on_epoch=True)
        elif self.global_step % 4 == 2:
            self.log("train/loss", loss)
        if self.global_step == 7:
            self.log("train/energy_gen", torch.tensor(self.guarded_energy))
        return loss


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
@pytest.mark.parametrize("epoch", [False, True])
def test_what_a_skipped_step_has_logged_does_not_stop_the_run_later(epoch: bool, tmp_path: Path) -> None:
    def train(module: Sparse, *, guarded: bool = True) -> Trainer:
        callbacks = [Diagnostics(every_n_steps=1), *([DivergenceGuard("skip")] if guarded else [])]
        trainer = tiny.trainer(tmp_path, callbacks, max_epochs=2, limit_train_batches=1.0)
        trainer.fit(module, DataLoader([torch.ones(2, 3)] * 5, batch_size=None))  # type: ignore[arg-type]
        return trainer

    assert train(Sparse(epoch=epoch)).global_step == 10
    # What is logged after that is looked at as before, and so is everything without a guard.
    with pytest.raises(TrainingFailureError, match=r"train/energy_gen is NaN or infinite"):
        train(Sparse(epoch=epoch, guarded_energy=math.inf))
    with pytest.raises(TrainingFailureError, match=r"train/loss is NaN or infinite"):
        train(Sparse(epoch=epoch), guarded=False)
