import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dat_lightning.core import AUCCurriculum, ascend, targeted_logit, unbounded_ascent
from dat_lightning.speed import Execution
from dat_lightning.weights import EnergyModel

from .bench import DisagreementError, check_results, main
from .cases import MEAN, STD, PackageDAT, calibrated_backbone, compare, largest_difference, random_batch
from .contenders import SIZES, STAGES, VARIANTS, Call, Size, Task, Workload
from .plain_dat import AttackGradient, PlainClassifier, PlainDAT, generate
from .timing import Timing, summarise, table, take_turns

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Images this small gain nothing from more, and on a busy machine threads that wait for each other lose much.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def backbone() -> nn.Module:
    # Smooth, since at a kink rounding errors would lead to other attacks.
    return calibrated_backbone(10, 1, 16, "silu")


def plain_dat(gradient: AttackGradient = "input") -> PlainDAT:
    model = PlainClassifier(backbone(), MEAN, STD)
    return PlainDAT(model, initial_steps=2, max_steps=2, attack_steps=2, gradient=gradient)


@pytest.mark.parametrize(("merge_forwards", "memory_format"), [(True, "channels_last"), (False, "contiguous")])
def test_three_steps_agree_with_the_plain_implementation(
    merge_forwards: bool, memory_format: Literal["contiguous", "channels_last"]
) -> None:
    plain = plain_dat()
    package = PackageDAT(backbone(), 2, 2, merge_forwards=merge_forwards, execution=Execution(memory_format))
    start = copy.deepcopy(plain.model)
    for seed in range(3):
        batch = random_batch(8, 16, seed)
        expected, found = plain.step(batch), package.step(batch)
        torch.testing.assert_close(found.auc, expected.auc, rtol=0, atol=TOLERANCE, check_dtype=False)
        assert compare(plain, package, expected, found).largest() <= TOLERANCE
    assert largest_difference(start, plain.model) > 100 * TOLERANCE, "three steps moved nothing: agreement is empty"
    assert largest_difference(plain.average, plain.model) > 10 * TOLERANCE, "the average is the model itself"


def test_a_step_is_deterministic() -> None:
    batch = random_batch(8, 16, seed=0)
    one, other = PackageDAT(backbone(), 2, 2), PackageDAT(backbone(), 2, 2)
    assert one.step(batch) == other.step(batch)
    assert largest_difference(one.module, other.module) == 0


def test_gradients_of_parameters_change_nothing_in_the_plain_attacks() -> None:
    batch = random_batch(8, 16, seed=0)
    one, other = plain_dat("input"), plain_dat("all")
    one.step(batch)
    other.step(batch)
    assert largest_difference(one.model, other.model) <= 1e-7


def test_generation_agrees_with_the_plain_implementation() -> None:
    x, y = random_batch(8, 16, seed=0)["x_ood"], torch.arange(8)
    expected = generate(PlainClassifier(backbone(), MEAN, STD).eval(), x, y, step_size=0.2, num_steps=5)
    found = ascend(EnergyModel(backbone(), MEAN, STD), x, y, targeted_logit, unbounded_ascent(0.2, 5))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (found - x).flatten(1).norm(dim=1).min() > 0.1


def test_the_curriculum_of_the_plain_implementation_moves_as_the_package_s() -> None:
    plain = PlainDAT(PlainClassifier(backbone(), MEAN, STD), max_steps=2, attack_steps=0, auc_threshold=0.5)
    curriculum = PackageDAT(backbone(), 2, 0).module.curriculum
    assert isinstance(curriculum, AUCCurriculum)
    curriculum.num_steps.fill_(0)
    curriculum.auc_threshold = 0.5
    seen = []
    for value in torch.rand(40, generator=torch.Generator().manual_seed(0)).double() * 0.4 + 0.35:
        plain.update_curriculum(value, 300)
        curriculum.update(value, 300)
        assert plain.contrastive_steps == int(curriculum.num_steps)
        seen.append(plain.contrastive_steps)
    assert set(seen) == {0, 1, 2}


def test_stage_1_agrees_with_the_plain_implementation() -> None:
    plain, package = (
        plain_dat(),
        PackageDAT(backbone(), 0, 2, stage="stage1", execution=Execution(fold_batch_norm=True)),
    )
    start = copy.deepcopy(plain.model)
    for seed in range(3):
        batch = random_batch(8, 16, seed)
        assert compare(plain, package, plain.stage1_step(batch), package.step(batch)).largest() <= TOLERANCE
    assert largest_difference(start, plain.model) > 100 * TOLERANCE


@pytest.mark.slow
def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["--nets", "wrn_10_1", "--rounds", "2", "--threads", "1", "--json", str(out)]) == 0
    assert "median of ratios" in capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    for task in ("stage1", "stage2", "generation"):
        assert {len(timing["wall"]) for timing in result[task]["seconds"].values()} == {2}
        assert {"plain", "eager"} <= result[task]["summary"].keys()
    assert result["sweep"]["ratio"] > 0
    assert result["joint chain"]["ratio"] == pytest.approx(result["joint chain"]["one"] / result["joint chain"]["two"])


def test_a_contender_that_lacks_memory_is_left_out() -> None:
    """When it is made, when it first computes, or later."""
    calls: list[int] = []

    def fails(number: int) -> Callable[[], Call]:
        def call(_: int) -> torch.Tensor:
            calls.append(number)
            if calls.count(number) == number:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.zeros(1)

        return lambda: call

    def no_room() -> Call:
        raise torch.OutOfMemoryError("CUDA out of memory")

    timings = take_turns({"a": no_room, "b": fails(1), "c": fails(4), "plain": fails(100)}, 3)
    assert timings.keys() == {"plain"}
    assert len(timings["plain"].wall) == 3
    assert calls.count(4) == 4
    assert summarise(timings, 8, 1e9, {"plain": 1e9}).keys() == {"plain"}
    assert table("nothing", {}).startswith("nothing")


@pytest.mark.parametrize("task", ["stage1", "stage2", "generation"])
def test_a_contender_that_computes_something_else_is_found(task: Task) -> None:
    workload = Workload("wrn_10_1", SIZES["cpu"]["wrn_10_1"])
    one, other = workload.backbone(), workload.backbone()
    with torch.no_grad():
        other.get_parameter("fc.weight").mul_(-1)
    make = {"plain": one, "eager": one, "eager, bf16": one}
    timings = take_turns({name: partial(workload.call, task, VARIANTS[name], net) for name, net in make.items()}, 1)
    found = check_results(task, timings)
    assert found["eager"] < 1e-4 < found["eager, bf16"]
    timings["eager"] = take_turns({"eager": partial(workload.call, task, VARIANTS["eager"], other)}, 1)["eager"]
    with pytest.raises(DisagreementError, match=f"{task}: eager differs from plain"):
        check_results(task, timings)


@pytest.mark.slow
def test_a_benchmark_of_implementations_that_disagree_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainDAT, "update_average", lambda self: None)
    assert main(["--nets", "wrn_10_1", "--rounds", "2", "--threads", "1"]) == 1
    assert "The implementations disagree" in capsys.readouterr().out


class FlopCounter(TorchDispatchMode):
    """Adds up torch's own counts; its FlopCounterMode also follows modules, which fails on input gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def test_the_work_of_a_task_is_counted_as_the_passes_that_it_makes() -> None:
    """Against the operations that a step really has, counted by torch: almost all are in convolutions."""
    workload = Workload("wrn_10_1", Size(16, 4, 3, 2, 5))
    network = workload.backbone()
    per_image = workload.flops(network)
    for task in STAGES:
        package = workload.package(network, task)
        with FlopCounter() as counter:
            package.step(random_batch(4, 16, seed=0))
        expected = 4 * per_image * workload.size.forwards(task)
        # The first layer needs no gradient of the image in a training pass.
        assert counter.total == pytest.approx(expected, rel=0.03)
    with FlopCounter() as counter:
        workload.generation(VARIANTS["eager"], network)()
    assert counter.total == pytest.approx(4 * per_image * workload.size.forwards("generation"), rel=0.01)


def test_the_rate_of_utilisation_is_that_of_a_matrix_product() -> None:
    timing = Timing(wall=[0.5, 0.4, 0.6], cpu=[1.0, 1.0, 1.0])
    plain = Timing(wall=[1.0, 1.0, 1.2], cpu=[2.0, 2.0, 2.0])
    rows = summarise({"plain": plain, "eager": timing}, batch=8, flops=1e9, rates={"plain": 4e9, "eager": 4e9})
    assert rows["eager"]["utilisation %"] == pytest.approx(50)
    assert rows["eager"]["x plain"] == pytest.approx(2)
    assert rows["eager"]["images/s"] == pytest.approx(16)
    assert rows["eager"]["x plain (cpu time)"] == pytest.approx(2)
