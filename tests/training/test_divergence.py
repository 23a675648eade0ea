"""A step whose loss or gradient is not finite leaves nothing behind but a file, which says what it was."""

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dat_lightning import (
    ATEBMModule,
    AUCCurriculum,
    Diagnostics,
    DualAdversarialModule,
    EnergyModel,
    ExponentialMovingAverage,
    RobustClassifierModule,
    SmallResNet,
    ThreatModel,
)
from dat_lightning.training import DivergenceGuard, TrainingFailureError, load_post_mortem
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.05)
FUSED = partial(torch.optim.AdamW, lr=1e-2, fused=True)

Batches = list[dict[str, Tensor]]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:steps of this run that were skipped"),
]


def batches(count: int = 6, batch_size: int = 16) -> Batches:
    data = tiny.digits(batch_size=batch_size)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


def with_nan(entries: Batches, *places: int, stream: str = "x_clf", value: float = math.nan) -> Batches:
    """The batches, of which some have one bad pixel in their third image."""
    result = [{name: entry.clone() for name, entry in batch.items()} for batch in entries]
    for place in places:
        result[place][stream][2, 0, 5, 5] = value
    return result


class BadGradient:
    """Mixed into a module: batches marked by a first draw of −1 have a finite loss and a NaN gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step({**batch, "draw": batch["draw"].abs()}, batch_idx)  # type: ignore[misc]
        if int(batch["draw"][0]) == -1:
            weight = next(p for p in self.parameters() if p.dim() == 4)  # type: ignore[attr-defined]
            # The root's slope at 0 is infinite.
            loss = loss + (0 * weight).square().sum().sqrt()
        return loss


class BadStage1(BadGradient, RobustClassifierModule):
    """Stage 1."""


class BadStage2(BadGradient, DualAdversarialModule):
    """Stage 2."""


class BadATEBM(BadGradient, ATEBMModule):
    """AT-EBM."""


def module_of(stage: int, optimizer: Any = SGD, **kwargs: Any) -> Any:
    settings = {"energy_model": tiny.energy_model(), "optimizer": optimizer, "threat_model": tiny.ATTACK, **kwargs}
    if stage == 1:
        return BadStage1(**settings)
    curriculum = AUCCurriculum(max_steps=3, auc_threshold=0.3, window_samples=40)
    return BadStage2(**{"curriculum": curriculum, "contrastive_step_size": 0.4, **settings})


def fit(path: Path, module: Any, entries: Sequence[Any], guard: DivergenceGuard | None, **kwargs: Any) -> Trainer:
    average = ExponentialMovingAverage(decay=0.9)
    callbacks = [average, *([guard] if guard else []), *kwargs.pop("callbacks", [])]
    trainer = tiny.trainer(path, callbacks, **{"limit_train_batches": 1.0, "max_epochs": 1, **kwargs})
    trainer.fit(module, DataLoader(list(entries), batch_size=None))  # type: ignore[arg-type]
    return trainer


class Keeper(ExponentialMovingAverage):
    """Keeps all state at the end of training, before the average takes the weights' place."""

    kept: dict[str, Any]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        assert self._average_model is not None
        self.kept = {
            "weights": {name: value.clone() for name, value in pl_module.state_dict().items()},
            "average": {name: value.clone() for name, value in self._average_model.state_dict().items()},
            "optimizer": trainer.optimizers[0].state_dict(),
        }


def end_of(path: Path, module: Any, entries: Batches, guard: DivergenceGuard | None, **kwargs: Any) -> dict[str, Any]:
    keeper = Keeper(decay=0.9)
    callbacks = [keeper, *([guard] if guard else [])]
    trainer = tiny.trainer(path, callbacks, limit_train_batches=1.0, **kwargs)
    trainer.fit(module, DataLoader(entries, batch_size=None))  # type: ignore[arg-type]
    return keeper.kept


def assert_bitwise(one: Any, other: Any, name: str = "") -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key, value in one.items():
            assert_bitwise(value, other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for k, value in enumerate(one):
            assert_bitwise(value, other[k], f"{name}.{k}")
    else:
        assert one == other, name


@pytest.mark.parametrize(
    ("stage", "optimizer", "accumulate", "bad"),
    [
        (1, SGD, 1, "x_clf"),
        (1, ADAMW, 2, "gradient"),
        (2, SGD, 1, "x_gen"),
        (2, SGD, 2, "x_ood"),
        (2, ADAMW, 1, "gradient"),
        (2, FUSED, 1, "x_clf"),
    ],
)
def test_a_skipped_step_leaves_everything_as_if_it_had_not_been(
    stage: int, optimizer: Any, accumulate: int, bad: str, tmp_path: Path
) -> None:
    """Weights, statistics, T and its window, the optimiser's moments and the average, bit for bit."""
    good = batches(6)
    poisoned = good
    if bad == "gradient":
        poisoned[3]["draw"][0] = -1
    else:
        poisoned = with_nan(good, 3, stream=bad)
    without = [batch for k, batch in enumerate(good) if k // accumulate != 3 // accumulate]
    guard = DivergenceGuard("skip")
    with pytest.warns(UserWarning, match=rf"NaN or infinite in step {3 // accumulate + 1} .*; the step is skipped"):
        after = end_of(tmp_path / "a", module_of(stage, optimizer), poisoned, guard, accumulate_grad_batches=accumulate)
    expected = end_of(tmp_path / "b", module_of(stage, optimizer), without, None, accumulate_grad_batches=accumulate)
    assert_bitwise(after, expected)
    assert guard.num_skipped == 1
    if stage == 2:
        assert int(after["weights"]["curriculum.num_steps"]) >= 1


def test_a_healthy_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    with_guard = end_of(tmp_path / "a", module_of(2), batches(4), DivergenceGuard())
    assert_bitwise(with_guard, end_of(tmp_path / "b", module_of(2), batches(4), None))
    assert not (tmp_path / "a" / "post_mortem").exists()


def test_large_gradients_whose_squares_overflow_are_finite(tmp_path: Path) -> None:
    class Steep(RobustClassifierModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 1e25 * super().training_step(batch, batch_idx)

    module = Steep(tiny.energy_model(), optimizer=partial(torch.optim.SGD, lr=1e-30), threat_model=tiny.ATTACK)
    guard = DivergenceGuard("stop")
    fit(tmp_path, module, batches(2), guard)
    assert guard.num_skipped == 0


def test_a_run_that_stops_is_left_as_before_the_step(tmp_path: Path) -> None:
    entries = with_nan(batches(4), 2)
    stopped, reference = module_of(2), module_of(2)
    with pytest.raises(
        TrainingFailureError, match=r"^the loss is NaN or infinite in step 3 \(epoch 0, batch 2\): 1 of"
    ):
        fit(tmp_path / "a", stopped, entries, DivergenceGuard("stop"))
    tiny.trainer(tmp_path / "b", limit_train_batches=2).fit(reference, DataLoader(entries, batch_size=None))  # type: ignore[arg-type]
    assert_bitwise(dict(stopped.state_dict()), dict(reference.state_dict()))


def test_the_file_has_what_the_step_needs_to_be_done_again(tmp_path: Path) -> None:
    entries, module = with_nan(batches(3), 1), module_of(2)
    with pytest.raises(TrainingFailureError) as failure:
        fit(tmp_path, module, entries, DivergenceGuard("stop"))
    path = tmp_path / "post_mortem" / "step00000002-rank0.safetensors"
    assert f"; its batch is in {path}" in str(failure.value)
    mortem = load_post_mortem(path)
    assert set(mortem.batch) == set(entries[1])
    for name, value in mortem.batch.items():
        torch.testing.assert_close(value, entries[1][name], rtol=0, atol=0, equal_nan=True)
    model = module.energy_model.eval()
    for name in ("x_gen", "x_clf", "x_ood"):
        expected = -torch.log(model(entries[1][name]).detach().double().exp().sum(1))
        torch.testing.assert_close(mortem.energies[name].double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert mortem.energies["x_clf"].isnan().tolist() == [k == 2 for k in range(16)]
    report = mortem.report
    assert {"step": 2, "epoch": 0, "batch_idx": 1, "rank": 0, "loss": "nan"}.items() <= report.items()
    # The state before the step: one batch of 16 of a window of 40, hence ceil(40/16) = 3 values.
    assert (report["contrastive_steps"], int(module.curriculum.count)) == (0, 1)
    assert report["window_auc"] == pytest.approx(float(module.curriculum.values[0]))
    assert report["metrics"]["train/classification_loss"] == "nan"
    assert math.isfinite(report["metrics"]["train/energy_loss"])
    assert report["learning_rates"] == [0.05]
    assert report["bad_gradients"]["count"] == len(list(module.parameters()))
    again = module_of(2)
    again.load_state_dict(module.state_dict())
    with pytest.warns(UserWarning, match="reference is not registered"):
        assert again.training_step(mortem.batch, 0).isnan()


def test_the_run_stops_after_too_many_skipped_steps_but_not_after_as_many_as_allowed(tmp_path: Path) -> None:
    guard = DivergenceGuard("skip", max_skipped_share=0.03)
    with pytest.warns(UserWarning, match="the step is skipped"):
        trainer = fit(tmp_path, module_of(1), with_nan(batches(6), 0, 2, 4), guard)
    assert (trainer.global_step, guard.num_skipped) == (6, 3)
    assert float(trainer.callback_metrics["train/skipped_steps"]) == 3
    message = r"^2 of the last 100 steps were skipped, more than max_skipped_share 0.01 allows, .* the loss is NaN"
    with pytest.raises(TrainingFailureError, match=message), pytest.warns(UserWarning, match=r"in step 2 "):
        fit(tmp_path, module_of(1), with_nan(batches(6), 1, 2, 4), DivergenceGuard("skip", max_skipped_share=0.01))


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_a_second_run_counts_anew(tmp_path: Path) -> None:
    guard = DivergenceGuard("skip", max_saved=1, dirpath=str(tmp_path / "kept"))
    for _ in range(2):
        fit(tmp_path, module_of(1), with_nan(batches(5), 0, 2), guard)
        assert (guard.num_skipped, sum(guard.state_dict()["recent"])) == (2, 2)
    fit(tmp_path, module_of(1), batches(2), guard)
    assert guard.num_skipped == 0


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_only_the_first_failures_are_kept_also_over_a_resume(tmp_path: Path) -> None:
    guard = DivergenceGuard("skip", max_saved=2)
    fit(tmp_path, module_of(1), with_nan(batches(5), 0, 2, 4), guard)
    folder = tmp_path / "post_mortem"
    assert sorted(p.name[:12] for p in folder.iterdir()) == ["step00000001", "step00000003"]
    later = DivergenceGuard("skip", max_saved=3, dirpath=str(tmp_path / "later"))
    later.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    fit(tmp_path, module_of(1), with_nan(batches(3), 0, 2), later)
    assert [p.name[:12] for p in (tmp_path / "later").iterdir()] == ["step00000001"]
    assert later.num_skipped == 5


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_a_large_batch_is_kept_in_part(tmp_path: Path) -> None:
    entry = {
        "x_clf": torch.rand(512, 1, 64, 64),
        "y_clf": torch.zeros(512, dtype=torch.long),
        "draw": torch.arange(512),
    }
    (bad,) = with_nan([entry], 0)
    fit(tmp_path, module_of(1, threat_model=ThreatModel(num_steps=0)), [bad], DivergenceGuard("skip", max_megabytes=1))
    (path,) = (tmp_path / "post_mortem").iterdir()
    assert path.stat().st_size < 1.01 * 2**20
    mortem = load_post_mortem(path)
    # 512 images of 4 bytes × 4096 pixels, with label, draw and energy of 20 bytes each.
    expected = int(512 * 2**20 / (512 * (4 * 64 * 64 + 8 + 8 + 4)))
    assert [len(t) for t in (*mortem.batch.values(), *mortem.energies.values())] == [expected] * 4
    assert mortem.report["share_of_examples"] == pytest.approx(expected / 512, abs=1 / 512)


def test_a_full_disk_does_not_hide_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingFailureError, match=r"could not be saved to .*: No space left on device$"):
        fit(tmp_path, module_of(1), with_nan(batches(1), 0), DivergenceGuard())
    assert list((tmp_path / "post_mortem").iterdir()) == []


def test_other_files_are_no_post_mortem(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no post-mortem at"):
        load_post_mortem(tmp_path / "none")
    (tmp_path / "text").write_text("hello, this is no file of tensors")
    with pytest.raises(ValueError, match=r"text is not a readable post-mortem: "):
        load_post_mortem(tmp_path / "text")
    save_file({"w": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights.safetensors is no post-mortem of DivergenceGuard"):
        load_post_mortem(tmp_path / "weights.safetensors")


# What a failure looks like.


def said(path: Path, module: Any, entries: Sequence[Any], **kwargs: Any) -> list[str]:
    with pytest.raises(TrainingFailureError) as failure:
        fit(path, module, entries, DivergenceGuard("stop", dirpath=str(path / "pm")), **kwargs)
    (file,) = (path / "pm").iterdir()
    signatures: list[str] = load_post_mortem(file).report["signatures"]
    assert signatures[0] in str(failure.value)
    return signatures


def test_pixels(tmp_path: Path) -> None:
    first, last = said(tmp_path / "a", module_of(2), with_nan(batches(1), 0, stream="x_ood", value=math.inf))
    assert first == "1 of 16 images of x_ood have NaN or infinite pixels: mend the data or its transform"
    assert last.startswith("mostly the cause is a learning rate (0.05) or contrastive step too large")
    # The module itself looks at the pixels of the first batch alone.
    bright = batches(2)
    bright[1]["x_gen"] *= 255
    bright[1]["draw"][0] = -1
    assert said(tmp_path / "b", module_of(2), bright)[0].startswith("x_gen has pixels from 0 to 255: attacks clip to")


def test_the_learning_rate(tmp_path: Path) -> None:
    huge = partial(torch.optim.SGD, lr=1e18)
    (signature,) = said(tmp_path, module_of(1, huge), batches(6))
    assert signature.startswith("mostly the cause is a learning rate (1e+18) too large: lower it and resume")


def test_weights_that_were_damaged_before(tmp_path: Path) -> None:
    module = module_of(1)
    module.energy_model.backbone.fc.bias.data[3] = math.nan
    first, _ = said(tmp_path, module, batches(1))
    assert first.startswith("1 weights or running statistics were not finite before this step already, such as")
    assert "energy_model.backbone.fc.bias: the checkpoint or init_from is damaged" in first


def test_a_missing_attack(tmp_path: Path) -> None:
    entries = batches(1)
    entries[0]["draw"][0] = -1
    for k, threat in enumerate([ThreatModel(eps=0.0), ThreatModel(num_steps=0), ThreatModel(step_size=0.0)]):
        first = said(tmp_path / str(k), module_of(2, threat_model=threat), entries)[0]
        assert first.startswith("the classification term sees no adversarial images, without which")
    first = said(tmp_path / "weight", module_of(2, classification_weight=0.0), entries)[0]
    assert first.startswith("the classification term sees no adversarial images")
    assert len(said(tmp_path / "none", module_of(2), entries)) == 1
    first = said(tmp_path / "r1", module_of(2, classification_weight=0.0, r1_weight=0.5), entries)[0]
    assert first.endswith("keep its attack (threat_model.eps > 0), or raise r1_weight, which is 0.5")


def test_what_classifies_nothing_misses_no_attack(tmp_path: Path) -> None:
    """AT-EBM has R1 in its place, unless that is switched off."""
    entries = batches(1)
    entries[0]["draw"][0] = -1
    network = EnergyModel(SmallResNet(num_classes=1, widths=(4, 8)))
    (rate,) = said(tmp_path / "with", BadATEBM(network, optimizer=tiny.SGD), entries)
    assert rate.startswith("mostly the cause is a learning rate (0.05) or contrastive step too large")
    first, _ = said(tmp_path / "without", BadATEBM(network, optimizer=tiny.SGD, r1_weight=0.0), entries)
    assert first.startswith("neither an attacked classification nor R1 holds the energy's gradient down: set r1_weight")


class Thawed(BadStage2):
    """The mistake: batch norm goes back to train mode."""

    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
        return x


def test_batch_norm_in_train_mode(tmp_path: Path) -> None:
    entries = batches(1)
    entries[0]["draw"][0] = -1
    module = Thawed(tiny.energy_model(), AUCCurriculum(), optimizer=SGD, threat_model=tiny.ATTACK)
    assert "batch norm layers are in train mode" in said(tmp_path, module, entries)[0]


def test_seeds_that_are_training_images(tmp_path: Path) -> None:
    entries = batches(3)
    entries[2]["draw"][0] = -1
    for entry in entries:
        entry["x_ood"] = entry["x_gen"].clone()
    module = module_of(2, partial(torch.optim.SGD, lr=1e-6))
    module.curriculum.auc_threshold = 0.9
    assert said(tmp_path, module, entries)[0].startswith("OOD seeds cannot be told from training images (AUC 0.50 at T")


class Overflowing(RobustClassifierModule):
    """Logits beyond what float16 holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.energy_model.backbone.fc.bias.data.fill_(6e5)  # type: ignore[union-attr, operator]
        return super().training_step(batch, batch_idx)


def half(scale: float = 1024.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))


def test_float16(tmp_path: Path) -> None:
    module = Overflowing(tiny.energy_model(), optimizer=SGD, threat_model=ThreatModel(num_steps=0))
    first = said(tmp_path, module, batches(1), plugins=[half()])[0]
    assert first == "energies overflow in precision 16-mixed and are finite in float32: use bf16-mixed or 32-true"


# The gradient scaler.


@pytest.mark.parametrize("optimizer", [SGD, FUSED])
def test_gradients_that_overflow_while_the_scale_is_large_are_the_scalers(optimizer: Any, tmp_path: Path) -> None:
    """Its scale is halved and the step left out, as without the guard; the next ones train."""
    ends = []
    for guard in (DivergenceGuard("stop"), None):
        precision = half(2.0**40)
        ends.append(end_of(tmp_path, module_of(1, optimizer), batches(3), guard, plugins=[precision]))
        assert precision.scaler is not None
        assert precision.scaler.get_scale() == 2.0**37
    assert_bitwise(ends[0], ends[1])


@pytest.mark.parametrize("optimizer", [SGD, FUSED])
def test_a_loss_that_is_nan_is_the_guards_also_with_a_scaler(optimizer: Any, tmp_path: Path) -> None:
    """The scaler alone keeps it from the weights too, but not from the statistics of batch norm and the average."""
    entries, precision = with_nan(batches(5), 1), half(8.0)
    model = partial(module_of, 1, optimizer, threat_model=ThreatModel(num_steps=0))
    with pytest.warns(UserWarning, match=r"the loss is NaN or infinite in step 2 .*the step is skipped"):
        after = end_of(tmp_path, model(), entries, DivergenceGuard("skip"), plugins=[precision])
    alone = end_of(tmp_path, model(), entries, None, plugins=[half(8.0)])
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == 4.0
    assert_bitwise(after["optimizer"], alone["optimizer"])
    statistics = [name for name in after["weights"] if "running" in name]
    assert all(bool(after["weights"].pop(name).isfinite().all()) for name in statistics)
    assert all(bool(alone["weights"].pop(name).isnan().any()) for name in statistics)
    assert_bitwise(
        after["weights"],
        {n: v for n, v in alone["weights"].items() if "tracked" not in n}
        | {n: v - 1 for n, v in alone["weights"].items() if "tracked" in n},
    )
    assert int(after["average"]["n_averaged"]) == 4


def test_gradients_that_overflow_at_scale_1_are_a_failure(tmp_path: Path) -> None:
    entries = batches(2)
    entries[1]["draw"][0] = -1
    with pytest.raises(TrainingFailureError, match=r"a gradient is NaN or infinite in step 2 .*float16 \(precision 16"):
        fit(tmp_path, module_of(1), entries, DivergenceGuard(), plugins=[half(1.0)])


# Its surroundings.


def test_diagnostics_do_not_stop_at_a_step_that_is_skipped(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the step is skipped"):
        fit(tmp_path, module_of(2), with_nan(batches(4), 1), DivergenceGuard("skip"), callbacks=[Diagnostics(1)])


class Foreign(LightningModule):
    """Somebody else's module: tuples, no energy, a norm layer that is not trained, two optimisers stepped by hand.

    What each part sees is multiplied by its entry of the batch; ``together`` is one backward pass for both.
    """

    def __init__(self, *, together: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.together = together
        self.norm = nn.BatchNorm1d(3)
        self.one, self.two = nn.Linear(3, 1), nn.Linear(3, 1)
        self.done: Tensor
        self.register_buffer("done", torch.zeros(()))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.1) for part in (self.one, self.two)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        x, scales = batch
        for optimizer in optimizers:
            optimizer.zero_grad()
        if self.together:
            self.manual_backward(torch.stack([self.part_loss(k, x, scales[k]) for k in (0, 1)]).sum())
        for k, optimizer in enumerate(optimizers):
            if not self.together:
                self.manual_backward(self.part_loss(k, x, scales[k]))
            optimizer.step()
        self.done = self.done + 1

    def part_loss(self, k: int, x: Tensor, scale: Tensor) -> Tensor:
        loss: Tensor = (self.one, self.two)[k](self.norm(x * scale)).square().mean()
        return loss


def foreign_batches(scales: list[tuple[float, float]]) -> list[Any]:
    x = torch.randn(len(scales), 4, 3, generator=torch.Generator().manual_seed(0))
    return [(x[k], torch.tensor(entry)) for k, entry in enumerate(scales)]


@pytest.mark.parametrize(("failing", "together", "step"), [(0, False, 3), (1, False, 4), (0, True, 3), (1, True, 3)])
def test_any_module_can_be_guarded(failing: int, together: bool, step: int, tmp_path: Path) -> None:
    """One of two losses fails in the second batch: after that no optimiser moves and no statistics stay."""
    scales = [(1.0, 1.0) for _ in range(4)]
    scales[1] = (math.inf, 1.0) if failing == 0 else (1.0, math.inf)
    entries = foreign_batches(scales)
    torch.manual_seed(0)
    module, expected = Foreign(together=together), Foreign()
    expected.load_state_dict(module.state_dict())
    guard = DivergenceGuard("skip")
    trainer = tiny.trainer(tmp_path, [guard], limit_train_batches=1.0)
    with pytest.warns(UserWarning, match=rf"the loss is NaN or infinite in step {step} "):
        trainer.fit(module, DataLoader(entries, batch_size=None))  # type: ignore[arg-type]
    assert guard.num_skipped == 1
    (path,) = (tmp_path / "post_mortem").iterdir()
    mortem = load_post_mortem(path)
    assert {name: tuple(t.shape) for name, t in mortem.batch.items()} == {"0": (4, 3), "1": (2,)}
    optimizers = expected.configure_optimizers()
    for k, (x, _) in enumerate(entries):
        before = {name: value.clone() for name, value in expected.norm.state_dict().items()}
        for j, optimizer in enumerate(optimizers):
            # Of the bad batch the first optimiser steps if the second one's loss is computed later, and fails.
            if k == 1 and (failing == 0 or together or j == 1):
                continue
            optimizer.zero_grad()
            expected.part_loss(j, x, torch.tensor(1.0)).backward()
            optimizer.step()
        expected.done += k != 1
        if k == 1:
            expected.norm.load_state_dict(before)
    assert_bitwise(module.state_dict(), expected.state_dict())


def test_one_optimiser_that_always_fails_is_not_hidden_by_the_other(tmp_path: Path) -> None:
    entries = foreign_batches([(1.0, math.inf)] * 4)
    with (
        pytest.raises(TrainingFailureError, match=r"^3 of the last 100 steps were skipped"),
        pytest.warns(UserWarning, match="the step is skipped"),
    ):
        tiny.trainer(tmp_path, [DivergenceGuard("skip", max_skipped_share=0.02)]).fit(
            Foreign(),
            DataLoader(entries, batch_size=None),  # type: ignore[arg-type]
        )


class Plain(LightningModule):
    """A norm layer and a linear one, whose loss is NaN in the batches named bad."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch * math.nan if batch_idx in self.bad else batch
        loss: Tensor = self.linear(self.norm(x)).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.linear(self.norm(batch)).square().mean())


def fit_plain(
    path: Path, module: LightningModule, callbacks: list[Any], count: int = 8, resume: Path | None = None, **kwargs: Any
) -> Trainer:
    """Trains on copies of one batch, so that a run that goes on in mid-epoch has the same data."""
    torch.manual_seed(0)
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    trainer = tiny.trainer(path, callbacks, **{"limit_train_batches": 1.0, **kwargs})
    entries: Any = [x] * count
    trainer.fit(module, DataLoader(entries, batch_size=None), DataLoader(entries, batch_size=None), ckpt_path=resume)
    return trainer


class Reassigning(Plain):
    """Buffers that are not changed in place: a mean that is NaN then, a list that grows, one that comes and goes."""

    def __init__(self, *bad: int) -> None:
        super().__init__(*bad)
        self.mean: Tensor
        self.seen: Tensor
        self.last: Tensor | None
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("last", None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        self.seen = torch.cat([self.seen, loss.detach()[None]])
        self.last = None if self.last is not None else loss.detach().clone()
        return loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffers_that_are_reassigned_are_as_before_the_step(accumulate: int, tmp_path: Path) -> None:
    poisoned, expected = Reassigning(2), Reassigning()
    with pytest.warns(UserWarning, match="the step is skipped"):
        fit_plain(tmp_path, poisoned, [DivergenceGuard("skip")], 6, accumulate_grad_batches=accumulate)
    fit_plain(tmp_path, expected, [], 6 - accumulate, accumulate_grad_batches=accumulate)
    assert_bitwise(poisoned.state_dict(), expected.state_dict())
    assert poisoned.seen.shape == (6 - accumulate,)
    assert sorted(name for name, _ in poisoned.named_buffers()) == sorted(name for name, _ in expected.named_buffers())


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_validation_in_the_middle_of_a_step_that_failed_sees_sound_buffers(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, float]] = []

    class Watched(Plain):
        def on_validation_epoch_end(self) -> None:
            finite = all(bool(b.isfinite().all()) for b in self.buffers())
            seen.append((self.trainer.global_step, finite, float(self.trainer.callback_metrics["val/loss"])))

    fit_plain(
        tmp_path,
        # The second and third batch of the second step.
        Watched(5, 6),
        [DivergenceGuard("skip")],
        accumulate_grad_batches=4,
        val_check_interval=1,
        limit_val_batches=1,
    )
    assert [step for step, _, _ in seen] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert all(finite for _, finite, _ in seen)
    # From the failure on, the buffers are those before the step.
    assert seen[3][2] == seen[5][2] == seen[6][2] == seen[7][2] != seen[4][2]


@pytest.mark.filterwarnings("ignore:.*the step is skipped", "ignore:.*your dataloader is not resumable")
def test_a_run_that_resumes_after_a_skipped_step_is_the_same(tmp_path: Path) -> None:
    """With accumulated gradients the step's number stays for some batches, in which the average must not move."""

    def callbacks() -> list[Any]:
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        return [Keeper(decay=0.9), DivergenceGuard("skip"), saver]

    first, again = callbacks(), callbacks()
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "enable_checkpointing": True}
    fit_plain(tmp_path, Plain(4), first, **settings)
    fit_plain(tmp_path, Plain(4), again, **settings, resume=tmp_path / "step=3.ckpt")
    assert_bitwise(again[0].kept, first[0].kept)
    assert again[1].state_dict() == first[1].state_dict()
    assert first[1].state_dict()["recent"] == [False, False, True, False]


def test_a_run_of_which_too_many_steps_are_skipped_stops(tmp_path: Path) -> None:
    """Every fifth step fails: the sixth failure is more than 5 of 100; the share goes on when the run resumes."""
    guard = DivergenceGuard("skip", max_skipped_share=0.05)
    with (
        pytest.raises(TrainingFailureError, match=r"^6 of the last 100 steps were skipped, .*in step 30 "),
        pytest.warns(UserWarning, match="the step is skipped"),
    ):
        fit_plain(tmp_path, Plain(*range(4, 100, 5)), [guard], 100)
    state = guard.state_dict()
    later = DivergenceGuard("skip", max_skipped_share=0.05)
    later.load_state_dict(json.loads(json.dumps(state)))
    with pytest.raises(TrainingFailureError, match=r"^7 of the last 100 steps were skipped, .*in step 1 "):
        fit_plain(tmp_path, Plain(0), [later])
    # The first failures are more than 100 steps ago.
    spread = DivergenceGuard("skip", max_skipped_share=0.05)
    with pytest.warns(UserWarning, match="the step is skipped"):
        fit_plain(tmp_path, Plain(*range(19, 200, 20)), [spread], 200)
    assert (spread.num_skipped, sum(spread.state_dict()["recent"])) == (10, 5)


@pytest.mark.filterwarnings("ignore:.*; the step is skipped")
def test_the_end_says_how_many_steps_were_skipped(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"that were skipped: 2, by step 8\..*; see .*post_mortem$"):
        fit_plain(tmp_path, Plain(2, 5), [DivergenceGuard("skip")])


@pytest.mark.ddp
@pytest.mark.slow
def test_all_processes_decide_alike(tmp_path: Path) -> None:
    """One rank's loss fails, then another's gradient: both skip both steps, and the culprits keep their shares."""
    command = [sys.executable, "-m", "tests.training.run_divergence", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=250)
    assert run.returncode == 0, run.stderr[-3000:]
    states = [torch.load(tmp_path / f"state-{rank}.pt", weights_only=True) for rank in (0, 1)]
    # The batch that fails on one rank leaves no statistics on either; the others leave those of each rank's images.
    for seen in (state.pop("seen") for state in states):
        assert len(seen) == 8
        for start in (1, 3):
            assert torch.equal(seen[start + 1], seen[start])
            assert torch.equal(seen[start + 2], seen[start])
        assert not torch.equal(seen[6], seen[5])
    assert_bitwise(states[0], states[1])
    recent = [False, True, True, False]
    assert states[0]["guard"] == {"num_skipped": 2, "skipped_step": 3, "recent": recent}
    assert all(bool(value.isfinite().all()) for value in states[0]["weights"].values())
    files = sorted(path.name for path in (tmp_path / "post_mortem").iterdir())
    names = ["step00000002-rank1", "step00000003-rank0", "step00000003-rank1"]
    assert files == [f"{name}.safetensors" for name in names]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "wait"}, "action must be 'stop' or 'skip', got 'wait'"),
        ({"max_skipped_share": -0.1}, r"max_skipped_share must lie in \[0, 1\], got -0.1"),
        ({"max_skipped_share": 1.5}, r"max_skipped_share must lie in \[0, 1\], got 1.5"),
        ({"max_saved": -1}, "max_saved must be at least 0, got -1"),
        ({"max_megabytes": -1}, "max_megabytes must be at least 0, got -1"),
    ],
)
def test_values_outside_their_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DivergenceGuard(**arguments)
