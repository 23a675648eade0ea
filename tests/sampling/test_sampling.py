"""Generation and its consumers."""

import errno
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchvision.transforms import v2

from dat_lightning import (
    DigitsDataModule,
    DigitsFeatures,
    FrechetDistance,
    Langevin,
    Momentum,
    PGDSampler,
    RandomLength,
    SampleBatch,
    SampleConsumer,
    SampleGrid,
    SampleMetrics,
    SampleWriter,
    SamplingPlan,
    Steepest,
    UpdateRule,
    ascend,
    unbounded_ascent,
)
from dat_lightning.core import Logits, State, Step, targeted_logit
from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import normal_noise
from dat_lightning.data.draws import DrawStream, EvaluationBatches
from dat_lightning.features import Gaussian
from dat_lightning.features.gaussian_stats import read_statistics
from dat_lightning.features.layers import DigitsLayers, LayerReader
from dat_lightning.results.digests import reference_digest
from dat_lightning.results.measurement import canonical
from dat_lightning.sampling.reference import reference_key
from dat_lightning.speed import Execution
from tests import tiny


class Collector(SampleConsumer):
    """Keeps everything that a sampler hands out."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.batches: list[SampleBatch] = []
        self.plans: list[SamplingPlan] = []

    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        self.calls.append("start")
        self.plans.append(plan)

    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        self.calls.append("batch")
        self.batches.append(batch)

    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls.append("end")

    def images(self, steps: int) -> Tensor:
        return torch.cat([b.images[steps] for b in self.batches])


def read_image(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)


def sampler(**kwargs: Any) -> PGDSampler:
    return PGDSampler(**{"num_samples": 25, "num_steps": [1, 3], "step_size": 0.5, "batch_size": 10, **kwargs})


def run(path: Path, *callbacks: Callback, module: LightningModule | None = None, **kwargs: Any) -> Trainer:
    trainer = tiny.trainer(path, callbacks, limit_test_batches=1, **kwargs)
    trainer.test(module or tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    return trainer


def test_samples_are_what_the_method_says(tmp_path: Path) -> None:
    """Class i mod K, the i-th held-out seed, and the ascent of a separate call for each step count."""
    collector, module = Collector(), tiny.stage1().eval()
    run(tmp_path, collector, sampler(), module=module)
    assert collector.calls == ["start", "batch", "batch", "batch", "end"]
    seed_settings = {"seed_transform": "augment"}
    assert collector.plans == [
        SamplingPlan("test", 25, 10, (1, 3), 0.5, Steepest(), {1: 2, 3: 6}, "nearest", seed_settings)
    ]
    seeds = tiny.digits().held_out_seeds()
    x = torch.stack([seeds(i)[0] for i in range(25)])
    y = torch.arange(25) % 10
    assert torch.equal(torch.cat([b.indices for b in collector.batches]), torch.arange(25))
    assert torch.equal(torch.cat([b.labels for b in collector.batches]), y)
    assert torch.equal(torch.cat([b.seeds for b in collector.batches]), x)
    for steps in (1, 3):
        expected = ascend(module, x, y, targeted_logit, unbounded_ascent(0.5, steps))
        torch.testing.assert_close(collector.images(steps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", [Steepest(), RandomLength(0.5), Langevin(0.1)])
def test_samples_do_not_depend_on_the_batch_size(rule: UpdateRule, tmp_path: Path) -> None:
    collectors = [Collector(), Collector()]
    for collector, size in zip(collectors, (25, 4), strict=True):
        torch.manual_seed(size)  # nor on the global generator
        run(tmp_path, collector, sampler(batch_size=size, rule=rule))
    torch.testing.assert_close(collectors[0].images(3), collectors[1].images(3), rtol=0, atol=1e-3)


def test_noise_is_of_the_samples_own_streams() -> None:
    """Where the gradient is zero, a step of Langevin is the noise of each sample's index."""
    seeds, indices = torch.full((5, 1, 4, 4), 0.5), torch.tensor([21, 3, 11, 13, 1])
    batch = sampler(num_steps=[1], rule=Langevin(0.1)).generate(lambda x: x.flatten(1) * 0, seeds, indices, 10)
    noise = torch.cat([normal_noise(0, "noise of step 0", [index], (1, 4, 4)) for index in (21, 3, 11, 13, 1)])
    torch.testing.assert_close(batch.images[1], (seeds + 0.1 * noise).clamp(0, 1))
    assert len(torch.unique(batch.images[1], dim=0)) == 5


def test_images_are_generated_once_for_many_consumers(tmp_path: Path) -> None:
    first, second = Collector(), Collector()
    run(tmp_path, first, sampler(), second)
    assert len(first.batches) == 3
    assert all(a is b for a, b in zip(first.batches, second.batches, strict=True))


def test_sampling_leaves_no_trace(tmp_path: Path) -> None:
    module = tiny.stage1()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run(tmp_path, Collector(), sampler(), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_sampling_during_fit(tmp_path: Path) -> None:
    collector = Collector()
    callbacks = [collector, sampler(every_n_epochs=2)]
    trainer = tiny.trainer(
        tmp_path, callbacks, max_epochs=4, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=1
    )
    trainer.fit(tiny.stage1(), datamodule=tiny.digits())
    assert [plan.stage for plan in collector.plans] == ["val", "val"]


def test_stages_can_be_left_out(tmp_path: Path) -> None:
    collector = Collector()
    run(tmp_path, collector, sampler(stages=["predict"]))
    assert collector.calls == []
    tiny.trainer(tmp_path, [collector, sampler(stages=["predict"])]).predict(tiny.stage1(), datamodule=tiny.digits())
    assert collector.plans[0].stage == "predict"


def test_consumers_get_the_samples_of_their_stages_and_none_are_made_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_test, for_predict = Collector(), Collector()
    for_test.stages, for_predict.stages = ("test",), ("predict",)
    trainer = tiny.trainer(tmp_path, [for_predict, sampler(), for_test])
    trainer.test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    assert (for_predict.calls, for_test.calls[0], for_test.calls[-1]) == ([], "start", "end")
    assert for_test.plan is for_test.plans[0]
    monkeypatch.setattr(PGDSampler, "generate", pytest.fail)
    trainer.validate(tiny.stage1(), datamodule=tiny.digits(), verbose=False)


class ForeignModule(LightningModule):
    """A module of another project, which knows nothing of this one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/mean", self(batch["x"]).mean())


def test_any_module_can_be_sampled_in_inference_mode(tmp_path: Path) -> None:
    collector = Collector()
    run(tmp_path, collector, sampler(), module=ForeignModule(), inference_mode=True)
    assert collector.plans[0].num_classes == 4
    logits = [ForeignModule.forward(m, collector.images(s)) for m in [ForeignModule()] for s in (1, 3)]
    assert logits[0].shape == (25, 4)
    assert not torch.equal(collector.images(1), collector.images(3))


class Broken(ForeignModule):
    """Its gradients are NaN where the first pixel is dark."""

    def forward(self, x: Tensor) -> Tensor:
        pixel = x[:, :, 0, 0]
        # sqrt'(0) is infinite, and 0 · inf is NaN.
        return super().forward(x) + 0 * (pixel * (pixel > 0.5)).sqrt()


@pytest.mark.parametrize("writes", [False, True])
def test_samples_that_are_nan_are_named_before_anybody_sees_them(writes: bool, tmp_path: Path) -> None:
    """In eight bits they would be black."""
    seeds = tiny.digits().held_out_seeds()
    dark = [float(seeds(i)[0][0, 0, 0]) <= 0.5 for i in range(25)]
    first = dark.index(True)
    collector = Collector()
    consumers = [collector, SampleWriter(str(tmp_path / "samples"), stages=("test",))] if writes else [collector]
    said = rf"sample {first} is NaN after 1 steps, and {sum(dark)} of the 25 samples in its batch are"
    with pytest.raises(InputError, match=said):
        run(tmp_path, *consumers, sampler(num_steps=[0, 1, 3], batch_size=25), module=Broken())
    assert collector.batches == []
    assert not [*tmp_path.rglob("*.npz"), *tmp_path.rglob("*.png")]


def test_a_network_whose_parameters_are_nan_has_no_samples_in_any_stage(tmp_path: Path) -> None:
    """A bias does not enter the gradient, so that samples would be images."""
    module = ForeignModule()
    list(module.parameters())[-1].data[2] = torch.nan
    with pytest.raises(InputError, match="PGDSampler needs finite logits, got NaN or infinite ones for 1 of 1 images"):
        run(tmp_path, Collector(), sampler(), module=module)
    own = tiny.stage1()
    best = ModelCheckpoint(tmp_path / "best", monitor="val/fid")
    fid = FrechetDistance(DigitsFeatures(), cache_dir=str(tmp_path))
    trainer = tiny.trainer(tmp_path, [sampler(), fid, best], limit_val_batches=1, enable_checkpointing=True)

    class Breaking(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            list(own.parameters())[-1].data.fill_(torch.nan)

    trainer.callbacks.append(Breaking())  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="PGDSampler needs finite logits"):
        trainer.fit(own, datamodule=tiny.digits())
    assert best.best_model_score is None


@pytest.mark.parametrize("change", [lambda f: (f, f), lambda f: {"logits": f}, lambda f: f[:, :, None, None]])
def test_a_network_without_logits_has_no_samples(change: Any, tmp_path: Path) -> None:
    module = ForeignModule()
    module.net.append(Changed(change))
    module.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"PGDSampler needs logits \(N, K\) .*, and ForeignModule gave"):
        run(tmp_path, Collector(), sampler(), module=module)


class Changed(nn.Module):
    """A last layer."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, logits: Tensor) -> Any:
        return self.change(logits)


def test_a_consumer_needs_a_sampler(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Collector consumes samples: add a PGDSampler to trainer.callbacks"):
        run(tmp_path, Collector())


def test_two_samplers_would_mix_their_figures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer.callbacks has PGDSampler and PGDSampler: every consumer would see"):
        run(tmp_path, sampler(), sampler(num_steps=[1]), Collector())


def test_a_sampler_needs_seeds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no out-of-distribution images \(held_out\)"):
        tiny.trainer(tmp_path, [sampler(), Collector()], limit_test_batches=1).test(
            tiny.stage1(), datamodule=tiny.digits(ood="none", streams=["clf"]), verbose=False
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be a whole number of at least 1, got -1"),
        ({"num_steps": []}, r"num_steps must be step counts of at least 0, got \[\]"),
        ({"num_steps": [3, -1]}, r"num_steps must be step counts of at least 0, got \[3, -1\]"),
        ({"num_steps": [3, 1.5]}, r"num_steps must be step counts of at least 0, got \[3, 1.5\]"),
        ({"precision": "bf16"}, r"precision must be one of \(None, 'float32', 'bfloat16'\), got 'bf16'"),
        ({"stages": ["tests"]}, r"stages must be some of \('val', 'test', 'predict'\), got \['tests'\]"),
        ({"stages": "test"}, r"stages must be some of .*, got 'test'"),
        ({"rounding": "down"}, r"rounding must be one of \('nearest', 'truncate'\), got 'down'"),
        ({"step_size": -0.1}, "step_size must be a finite length of at least 0, got -0.1"),
    ],
)
def test_wrong_numbers(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**kwargs)


@pytest.mark.parametrize(("num_seeds", "num_samples", "enough"), [(20, 20, True), (20, 21, False), (19, 190, True)])
def test_seeds_that_are_taken_as_they_are_have_to_be_as_many_as_samples(
    num_seeds: int, num_samples: int, enough: bool, tmp_path: Path
) -> None:
    """Of 20 seeds and 10 classes sample 20 is sample 0 again; of 19 each meets each class."""
    data = tiny.digits(num_held_out=num_seeds, seed_transform="squash")
    collector = Collector()
    trainer = tiny.trainer(tmp_path, [sampler(num_samples=num_samples, num_steps=[1]), collector], limit_test_batches=1)
    if not enough:
        with pytest.raises(InputError, match=r"21 samples cannot be different ones: .* each of the 20 held-out images"):
            trainer.test(tiny.stage1(), datamodule=data, verbose=False)
        return
    trainer.test(tiny.stage1(), datamodule=data, verbose=False)


# Interrupted generation.


class Interrupted(SampleConsumer):
    """The power fails while samples with this index are consumed, or else at the end."""

    def __init__(self, index: int = -1) -> None:
        self.index = index

    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        if self.index in batch.indices.tolist():
            raise InterruptedError("the power is gone")

    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise InterruptedError("the power is gone")


class Counting(PGDSampler):
    """Notes with which sample each batch that is generated begins."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"num_samples": 25, "num_steps": [1, 3], "step_size": 0.5, "batch_size": 10, **kwargs})
        self.begun: list[int] = []

    def generate(self, logits: Logits, seeds: Tensor, indices: Tensor, num_classes: int) -> SampleBatch:
        self.begun.append(int(indices[0]))
        return super().generate(logits, seeds, indices, num_classes)


def same_batches(a: SampleBatch, b: SampleBatch) -> bool:
    """Bit for bit, types too."""
    values = [[x.indices, x.labels, x.seeds, *x.images.values()] for x in (a, b)]
    equal = (torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(*values, strict=True))
    return list(a.images) == list(b.images) and all(equal)


def files_of(folder: Path) -> dict[str, bytes]:
    """Name → contents; an archive's times are left out."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with np.load(folder / "samples.npz") as arrays:
        return {**files, "samples.npz": arrays["arr_0"].tobytes() + arrays["arr_1"].tobytes()}


@pytest.mark.parametrize(
    ("stage", "index", "missing"),
    [("test", 12, [20]), ("predict", 3, [10, 20]), ("predict", -1, [])],
)
def test_interrupted_generation_goes_on_where_it_stopped(
    stage: str, index: int, missing: list[int], tmp_path: Path
) -> None:
    """Every consumer ends with what an uninterrupted run gives it, bit for bit."""

    def sampled(name: str, *others: Callback) -> tuple[Counting, Collector, FrechetDistance]:
        counting = Counting(dirpath=None if name == "whole" else str(tmp_path / "kept"))
        collector, fid = Collector(), FrechetDistance(DigitsFeatures(), cache_dir=str(tmp_path / "cache"))
        writer = SampleWriter(str(tmp_path / name), stages=["test", "predict"])
        trainer = tiny.trainer(tmp_path, [counting, collector, fid, writer, *others], limit_test_batches=1)
        if stage == "test":
            trainer.test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
        else:
            trainer.predict(tiny.stage1(), datamodule=tiny.digits(), return_predictions=False)
        return counting, collector, fid

    with pytest.raises(InterruptedError):
        sampled("written", Interrupted(index))
    counting, collector, fid = sampled("written")
    assert counting.begun == missing
    assert list((tmp_path / "kept").iterdir()) == []
    _, expected, whole = sampled("whole")
    assert collector.plans == expected.plans
    assert collector.calls == ["start", "batch", "batch", "batch", "end"]
    assert all(same_batches(a, b) for a, b in zip(collector.batches, expected.batches, strict=True))
    assert fid.scores == whole.scores
    assert files_of(tmp_path / "written") == files_of(tmp_path / "whole")


class OtherForward(nn.Module):
    """A network whose weights do not show what it does with them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.net = nn.Linear(256, 10, bias=False)
        self.scale = scale
        with torch.no_grad():
            self.net.weight.copy_(torch.randn(10, 256, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x * self.scale).square().flatten(1))
        return logits


class Around(LightningModule):
    """A module of another project around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Leaves everything to the callbacks."""


class Longer(Counting):
    """A sampler with a setting of its own."""

    def __init__(self, extra: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "extra": self.extra}


class OnePixel(DigitsDataModule):
    """Digits, and seeds of which one may differ in one pixel."""

    def __init__(self, change: float) -> None:
        super().__init__(batch_size=32, num_ood=200, num_held_out=50)
        self.change = change

    def held_out_seeds(self) -> DrawStream:
        def seed(i: int) -> tuple[Tensor, None]:
            image = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(i))
            image[0, 3, 4] += self.change * (i == 14)
            return image, None

        return seed  # type: ignore[return-value]


CHANGES: dict[str, tuple[Mapping[str, Any], list[int]]] = {
    "nothing": ({}, []),
    "fewer samples": ({"num_samples": 20}, [0, 10]),
    "step size": ({"step_size": 0.6}, [0, 10, 20]),
    "rule": ({"rule": Momentum(0.3)}, [0, 10, 20]),
    "setting of the rule": ({"rule": Momentum(0.3, nesterov=True)}, [0, 10, 20]),
    "number of steps": ({"num_steps": [1, 4]}, [0, 10, 20]),
    "more snapshots": ({"num_steps": [1, 2, 3]}, [0, 10, 20]),
    "batch size": ({"batch_size": 13}, [0, 13]),
    "precision": ({"precision": "bfloat16"}, [0, 10, 20]),
    "precision of the trainer": ({"trainer": "bf16-mixed"}, [0, 10, 20]),
    "weights": ({"module": lambda: tiny.stage1(energy_model=tiny.energy_model(seed=1))}, [0, 10, 20]),
    "folded network": ({"module": lambda: tiny.stage1(execution=Execution(fold_batch_norm=True))}, [0, 10, 20]),
    "seeds": ({"change": 1e-3}, [10]),
    "setting of a subclass": ({"extra": 2.0}, [0, 10, 20]),
}


def with_change(
    path: Path,
    *others: Callback,
    dirpath: str | None,
    module: Callable[[], LightningModule] = tiny.stage1,
    trainer: str = "32-true",
    change: float = 0.0,
    extra: float = 1.0,
    **kwargs: Any,
) -> tuple[Longer, Collector]:
    counting, collector = Longer(extra, dirpath=dirpath, **kwargs), Collector()
    callbacks = [counting, collector, *others]
    tester = tiny.trainer(path, callbacks, limit_test_batches=1, precision=trainer)
    tester.test(module(), datamodule=OnePixel(change), verbose=False)
    return counting, collector


@pytest.mark.parametrize("name", CHANGES)
def test_kept_samples_are_never_mistaken_for_others(name: str, tmp_path: Path) -> None:
    changes, begun = CHANGES[name]
    with pytest.raises(InterruptedError):
        with_change(tmp_path, Interrupted(), dirpath=str(tmp_path / "kept"))
    counting, collector = with_change(tmp_path, dirpath=str(tmp_path / "kept"), **changes)
    assert counting.begun == begun
    _, expected = with_change(tmp_path, dirpath=None, **changes)
    assert all(same_batches(a, b) for a, b in zip(collector.batches, expected.batches, strict=True))
    # What is of another set stays for it; seeds are no settings, but what belongs to a folder's batches.
    left = len(list((tmp_path / "kept").rglob("samples-*.values")))
    assert left == (0 if name in ("nothing", "seeds") else 3)


def test_another_function_of_the_same_weights_is_noticed(tmp_path: Path) -> None:
    kept = str(tmp_path / "kept")
    with pytest.raises(InterruptedError):
        run(tmp_path, Counting(dirpath=kept), Interrupted(), module=Around(OtherForward(1.0)))
    counting = Counting(dirpath=kept)
    run(tmp_path, counting, Collector(), module=Around(OtherForward(1.1)))
    assert counting.begun == [0, 10, 20]


def test_half_written_batches_are_generated_anew(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with pytest.raises(InterruptedError):
        run(tmp_path, Counting(dirpath=str(kept)), Interrupted())
    first, second, _ = sorted(kept.rglob("samples-*.values"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"")
    counting, collector, expected = Counting(dirpath=str(kept)), Collector(), Collector()
    run(tmp_path, counting, collector)
    assert counting.begun == [0, 10]
    run(tmp_path, Counting(), expected)
    assert all(same_batches(a, b) for a, b in zip(collector.batches, expected.batches, strict=True))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_samples_of_any_type_are_kept_without_loss(precision: Any, tmp_path: Path) -> None:
    collectors = [Collector(), Collector()]
    module = Around(OtherForward(1.0))
    with pytest.raises(InterruptedError):
        run(tmp_path, Counting(dirpath=str(tmp_path / "kept")), Interrupted(), module=module, precision=precision)
    run(tmp_path, Counting(dirpath=str(tmp_path / "kept")), collectors[0], module=module, precision=precision)
    run(tmp_path, Counting(), collectors[1], module=module, precision=precision)
    assert collectors[0].images(3).dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert all(same_batches(a, b) for a, b in zip(*(c.batches for c in collectors), strict=True))


def test_validation_keeps_nothing(tmp_path: Path) -> None:
    counting = Counting(dirpath=str(tmp_path / "kept"))
    trainer = tiny.trainer(tmp_path, [counting, Interrupted()], limit_train_batches=1, limit_val_batches=1)
    for validate in (trainer.fit, trainer.validate):
        with pytest.raises(InterruptedError):
            validate(tiny.stage1(), datamodule=tiny.digits())
    assert counting.begun == 2 * [0, 10, 20]
    assert not (tmp_path / "kept").exists()


def test_a_writer_cleans_up_after_a_kill(tmp_path: Path) -> None:
    """What a kill may leave: half a picture, one of a class that is gone, shards and a half-made archive."""
    for name in ("png/0004/000014.png", "png/0777/000777.png", "shards/000000.npz", "shards/arr_0.npy", "samples.tmp"):
        path = tmp_path / "killed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    for folder in ("killed", "whole"):
        run(tmp_path, sampler(), SampleWriter(str(tmp_path / folder), stages=["test"]))
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    (tmp_path / "killed" / "samples.tmp").write_bytes(b"half")
    run(tmp_path, sampler(), SampleWriter(str(tmp_path / "killed"), formats=["png"], stages=["test"]))
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["png"]


# The Fréchet distance.


def test_fid_equals_torch_fidelity(tmp_path: Path) -> None:
    """Features of all samples at once through torch-fidelity's functions, against moments of batches."""
    collector = Collector()
    extractor = DigitsFeatures()
    fid = FrechetDistance(extractor, batch_size=100)
    trainer = run(tmp_path, collector, sampler(num_samples=150), fid)
    data = tiny.digits().reference_data()
    assert len(data.dataset) == 1437
    real = data[range(1437)]["x"]

    def statistics(images: Tensor) -> dict[str, np.ndarray]:
        pixels = (images * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)
        found: dict[str, np.ndarray] = fid_features_to_statistics(extractor(pixels).double())
        return found

    scores = {}
    for steps in (1, 3):
        metric = fid_statistics_to_metric(statistics(collector.images(steps)), statistics(real), verbose=False)
        scores[steps] = metric["frechet_inception_distance"]
        assert fid.scores[steps] == pytest.approx(scores[steps], rel=1e-6)
        assert float(trainer.callback_metrics[f"test/fid_{steps}_steps"]) == pytest.approx(scores[steps], rel=1e-5)
    best = min(scores, key=lambda s: scores[s])
    assert float(trainer.callback_metrics["test/fid"]) == pytest.approx(scores[best], rel=1e-5)
    assert float(trainer.callback_metrics["test/fid_steps"]) == best


class Constant(nn.Module):
    """Features that do not depend on much, and a tuple around them as torch-fidelity has it."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images.float().mean((2, 3))[:, :2] * self.get_buffer("scale"),)


def test_reference_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2, np.float32), sigma=np.eye(2, dtype=np.float32))
    fid = FrechetDistance(Constant(0.0), reference=str(tmp_path / "reference.npz"))
    run(tmp_path, sampler(), fid)
    assert fid.scores == {1: pytest.approx(2.0), 3: pytest.approx(2.0)}  # all features 0: tr Σ remains


def test_reference_is_cached_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    forward = Constant.forward

    def counting(self: Constant, images: Tensor) -> tuple[Tensor]:
        passes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Constant, "forward", counting)
    cache = tmp_path / "cache"

    def scores_of(extractor: nn.Module) -> dict[int, float]:
        passes.clear()
        fid = FrechetDistance(extractor, cache_dir=str(cache), batch_size=500)
        run(tmp_path, sampler(), fid)
        return fid.scores

    first = scores_of(Constant())
    key = 16  # images that tell extractors apart
    assert sum(passes) == key + 1437 + 2 * 25
    assert scores_of(Constant()) == first
    assert sum(passes) == key + 2 * 25
    scores_of(Constant(2.0))
    assert sum(passes) == key + 1437 + 2 * 25
    assert len(list(cache.glob("*.npz"))) == 2
    for path in cache.glob("*.npz"):
        path.write_bytes(b"not a zip file")
    with pytest.warns(UserWarning, match="not a readable .npz.*computing it anew"):
        assert scores_of(Constant()) == first
    for path in cache.glob("*.npz"):
        if path.read_bytes() != b"not a zip file":
            with np.load(path) as file:
                arrays = dict(file)
            arrays["sigma"][0, 1] = np.nan
            np.savez(path, **arrays)
    with pytest.warns(UserWarning, match="has NaN or infinity in sigma; computing it anew"):
        assert scores_of(Constant()) == first


def test_the_key_changes_with_data_transform_and_extractor() -> None:
    images = torch.rand(5, 1, 4, 4)

    class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __init__(self, images: Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.images[index], 0

    def key(images: Tensor, transform: nn.Module, extractor: nn.Module) -> str:
        data = EvaluationBatches(Images(images), transform)
        return reference_key(reference_digest(data), data, LayerReader(extractor))

    changed = images.clone()
    changed[2, 0, 1, 1] += 0.001
    keys = [
        key(images, nn.Identity(), Constant()),
        key(images.clone(), nn.Identity(), Constant()),
        key(changed, nn.Identity(), Constant()),
        key(images, nn.ReLU(), Constant()),
        key(images, nn.Identity(), Constant(2.0)),
        key(images[:4], nn.Identity(), Constant()),
    ]
    assert keys[0] == keys[1]
    assert len(set(keys[1:])) == 5
    # What neither names nor weights show.
    lambdas = [key(images, v2.Lambda(f), Constant()) for f in (lambda x: x, lambda x: x * 0.5)]
    assert lambdas[0] != lambdas[1]


def test_the_reference_follows_the_data(tmp_path: Path) -> None:
    """The same callback with other data looks for their own reference."""
    fid = FrechetDistance(DigitsFeatures(), cache_dir=str(tmp_path / "cache"))
    run(tmp_path, sampler(), fid)
    first = fid.scores
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64))
    fid.reference_features.source = tmp_path / "other.npz"
    run(tmp_path, sampler(), fid)
    assert fid.scores != first


@pytest.mark.parametrize(
    "monitor",
    [
        EarlyStopping("val/fid", mode="min"),
        ModelCheckpoint(monitor="val/fid_3_steps"),
        ModelCheckpoint(monitor="val/fid", every_n_epochs=3),
    ],
)
def test_nobody_waits_for_samples_in_epochs_without(monitor: Callback, tmp_path: Path) -> None:
    callbacks = [sampler(every_n_epochs=2), FrechetDistance(DigitsFeatures()), monitor]
    trainer = tiny.trainer(tmp_path, callbacks, max_epochs=1, limit_val_batches=1, enable_checkpointing=True)
    message = rf"PGDSampler.every_n_epochs=2 and {type(monitor).__name__}.monitor='val/fid.*' clash: .*"
    with pytest.raises(InputError, match=message + "Set trainer.check_val_every_n_epoch=2 instead"):
        trainer.fit(tiny.stage2(), datamodule=tiny.digits())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("monitor", "check"),
    [
        (EarlyStopping("val/fid", mode="min"), 4),
        (EarlyStopping("val/accuracy", mode="max"), 1),
        (ModelCheckpoint(monitor="val/fid", every_n_epochs=4), 1),
    ],
)
def test_who_waits_no_oftener_than_samples_come_is_no_mistake(monitor: Callback, check: int, tmp_path: Path) -> None:
    picky = sampler(every_n_epochs=2)
    trainer = tiny.trainer(tmp_path, [picky, FrechetDistance(DigitsFeatures()), monitor], enable_checkpointing=True)
    trainer.check_val_every_n_epoch = check
    picky.on_train_start(trainer, tiny.stage2())


class Bright(Collector):
    """A consumer of somebody else, which logs something of its own."""


class Declared(Bright):
    @property
    def logged_names(self) -> set[str]:
        return {"brightness"}


def plateau(monitor: str, frequency: int = 1) -> Any:
    """A module whose schedule waits for a figure."""
    module = tiny.stage1()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    config: Any = {"scheduler": schedule, "monitor": monitor, "frequency": frequency}
    module.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("picky", "consumer", "module", "callback", "message"),
    [
        ({"every_n_epochs": 2}, "fid", plateau("val/fid"), None, "ReduceLROnPlateau.monitor='val/fid' clash"),
        ({"every_n_epochs": 2}, "fid", plateau("val/fid", 3), None, "ReduceLROnPlateau.monitor='val/fid' clash"),
        (
            {"every_n_epochs": 2},
            "silent",
            None,
            EarlyStopping("val/network_evaluations_1_steps"),
            "EarlyStopping.monitor='val/network_evaluations_1_steps' clash",
        ),
        (
            {"every_n_epochs": 2},
            "silent",
            None,
            EarlyStopping("val/brightness"),
            "EarlyStopping.monitor='val/brightness' may clash, for Bright does not say what it logs",
        ),
        ({"every_n_epochs": 2}, "said", None, EarlyStopping("val/brightness"), "monitor='val/brightness' clash"),
        (
            {"stages": ["test"]},
            "fid",
            None,
            ModelCheckpoint(monitor="val/fid"),
            "ModelCheckpoint.monitor='val/fid' waits for samples, and none are drawn in validation",
        ),
    ],
)
def test_every_figure_of_samples_that_somebody_waits_for_is_known(
    picky: dict[str, Any], consumer: str, module: Any, callback: Callback | None, message: str, tmp_path: Path
) -> None:
    consumers = {"fid": FrechetDistance(DigitsFeatures()), "silent": Bright(), "said": Declared()}
    callbacks = [sampler(**picky), consumers[consumer], *([] if callback is None else [callback])]
    trainer = tiny.trainer(tmp_path, callbacks, limit_val_batches=1, enable_checkpointing=True)
    with pytest.raises(InputError, match=message):
        trainer.fit(module or tiny.stage1(), datamodule=tiny.digits())
    assert trainer.global_step == 0


def test_schedules_that_wait_as_long_and_figures_of_validation_itself_are_no_mistake(tmp_path: Path) -> None:
    """With a consumer that says what it logs; each run ends."""
    for module, callback in ((plateau("val/brightness", 2), None), (None, EarlyStopping("val/accuracy", mode="max"))):
        logging = Declared()
        logging.on_samples_end = lambda trainer, pl_module: pl_module.log("val/brightness", 1.0)  # type: ignore[method-assign]
        callbacks = [sampler(every_n_epochs=2), logging, *([] if callback is None else [callback])]
        trainer = tiny.trainer(
            tmp_path, callbacks, max_epochs=3, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=1
        )
        trainer.fit(module or tiny.stage1(), datamodule=tiny.digits())
        assert trainer.current_epoch == 3


@dataclass(frozen=True)
class Own(UpdateRule):
    """A rule of somebody else."""

    factor: float = 0.5

    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        return self.factor * step.gradient(step.x), state


class Plain(UpdateRule):
    """No dataclass: two of them are never equal, and their text has an address."""

    def move(self, step: Step, state: State) -> tuple[Tensor, State]:
        return step.gradient(step.x), state


class Hiding(Own):
    """Its factor is not that of the field."""


@dataclass(frozen=True)
class Holding(Own):
    network: nn.Module | None = None


def test_rules_are_told_apart_by_class_and_fields() -> None:
    plans = [SamplingPlan("test", 25, 10, (1,), 0.5, rule, {1: 2}) for rule in (Own(), Own(0.5), Own(0.2), Steepest())]
    keys = [canonical(plan.settings) for plan in plans]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert plans[0].settings["rule"] == {"class": f"{__name__}.Own", "factor": 0.5}
    # Of another file, with the same name and fields.
    namesake = type("Own", (Own,), {"__module__": "elsewhere", "__dataclass_fields__": Own.__dataclass_fields__})
    assert canonical(sampler(rule=namesake()).settings()) != canonical(sampler(rule=Own()).settings())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Plain(), "rule must be a frozen dataclass, by whose fields samples are told apart, got .*Plain"),
        (Hiding(), "rule must be a frozen dataclass"),
        (
            Holding(network=nn.Identity()),
            r"the fields of rule=Holding\(.*\) must be numbers, strings or the like: .* got Identity",
        ),
    ],
)
def test_rules_that_cannot_be_told_apart_are_refused(rule: UpdateRule, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampler(rule=rule)


def test_validation_and_test_have_one_fid_and_one_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fid = FrechetDistance(DigitsFeatures(), cache_dir=str(cache))
    run(tmp_path, sampler(), fid)
    (file,) = cache.iterdir()
    metrics = SampleMetrics(DigitsFeatures(), ["fid", "prc"], cache_dir=str(cache))
    validated = FrechetDistance(DigitsFeatures(), cache_dir=str(cache))
    trainer = tiny.trainer(tmp_path, [sampler(), validated], limit_val_batches=1)
    trainer.validate(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    run(tmp_path, sampler(), metrics)
    assert list(cache.iterdir()) == [file]
    with np.load(file) as arrays:
        assert set(arrays) == {"count", "mu", "sigma", "features"}
    sweep = metrics.figures[0]
    assert dict(zip(sweep.details["sweep_steps"], sweep.details["sweep"], strict=True)) == fid.scores
    assert validated.scores == fid.scores
    assert canonical(fid.figures[0].settings) == canonical(sweep.settings) == canonical(validated.figures[0].settings)


@pytest.mark.parametrize("make", [FrechetDistance, SampleMetrics])
def test_without_reference_nothing_begins(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DigitsDataModule, "reference_data", None)
    trainer, module = tiny.trainer(tmp_path, [make(DigitsLayers()), sampler()], max_epochs=1), tiny.stage2()
    with pytest.raises(InputError, match=f"{make.__name__} needs reference images: name a folder or .npz as reference"):
        trainer.fit(module, datamodule=tiny.digits())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("mu", (3,), np.nan), ("sigma", (0, 5), np.nan), ("sigma", (5, 0), np.nan), ("sigma", (2, 2), np.inf)],
)
@pytest.mark.parametrize("make", [FrechetDistance, SampleMetrics])
def test_statistics_that_are_no_numbers_are_refused(
    name: str, place: Any, value: float, make: Any, tmp_path: Path
) -> None:
    arrays = {"mu": np.zeros(64), "sigma": np.eye(64)}
    arrays[name][place] = value
    np.savez(tmp_path / "damaged.npz", **arrays)  # type: ignore[arg-type]
    more = {"metrics": ["fid"]} if make is SampleMetrics else {}
    metric = make(DigitsLayers(), reference=str(tmp_path / "damaged.npz"), **more)
    with pytest.raises(InputError, match=rf"damaged\.npz: {name} must be finite, got NaN or infinity in 1 of"):
        run(tmp_path, sampler(), metric)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(3), np.diag([1.0, -0.5, 2.0]), r"sigma\[1, 1\] is a variance, got -0.5"),
        (np.array([0, 1j, 0]), np.eye(3), "mu must be real numbers, got complex128"),
        (np.zeros(3), np.eye(3).astype(np.complex64), "sigma must be real numbers, got complex64"),
        (np.array([0, -1e200, 0]), np.eye(3), r"mu must be statistics of features, got a number of size 1e\+200"),
        (np.zeros(3), np.eye(3) * 1e100, r"sigma must be statistics of features, got a number of size 1e\+100"),
    ],
)
def test_statistics_that_nothing_has_are_refused_by_file_and_entry(
    mu: Any, sigma: Any, message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "odd.npz", mu=mu, sigma=sigma)
    with pytest.raises(InputError, match=rf"odd\.npz: {message}"):
        read_statistics(tmp_path / "odd.npz")


def test_a_variance_that_rounding_left_below_zero_is_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "rounded.npz", mu=np.zeros(2), sigma=np.diag([4.0, -1e-9]))
    assert read_statistics(tmp_path / "rounded.npz").covariance.diagonal().tolist() == [4.0, -1e-9]


def test_statistics_files(tmp_path: Path) -> None:
    gaussian = Gaussian(torch.arange(3.0).double(), torch.eye(3).double(), 10)
    np.savez(tmp_path / "a.npz", mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy())
    read = read_statistics(tmp_path / "a.npz")
    assert torch.equal(read.mean, gaussian.mean)
    assert torch.equal(read.covariance, gaussian.covariance)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.npz is not a readable \.npz"):
        read_statistics(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match=r"no folder or \.npz at"):
        FrechetDistance(Constant(), reference=str(tmp_path / "nowhere.npz"))
    np.savez(tmp_path / "other.npz", mean=np.zeros(2))
    with pytest.raises(ValueError, match=r"other\.npz has no entry .*; expected mu and sigma"):
        read_statistics(tmp_path / "other.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(2), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"mu \(2,\) and sigma \(3, 3\)"):
        read_statistics(tmp_path / "odd.npz")
    np.savez(tmp_path / "skew.npz", mu=np.zeros(2), sigma=np.array([[1, 0.5], [0, 1]]))
    with pytest.raises(ValueError, match=r"skew\.npz: sigma must be symmetric"):
        read_statistics(tmp_path / "skew.npz")


# Files and pictures.


def test_written_samples_are_the_generated_ones(tmp_path: Path) -> None:
    collector, writer = Collector(), SampleWriter(str(tmp_path / "out"), num_steps=3, stages=["test"])
    run(tmp_path, collector, sampler(), writer)
    pixels = (collector.images(3) * 255).round().to(torch.uint8)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert set(file) == {"arr_0", "arr_1"}
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (25, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 10 for i in range(25)]
    assert np.array_equal(images, pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
    png = read_image(tmp_path / "out" / "png" / "0004" / "000014.png")
    assert torch.equal(png, pixels[14].expand(3, -1, -1))
    assert len(list((tmp_path / "out" / "png").rglob("*.png"))) == 25
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["png", "samples.npz"]


def test_a_second_set_replaces_the_first(tmp_path: Path) -> None:
    for count in (25, 12):
        writer = SampleWriter(str(tmp_path / "out"), stages=["test"])
        run(tmp_path, sampler(num_samples=count), writer)
    assert len(list((tmp_path / "out" / "png").rglob("*.png"))) == 12
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert len(file["arr_0"]) == 12


def test_other_files_stay(tmp_path: Path) -> None:
    mine = tmp_path / "out" / "png" / "thesis.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    (tmp_path / "out" / "samples.npz").write_bytes(b"of another model")
    run(tmp_path, sampler(), SampleWriter(str(tmp_path / "out"), formats=["png"], stages=["test"]))
    assert mine.read_bytes() == b"mine"
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_files_are_written_while_the_next_batch_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch's files wait for the second batch: writing in turn would wait for ever."""
    generated = threading.Event()
    generate, save = PGDSampler.generate, Image.Image.save

    def noting(self: PGDSampler, logits: Logits, seeds: Tensor, indices: Tensor, num_classes: int) -> SampleBatch:
        if int(indices[0]) > 0:
            generated.set()
        return generate(self, logits, seeds, indices, num_classes)

    def waiting(self: Image.Image, path: Path) -> None:
        assert generated.wait(60), "the second batch is not generated before the first is written"
        save(self, path)

    monkeypatch.setattr(PGDSampler, "generate", noting)
    monkeypatch.setattr(Image.Image, "save", waiting)
    run(tmp_path, sampler(batch_size=10), SampleWriter(str(tmp_path / "out"), stages=["test"]))
    assert len(list((tmp_path / "out" / "png").rglob("*.png"))) == 25


@pytest.mark.parametrize("first", [0, 20])
def test_a_file_that_cannot_be_written_stops_the_run(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(self: Image.Image, path: Path) -> None:
        if int(path.stem) >= first:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(self, path)

    monkeypatch.setattr(Image.Image, "save", full)
    writer = SampleWriter(str(tmp_path / "out"), stages=["test"])
    with pytest.raises(OSError, match=r"No space left on device.*png"):
        run(tmp_path, sampler(batch_size=10), writer)
    assert writer._threads is None
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_a_writer_takes_only_snapshots_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_steps=2 is not among the sampler's snapshots \[1, 3\]"):
        run(tmp_path, sampler(), SampleWriter(str(tmp_path), num_steps=2, stages=["test"]))
    with pytest.raises(ValueError, match="formats must be 'png', 'npz' or both"):
        SampleWriter(formats=["jpg"])  # type: ignore[list-item]


def test_grids_have_a_column_per_class(tmp_path: Path) -> None:
    collector, grid = Collector(), SampleGrid(num_rows=2, dirpath=str(tmp_path / "grids"))
    logger = TensorBoardLogger(tmp_path / "logs", name=None, version="")
    run(tmp_path, collector, sampler(), grid, logger=logger)
    picture = read_image(tmp_path / "grids" / "test_step0000000_3_steps.png")
    assert picture.shape == (3, 2 * 17 + 1, 10 * 17 + 1)
    pixels = (collector.images(3) * 255).round().to(torch.uint8)
    for index in (0, 7, 13):
        row, column = divmod(index, 10)
        tile = picture[:, row * 17 + 1 : row * 17 + 17, column * 17 + 1 : column * 17 + 17]
        assert torch.equal(tile[0], pixels[index, 0])
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(events.Tags()["images"]) == {"test/samples/1_steps", "test/samples/3_steps"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ranks_with_and_without_tiles_reduce_one_type(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most grids are of the first batch, which rank 0 has: the others know its shape, and not its precision."""
    grid, trainer = SampleGrid(num_rows=2, dirpath=str(tmp_path)), tiny.trainer(tmp_path)
    types = []

    def reduce(tiles: Tensor, reduce_op: str) -> Tensor:
        types.append(tiles.dtype)
        return tiles

    monkeypatch.setattr(trainer.strategy, "reduce", reduce)
    run(tmp_path, collector := Collector(), sampler())
    plan, batch = collector.plans[0], collector.batches[0]
    batch = replace(batch, images={steps: x.to(dtype) for steps, x in batch.images.items()})
    module = tiny.stage1()
    for received in ([batch], []):
        monkeypatch.setattr(trainer.strategy, "broadcast", lambda mine: [2, 10, 1, 16, 16])
        grid.plan = plan
        for part in received:
            grid.on_samples_batch(trainer, module, part)
        grid.on_samples_end(trainer, module)
    assert len(types) == 2 * len(plan.num_steps)
    assert set(types) == {torch.float32}


def test_shipped_features_are_deterministic() -> None:
    weights = load_file(DigitsFeatures.WEIGHTS)
    extractor = DigitsFeatures()
    assert all(torch.equal(weights[name], value) for name, value in extractor.network.state_dict().items())
    assert not any(p.requires_grad for p in extractor.parameters())
