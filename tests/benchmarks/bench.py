"""Times both stages and generation against the plain implementation: ``python -m tests.benchmarks.bench``.

All contenders of a task start from the same weights and see the same batches. Before anything is timed, the first steps
of the plain implementation and of the package are compared. Then contenders take turns. Compiling happens in the first
call, which is reported by itself. Sizes fit the device that is found; on a CPU, networks beyond the first are timed
without the compiled variants unless ``--variants`` names them, since compiling would take longer than all the rest.

Utilisation is the time that a task's floating-point operations would take at the dense rate of the device in the same
precision, that of a large matrix product or of a wide convolution, over the time that they took: an ascent step counts
two forward passes, a training pass three.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch
from torch import Tensor, nn

from dat_lightning import __version__
from dat_lightning.core import Ascent, ascend, targeted_logit, unbounded_ascent

from .cases import Agreement, compare, random_batch
from .contenders import (
    GENERATION_STEP_SIZE,
    SIZES,
    STAGES,
    TASKS,
    VARIANTS,
    Call,
    Size,
    Task,
    Workload,
    sampling_network,
)
from .timing import Timing, convolution_rate, matmul_rate, summarise, table, take_turns

Save = Callable[[], None]

TOLERANCE = 1e-5
# A quarter of an 8-bit level: a chain has no end to pull rounding errors back, so they grow along it.
IMAGE_TOLERANCE = 1e-3
# What is allowed of the relative difference between results at full size, on a CPU. Found were 2e-5 in float32 (2e-3
# with ReLU) and 0.01 in bfloat16, in generation 0.06 (0.35 with ReLU). A Stage-1 step with half of the attack's steps
# differs by 0.04, a Stage-2 step with three quarters of both chains by 0.1, half a chain of generation by 0.55.
_FLOAT32 = 0.01
_BFLOAT16: dict[Task, float] = {"stage1": 0.025, "stage2": 0.05, "generation": 0.5}
# On a GPU chains are longer and float32 is TF32, and nobody has measured yet: there only another network is an error,
# for which the difference is 1 and more, and the column shows the rest.
_ON_A_GPU = 0.8
_SWEEP = (-3, -2, -1, 0, 1, 2, 3)


class DisagreementError(Exception):
    """The implementations differ, so their times would mean nothing."""


@dataclass(frozen=True)
class Plan:
    """What to time.

    Attributes:
        workloads: Networks and sizes.
        tasks: What they do.
        variants: Names of the ways; ``None`` for those that suit the device and the network.
        rounds: Calls of each contender.
    """

    workloads: tuple[Workload, ...]
    tasks: tuple[Task, ...]
    variants: tuple[str, ...] | None
    rounds: int

    def variants_of(self, workload: Workload) -> list[str]:
        """Returns the names of the ways in which a network is timed."""
        if self.variants is not None:
            return list(self.variants)
        if workload.device != "cpu":
            return list(VARIANTS)
        # A CPU has no CUDA graphs.
        return [n for n in VARIANTS if "graphs" not in n and (workload.net == "wrn_16_2" or not VARIANTS[n].compile)]


def agreement(workload: Workload) -> dict[str, Agreement]:
    """Returns how the package's first steps differ from the plain ones.

    In float64, and for smooth activations in float32 too. In float32 sums run in another order, and a kinked activation
    turns rounding into another attack.

    Raises:
        DisagreementError: If a difference is above :data:`TOLERANCE`.
    """
    tiny = workload.tiny()
    backbone = tiny.backbone()
    batch = random_batch(tiny.size.batch, tiny.size.image, seed=0)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    smooth = workload.net.startswith("wrn") and workload.activation == "silu"
    cases: list[tuple[str, torch.dtype, dict[str, Tensor]]] = [("float64", torch.float64, wide)]
    if smooth:
        cases.append(("float32", torch.float32, batch))
    found: dict[str, Agreement] = {}
    for label, dtype, images in cases:
        for task in STAGES:
            plain = tiny.plain(backbone, dtype)
            package = tiny.package(backbone, task, dtype=dtype)
            expected = plain.stage1_step(images) if task == "stage1" else plain.step(images)
            name = f"{task}, {label}"
            found[name] = compare(plain, package, expected, package.step(images))
            if not found[name].largest() <= TOLERANCE:
                raise DisagreementError(f"{workload.net}: {name}: {found[name]}, allowed {TOLERANCE:g}")
    if smooth:
        check_images(tiny, backbone)
    return found


def check_images(workload: Workload, backbone: nn.Module) -> None:
    """Raises an error if plain and package generate other images."""
    images = [workload.generation(VARIANTS[name], backbone)() for name in ("plain", "eager")]
    difference = (images[0] - images[1]).abs().max().item()
    if not difference <= IMAGE_TOLERANCE:
        raise DisagreementError(f"generated images differ by {difference:.1e}, allowed {IMAGE_TOLERANCE:g}")


def check_results(task: Task, timings: Mapping[str, Timing], device: str = "cpu") -> dict[str, float]:
    """Returns how the contenders' first results, on the device and in their ways, differ from the plain one.

    Empty where there is nothing to compare with, because the plain implementation lacks memory.

    Raises:
        DisagreementError: If a difference is larger than rounding makes it.
    """
    if "plain" not in timings:
        return {}
    expected = _result(timings["plain"])
    found = {name: float((_result(t) - expected).norm() / expected.norm()) for name, t in timings.items()}
    for name, difference in found.items():
        allowed = _BFLOAT16[task] if VARIANTS[name].bfloat16 else _FLOAT32
        if device != "cpu":
            allowed = _ON_A_GPU
        if not difference <= allowed:
            raise DisagreementError(f"{task}: {name} differs from plain by {difference:.2g}, allowed {allowed:g}")
    return found


def _result(timing: Timing) -> Tensor:
    if timing.result is None:
        raise ValueError("a contender that was timed has a result")
    return timing.result.float()


def time_sweep(workload: Workload, backbone: nn.Module, rounds: int) -> dict[str, float] | None:
    """Returns the medians of a chain that keeps its end, and of one that keeps seven states; and the ratio."""
    size = workload.size
    x, y = workload.batches()[0]["x_ood"], torch.arange(size.batch, device=workload.device) % 10
    chain = unbounded_ascent(GENERATION_STEP_SIZE, max(size.generation, 7))
    network = sampling_network(backbone, workload.device)

    def walk(states: Sequence[int]) -> Call:
        return lambda _: Ascent(targeted_logit, chain).snapshots(network, x, y, states)[max(states)]

    seven = [chain.num_steps - 3 + k for k in _SWEEP]
    return _ratio({"one": walk([max(seven)]), "seven": walk(seven)}, rounds, workload.device)


def time_joint_chain(workload: Workload, backbone: nn.Module, rounds: int) -> dict[str, float] | None:
    """Returns the medians of two chains of B images, and of one chain of 2B; and the ratio.

    It is the most that both ascents of Stage 2 could gain in the steps that they have in common.
    """
    x, y = workload.batches()[0]["x_ood"], torch.arange(workload.size.batch, device=workload.device) % 10
    chain = unbounded_ascent(GENERATION_STEP_SIZE, min(workload.size.attack, workload.size.contrastive))
    network = sampling_network(backbone, workload.device)

    def walk(images: Tensor, labels: Tensor) -> Tensor:
        return ascend(network, images, labels, targeted_logit, chain)

    both = torch.cat([x, x]), torch.cat([y, y])
    contenders: dict[str, Call] = {
        "two": lambda _: torch.cat([walk(x, y), walk(x, y)]),
        "one": lambda _: walk(*both),
    }
    return _ratio(contenders, rounds, workload.device)


def _ratio(contenders: dict[str, Call], rounds: int, device: str) -> dict[str, float] | None:
    """The medians of two contenders, and the second one's over the first one's; nothing without memory for both."""
    timings = take_turns({name: partial(_itself, call) for name, call in contenders.items()}, max(rounds, 5), device)
    if timings.keys() != contenders.keys():
        return None
    medians = {name: statistics.median(timings[name].wall) for name in contenders}
    first, second = medians.values()
    return {**medians, "ratio": second / first}


def _itself(call: Call) -> Call:
    return call


def compiled_graphs() -> int:
    """Returns how many graphs ``torch.compile`` has made in this process."""
    import torch._dynamo.utils  # a slow import

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def machine(device: str) -> dict[str, str | int]:
    """Returns the device, the number of threads and the versions."""
    name = f"cpu, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": name if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "dat_lightning": __version__,
    }


def rates(device: str) -> dict[str, float]:
    """Returns the dense rate by precision: that of a large matrix product or of a wide convolution, if it is higher."""
    size, channels = (2048, 256) if device == "cpu" else (8192, 1024)
    return {
        str(dtype): max(matmul_rate(device, dtype, size), convolution_rate(device, dtype, channels))
        for dtype in (torch.float32, torch.bfloat16)
    }


def run(workload: Workload, plan: Plan, rate: dict[str, float], result: dict[str, Any], save: Save) -> None:
    """Times a network, tells the tables, and puts figures into ``result``, which is saved after each task."""
    tell = sys.stdout.write
    differences = agreement(workload)
    tell(f"\n{workload}\n  first steps differ from the plain ones by\n")
    for name, difference in differences.items():
        tell(f"    {name:28}" + ", ".join(f"{key} {value:.1e}" for key, value in asdict(difference).items()) + "\n")
    backbone = workload.backbone()
    flops = workload.flops(backbone)
    backbone.to(workload.device)
    result["workload"] = asdict(workload)
    result["flops of a forward pass"] = flops
    result["agreement"] = {name: asdict(difference) for name, difference in differences.items()}
    names = plan.variants_of(workload)
    by_variant = {n: rate[str(torch.bfloat16 if VARIANTS[n].bfloat16 else torch.float32)] for n in names}
    for task in plan.tasks:
        contenders = {name: partial(workload.call, task, VARIANTS[name], backbone) for name in names}
        timings = take_turns(contenders, plan.rounds, workload.device)
        apart = check_results(task, timings, workload.device)
        for name in contenders.keys() - timings.keys():
            tell(f"  {workload.net}, {task}, {name}: out of memory\n")
        work = float(flops) * workload.size.forwards(task) * workload.size.batch
        rows = summarise(timings, workload.size.batch, work, by_variant)
        for name, row in rows.items():
            row["differs by"] = apart.get(name, float("nan"))
        tell(table(f"{workload.net}, {task}", rows))
        for name, row in rows.items():
            if row["utilisation %"] > 100:
                tell(f"  {name}: utilisation above 100 %: the dense rate was measured while the device was busy\n")
        sys.stdout.flush()
        seconds = {name: {"first": t.first, "wall": t.wall, "cpu": t.cpu} for name, t in timings.items()}
        # JSON has no word for what a CPU cannot tell.
        told = {name: {k: None if math.isnan(v) else v for k, v in row.items()} for name, row in rows.items()}
        result[task] = {"summary": told, "seconds": seconds}
        save()
        if any(VARIANTS[name].compile for name in names):
            torch.compiler.reset()
    for key, task, time_it, words in (
        ("sweep", "generation", time_sweep, "seven step counts from one chain cost {ratio:.3f} of the longest alone"),
        ("joint chain", "stage2", time_joint_chain, "one chain of 2B images costs {ratio:.3f} of two of B"),
    ):
        if task in plan.tasks:
            found = result[key] = time_it(workload, backbone, plan.rounds)
            tell(f"  {'out of memory' if found is None else words.format(**found)}\n")
            save()


def memory_share(device: str) -> float:
    """Returns 1 for a GPU of 80 GB, for which sizes are made, or one half, one quarter … for smaller ones."""
    if device == "cpu":
        return 1.0
    share = torch.cuda.get_device_properties(device).total_memory / 70e9
    return min(1.0, 2.0 ** math.floor(math.log2(share)))


def parse(arguments: list[str] | None) -> tuple[Plan, int | None, Path | None]:
    """Returns the plan, the number of threads and the file for the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=sorted(SIZES), default=device)
    parser.add_argument("--nets", nargs="+", default=["wrn_16_2", "wrn_34_10", "resnet50", "convnext_l"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="by default those that suit the device")
    parser.add_argument("--rounds", type=int, help="by default 7 for small networks and on GPUs, 3 for others")
    parser.add_argument("--threads", type=int, help="of a CPU; by default torch's choice")
    parser.add_argument("--activation", choices=("relu", "silu"), default="silu", help="of WideResNets")
    parser.add_argument("--plain-gradient", choices=("input", "all"), default="input")
    for name in ("batch", "contrastive", "attack", "generation"):
        parser.add_argument(f"--{name}", type=int, help="another size than the device's")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    given = parser.parse_args(arguments)
    unknown = set(given.nets) - SIZES[given.device].keys()
    if unknown:
        parser.error(f"--nets: {sorted(unknown)} unknown; expected some of {sorted(SIZES[given.device])}")
    sizes = {k: v for k in ("batch", "contrastive", "attack", "generation") if (v := getattr(given, k)) is not None}

    def workload(net: str) -> Workload:
        size: Size = SIZES[given.device][net]
        size = replace(size, **{"batch": max(1, int(size.batch * memory_share(given.device))), **sizes})
        return Workload(net, size, given.activation, given.plain_gradient, given.device)

    small = given.device == "cuda" or set(given.nets) <= {"wrn_16_2", "wrn_10_1"}
    rounds = given.rounds if given.rounds is not None else 7 if small else 3
    variants = None if given.variants is None else tuple(given.variants)
    return Plan(tuple(map(workload, given.nets)), tuple(given.tasks), variants, rounds), given.threads, given.json


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if the implementations disagree."""
    plan, threads, out = parse(arguments)
    if threads is not None:
        torch.set_num_threads(threads)
    # The plain implementation may use TF32 as well: fp32 in the sense of published training code.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = plan.workloads[0].device
    where, rate = machine(device), rates(device)
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in where.items()))
    sys.stdout.write("".join(f"dense rate, {name}: {value / 1e12:.3g} TFLOP/s\n" for name, value in rate.items()))
    content: dict[str, Any] = {"where": where, "dense rate": rate, "rounds": plan.rounds, "results": []}

    def save() -> None:
        if out is not None:
            out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    # A folder of its own for what torch compiles, so that the first graph of each kind is not found on disk.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
        for workload in plan.workloads:
            content["results"].append({})
            try:
                run(workload, plan, rate, content["results"][-1], save)
            except DisagreementError as error:
                sys.stdout.write(f"{error}\nThe implementations disagree: their times would mean nothing.\n")
                return 1
    if any(VARIANTS[name].compile for workload in plan.workloads for name in plan.variants_of(workload)):
        sys.stdout.write(f"graphs compiled: {compiled_graphs()}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
