"""Times a Stage-2 step and a generation chain against the plain implementation: ``python -m tests.benchmarks.bench``.

All contenders start from the same weights and see the same batches. Before anything is timed, their first steps are
compared. Then they take turns, in an order that is reversed from round to round, so that whatever else the machine does
falls on all of them alike. Compiling happens in the first step, which is reported by itself.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning
import torch
from torch import Tensor, nn

from dat_lightning import __version__
from dat_lightning.core import EnergyModel, ascend, targeted_logit, unbounded_ascent

from .cases import MEAN, STD, Agreement, PackageDAT, calibrated_backbone, compare, random_batch
from .plain_dat import AttackGradient, PlainClassifier, PlainDAT, generate

TOLERANCE = 1e-5
# A quarter of an 8-bit level: a chain has no end to pull rounding errors back, so they grow along it.
IMAGE_TOLERANCE = 1e-3
_NUM_BATCHES = 4
_GENERATION_STEP_SIZE = 0.2

Result = TypeVar("Result")

Call = Callable[[int], object]
"""Does once what is timed; the argument is the number of the round."""


@dataclass(frozen=True)
class Setting:
    """What is timed, and how.

    Attributes:
        activation: A smooth one lets the attacks agree in float32, whatever the order of summation; "relu" does not.
        plain_gradient: Whether the plain attacks' backward passes compute what they need, or the parameters' gradients
            as well, as those of ``loss.backward()`` do.
    """

    depth: int = 16
    widen_factor: int = 2
    activation: Literal["relu", "silu"] = "silu"
    size: int = 32
    batch_size: int = 32
    contrastive_steps: int = 10
    attack_steps: int = 10
    generation_steps: int = 20
    plain_gradient: AttackGradient = "input"
    threads: int = 2
    rounds: int = 7
    compile: bool = True

    def backbone(self) -> nn.Module:
        """Returns the network with which all contenders start."""
        return calibrated_backbone(self.depth, self.widen_factor, self.size, self.activation)

    def plain(self, backbone: nn.Module, dtype: torch.dtype = torch.float32) -> PlainDAT:
        """Returns the plain contender."""
        return PlainDAT(
            PlainClassifier(copy.deepcopy(backbone), MEAN, STD).to(dtype),
            initial_steps=self.contrastive_steps,
            max_steps=self.contrastive_steps,
            attack_steps=self.attack_steps,
            gradient=self.plain_gradient,
        )

    def package(self, backbone: nn.Module, dtype: torch.dtype = torch.float32, **arguments: Any) -> PackageDAT:
        """Returns the package's contender, eager."""
        return PackageDAT(backbone, self.contrastive_steps, self.attack_steps, dtype, **arguments)


@dataclass
class Timing:
    """Seconds of one contender, one value per round.

    Attributes:
        first: Elapsed time of the first, untimed call, in which compiling happens.
        wall: Elapsed time.
        cpu: Processor time of all threads, which other programs on the machine disturb less.
    """

    first: float = 0.0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class DisagreementError(Exception):
    """The implementations differ, so their times would mean nothing."""


def take_turns(contenders: dict[str, Call], timings: dict[str, Timing], rounds: int) -> None:
    """Adds the times of ``rounds`` calls of each contender."""
    order = list(contenders)
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name](number)
            timings[name].wall.append(time.perf_counter() - wall)
            timings[name].cpu.append(time.process_time() - cpu)


def reference_agreement(backbone: nn.Module, setting: Setting) -> dict[str, Agreement]:
    """Returns how the package's first step differs from the plain one where no rounding error comes between them.

    That is float32 with the plain implementation's memory layout, and float64 with the package's. In float32 with the
    package's own layout sums run in another order, and a kinked activation turns rounding into another attack.
    """
    batch = random_batch(setting.batch_size, setting.size, seed=0)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    cases: dict[str, tuple[torch.dtype, dict[str, Tensor], dict[str, Any]]] = {
        "float32, contiguous": (torch.float32, batch, {"memory_format": "contiguous"}),
        "float64": (torch.float64, wide, {}),
    }
    found = {}
    for name, (dtype, images, arguments) in cases.items():
        plain, package = setting.plain(backbone, dtype), setting.package(backbone, dtype, **arguments)
        found[name] = compare(plain, package, plain.step(images), package.step(images))
    return found


def time_steps(backbone: nn.Module, setting: Setting) -> tuple[dict[str, Timing], dict[str, Agreement], dict[str, int]]:
    """Returns the times of Stage-2 steps, how first steps differ, and how many graphs were compiled when.

    Raises:
        DisagreementError: If a difference is above :data:`TOLERANCE`.
    """
    batches = [random_batch(setting.batch_size, setting.size, seed) for seed in range(_NUM_BATCHES)]
    plain, packages = setting.plain(backbone), {"package": setting.package(backbone)}
    if setting.compile:
        packages["package, compiled"] = setting.package(backbone)
        packages["package, compiled"].compile()
    before = compiled_graphs()
    expected, start = timed(partial(plain.step, batches[0]))
    timings, agreement = {"plain": Timing(start)}, reference_agreement(backbone, setting)
    for name, package in packages.items():
        found, start = timed(partial(package.step, batches[0]))
        timings[name] = Timing(start)
        agreement[f"float32, {name}"] = compare(plain, package, expected, found)
    for name, difference in agreement.items():
        kinks = setting.activation == "relu" and name in {f"float32, {p}" for p in packages}
        if not difference.largest() <= TOLERANCE and not kinks:
            raise DisagreementError(f"{name}: {difference}, allowed {TOLERANCE:g}")
    after = compiled_graphs()
    runs: dict[str, PlainDAT | PackageDAT] = {"plain": plain, **packages}

    def caller(run: PlainDAT | PackageDAT) -> Call:
        return lambda number: run.step(batches[number % _NUM_BATCHES])

    take_turns({name: caller(run) for name, run in runs.items()}, timings, setting.rounds)
    return timings, agreement, {"in the first step": after - before, "in the rounds": compiled_graphs() - after}


def time_generation(backbone: nn.Module, setting: Setting) -> dict[str, Timing]:
    """Returns the times of generation chains.

    Raises:
        DisagreementError: If images differ by more than :data:`IMAGE_TOLERANCE`, unless the activation has kinks.
    """
    x, y = random_batch(setting.batch_size, setting.size, seed=0)["x_ood"], torch.arange(setting.batch_size) % 10
    model = PlainClassifier(copy.deepcopy(backbone), MEAN, STD).eval()
    chain = unbounded_ascent(_GENERATION_STEP_SIZE, setting.generation_steps)
    plain = partial(generate, model, x, y, chain.step_size, chain.num_steps, setting.plain_gradient)
    contenders: dict[str, Callable[[], Tensor]] = {"plain": plain}
    for name in ["package", *(["package, compiled"] if setting.compile else [])]:
        energy_model = EnergyModel(copy.deepcopy(backbone), MEAN, STD).eval()
        energy_model.to(memory_format=torch.channels_last)
        if name == "package, compiled":
            energy_model.compile(dynamic=False)
        contenders[name] = partial(ascend, energy_model, x, y, targeted_logit, chain)
    timings: dict[str, Timing] = {}
    images: dict[str, Tensor] = {}
    for name, call in contenders.items():
        images[name], start = timed(call)
        timings[name] = Timing(start)
        difference = (images[name] - images["plain"]).abs().max().item()
        if not difference <= IMAGE_TOLERANCE and setting.activation != "relu":
            raise DisagreementError(f"{name}: generated images differ by {difference:.1e}, allowed {IMAGE_TOLERANCE:g}")

    def caller(call: Callable[[], Tensor]) -> Call:
        return lambda number: call()

    take_turns({name: caller(call) for name, call in contenders.items()}, timings, setting.rounds)
    return timings


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Returns what the call returns, and its elapsed time."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def summarise(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """Returns medians, and how many times as fast as the plain contender each one is, in three ways."""
    plain = timings["plain"]
    return {
        name: {
            "median": statistics.median(timing.wall),
            "ratio of medians": statistics.median(plain.wall) / statistics.median(timing.wall),
            "median of ratios": statistics.median(p / t for p, t in zip(plain.wall, timing.wall, strict=True)),
            "cpu median": statistics.median(timing.cpu),
            "cpu ratio": statistics.median(plain.cpu) / statistics.median(timing.cpu),
            "first call": timing.first,
        }
        for name, timing in timings.items()
    }


def table(title: str, timings: dict[str, Timing]) -> str:
    """Returns the summary as text."""
    rows = summarise(timings)
    lines = [f"{title:30}" + "".join(f"{column:>18}" for column in rows["plain"]) + "\n"]
    for name, row in rows.items():
        cells = (f"{value:.3f}{'x' if 'ratio' in column else 's'}" for column, value in row.items())
        lines.append(f"  {name:28}" + "".join(f"{cell:>18}" for cell in cells) + "\n")
    return "".join(lines)


def compiled_graphs() -> int:
    """Returns how many graphs ``torch.compile`` has made in this process."""
    import torch._dynamo.utils  # a slow import

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def machine() -> dict[str, str | int]:
    """Returns the device, the number of threads and the versions."""
    return {
        "device": f"cpu, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "dat_lightning": __version__,
    }


def parse(arguments: list[str] | None) -> tuple[Setting, Path | None]:
    """Returns the setting and the file for the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__)
    choices = {"activation": ("relu", "silu"), "plain_gradient": ("input", "all")}
    for name, value in asdict(Setting()).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(flag, type=type(value), choices=choices.get(name), default=value)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = vars(parser.parse_args(arguments))
    out: Path | None = values.pop("json")
    return Setting(**values), out


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if the implementations disagree."""
    setting, out = parse(arguments)
    torch.set_num_threads(setting.threads)
    tell, where = sys.stdout.write, machine()
    tell("".join(f"{name}: {value}\n" for name, value in (asdict(setting) | where).items()))
    backbone = setting.backbone()
    try:
        steps, agreement, graphs = time_steps(backbone, setting)
        chains = time_generation(backbone, setting)
    except DisagreementError as error:
        tell(f"{error}\nThe implementations disagree: their times would mean nothing.\n")
        return 1
    tell("\nDifferences of the first step from the plain implementation\n")
    for name, difference in agreement.items():
        tell(f"  {name:28}" + ", ".join(f"{key} {value:.1e}" for key, value in asdict(difference).items()) + "\n")
    tell(f"\n{table('Stage-2 step', steps)}\n{table('Generation chain', chains)}\n")
    tell(f"Graphs compiled for the step: {graphs}\n")
    if out is not None:
        result = {
            "setting": asdict(setting),
            "where": where,
            "agreement": {name: asdict(difference) for name, difference in agreement.items()},
            "graphs": graphs,
            "step": {"summary": summarise(steps), "seconds": {name: asdict(t) for name, t in steps.items()}},
            "generation": {"summary": summarise(chains), "seconds": {name: asdict(t) for name, t in chains.items()}},
        }
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
