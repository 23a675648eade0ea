"""Options that make ascents faster: batch norm folded away, a precision of their own, compiled graphs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from dat_lightning import (
    AUCCurriculum,
    DualAdversarialModule,
    EnergyModel,
    ExponentialMovingAverage,
    PGDSampler,
    RobustClassifierModule,
    SampleBatch,
    SampleConsumer,
    TradesModule,
)
from dat_lightning.core import batch_norm_layers
from dat_lightning.modules import EnergyModule
from dat_lightning.speed import CompileMode, Execution, FoldedNetwork
from tests import tiny
from tests.replayed import Compiler


class Collector(SampleConsumer):
    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        self.images.append(batch.images[4])


def network() -> EnergyModel:
    """A network whose batch norm has seen data."""
    model = tiny.energy_model()
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(1)))
    return model


def trained(path: Path, module: EnergyModule) -> tuple[dict[str, Tensor], dict[str, float], Any]:
    """Weights, figures and samples after six steps in float64 and an evaluation with averaged weights."""
    collector = Collector()
    callbacks = [ExponentialMovingAverage(decay=0.5), collector, PGDSampler(8, [4], 0.5, 5, stages=["test"])]
    trainer = tiny.trainer(path, callbacks, precision="64-true")
    data = tiny.digits(batch_size=16, eval_batch_size=100)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return module.state_dict(), figures, torch.cat(collector.images)


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-8, atol=1e-10)
    assert found[1] == pytest.approx(expected[1], rel=1e-8)
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=1e-8)


def build(kind: str, **kwargs: Any) -> EnergyModule:
    common: dict[str, Any] = {"energy_model": network(), "optimizer": tiny.SGD, "threat_model": tiny.ATTACK, **kwargs}
    if kind == "stage2":
        module = tiny.stage2(**common)
        if "curriculum" not in kwargs:
            module.curriculum.num_steps.fill_(3)
        return module
    return TradesModule(**common) if kind == "trades" else RobustClassifierModule(**common)


@pytest.mark.parametrize("kind", ["stage1", "trades", "stage2"])
def test_folding_changes_nothing_but_the_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    forward = FoldedNetwork.forward

    def counting(self: FoldedNetwork, x: Tensor) -> Tensor:
        passes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(FoldedNetwork, "forward", counting)
    expected = trained(tmp_path, build(kind))
    assert not passes
    found = trained(tmp_path, build(kind, execution=Execution(fold_batch_norm=True)))
    # Attacks of six steps of training, the evaluation's attacks on 360 digits, four steps of sampling.
    in_training = 6 * 16 * (2 + (3 if kind == "stage2" else 0))
    assert sum(passes) == in_training + 2 * 360 + 4 * 8
    assert_same(found, expected)


def test_an_attack_in_train_mode_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("stage1", execution=Execution(fold_batch_norm=True), attack_mode="train")
    assert isinstance(module.ascent_network(), FoldedNetwork)
    monkeypatch.setattr(FoldedNetwork, "forward", None)
    x = torch.rand(2, 1, 16, 16)
    assert not torch.equal(module.adversarial_examples(x, torch.tensor([0, 1])), x)
    assert len(batch_norm_layers(module)) == 5


def test_a_network_without_batch_norm_cannot_be_folded(tmp_path: Path) -> None:
    model = EnergyModel(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)))
    module = build("stage1", energy_model=model, execution=Execution(fold_batch_norm=True))
    with pytest.raises(ValueError, match="EnergyModel has no batch norm to fold: set fold_batch_norm to false"):
        tiny.trainer(tmp_path).fit(module, tiny.digits())


@pytest.mark.parametrize("kind", ["stage1", "trades", "stage2"])
def test_attacks_have_a_precision_of_their_own(kind: str, tmp_path: Path) -> None:
    """Attacks in bfloat16, the training pass in float32."""
    seen: set[tuple[bool, torch.dtype]] = set()

    def note(layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        # Parameters need no gradient inside an attack.
        seen.add((next(layer.parameters()).requires_grad, result.dtype))

    module = build(kind, execution=Execution(attack_precision="bfloat16"))
    stem = module.energy_model.backbone.get_submodule("stem")
    stem.register_forward_hook(note)
    tiny.trainer(tmp_path).fit(module, tiny.digits())
    assert (False, torch.bfloat16) in seen
    assert {dtype for trains, dtype in seen if trains} == {torch.float32}
    assert next(stem.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("mode", "fold"),
    [
        (True, True),
        pytest.param("reduce-overhead", True, marks=pytest.mark.slow),
        pytest.param("reduce-overhead", False, marks=pytest.mark.slow),
    ],
)
def test_a_run_compiles_a_graph_for_each_size_and_stays_the_same(
    mode: CompileMode, fold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T grows in every second step; 8 samples are a whole batch of 5 and a rest."""
    curriculum = {"curriculum": AUCCurriculum(max_steps=3, auc_threshold=0.0, window_samples=32)}
    expected = trained(
        tmp_path, build("stage2", execution=Execution(fold_batch_norm=fold), **copy.deepcopy(curriculum))
    )
    with Compiler().installed(monkeypatch) as compiler:
        module = build("stage2", execution=Execution(compile=mode, fold_batch_norm=fold), **curriculum)
        assert isinstance(module, DualAdversarialModule)
        found = trained(tmp_path, module)
    assert int(module.curriculum.num_steps) == 3
    assert_same(found, expected)
    ascents = mode if isinstance(mode, str) else None
    # The 360 digits of the evaluation come as four batches.
    assert compiler.graphs == [
        (ascents, (16, 1, 16, 16), True),  # attack and contrastive chain, of any T
        (None, (48, 1, 16, 16), True),  # the pass for the loss
        (None, (90, 1, 16, 16), False),
        (ascents, (90, 1, 16, 16), True),  # the evaluation's attack
        (ascents, (5, 1, 16, 16), True),  # samples
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stage1", "trades"])
def test_stage_1_can_replay_graphs_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an attack in train mode, where batch norm sees the batch."""
    options: dict[str, Any] = {"attack_mode": "train"}
    expected = trained(tmp_path, build(kind, **options))
    with Compiler().installed(monkeypatch) as compiler:
        found = trained(tmp_path, build(kind, execution=Execution(compile="reduce-overhead"), **options))
    assert_same(found, expected)
    assert (None, (16, 1, 16, 16), True) in compiler.graphs
    assert len(compiler.graphs) <= 8  # torch's limit of graphs for one piece of code


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_run(tmp_path: Path) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    expected = trained(tmp_path, build("stage2"))
    found = trained(tmp_path, build("stage2", execution=Execution(compile=True, fold_batch_norm=True)))
    assert_same(found, expected)
    assert graphs["unique_graphs"] - before == 5
