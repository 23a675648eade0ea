"""Times a Stage-2 step and a generation chain against the plain implementation: ``python -m tests.benchmarks.bench``.

Every contender starts from the same weights and sees the same batches. They take turns within a round, in an order that
is reversed from round to round, so that whatever else the machine does falls on all of them alike. Compiling happens
before, and is reported by itself. Before anything is timed, the first steps are compared.
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
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn

from dat_lightning import __version__
from dat_lightning.core import EnergyModel, ascend, ascent, targeted_logit

from .cases import MEAN, STD, PackageDAT, calibrated_backbone, largest_difference, random_batch
from .plain_dat import AttackGradient, PlainClassifier, PlainDAT, generate

TOLERANCE = 1e-5
_NUM_BATCHES = 4
_GENERATION_STEP_SIZE = 0.2


@dataclass(frozen=True)
class Setting:
    """What is timed, and how."""

    depth: int = 16
    widen_factor: int = 2
    activation: str = "relu"
    size: int = 32
    batch_size: int = 32
    contrastive_steps: int = 10
    attack_steps: int = 10
    generation_steps: int = 20
    plain_gradient: AttackGradient = "input"
    threads: int = 2
    rounds: int = 7
    compile: bool = True


@dataclass(frozen=True)
class Agreement:
    """Largest differences between the plain implementation's first step and another's."""

    energy_loss: float
    classification_loss: float
    parameters: float
    average: float

    def largest(self) -> float:
        """Returns the largest of them."""
        return max(asdict(self).values())


@dataclass
class Timing:
    """Seconds of one contender, one value per round.

    Attributes:
        wall: Elapsed time.
        cpu: Processor time of all threads, which other programs on the machine disturb less.
        first: Elapsed time of the first, untimed call, in which compiling happens.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    first: float = 0.0


def make_backbone(setting: Setting) -> nn.Module:
    """Returns the network with which all contenders start."""
    return calibrated_backbone(setting.depth, setting.widen_factor, setting.size, setting.activation)


def make_plain(backbone: nn.Module, setting: Setting) -> PlainDAT:
    """Returns the plain contender."""
    model = PlainClassifier(copy.deepcopy(backbone), MEAN, STD)
    steps = setting.contrastive_steps
    return PlainDAT(
        model, initial_steps=steps, max_steps=steps, attack_steps=setting.attack_steps, gradient=setting.plain_gradient
    )


def make_package(backbone: nn.Module, setting: Setting, *, compiled: bool = False) -> PackageDAT:
    """Returns the package's contender."""
    package = PackageDAT(backbone, setting.contrastive_steps, setting.attack_steps)
    if compiled:
        package.compile()
    return package


def compare(plain: PlainDAT, package: PackageDAT, batch: dict[str, Tensor]) -> Agreement:
    """Takes one step with each and returns how they differ."""
    expected, found = plain.step(batch), package.step(batch)
    return Agreement(
        energy_loss=(expected.energy_loss - found.energy_loss).abs().item(),
        classification_loss=(expected.classification_loss - found.classification_loss).abs().item(),
        parameters=largest_difference(plain.model, package.module.energy_model),
        average=largest_difference(plain.average, package.averaged_energy_model()),
    )


def agreements(backbone: nn.Module, setting: Setting) -> dict[str, Agreement]:
    """Returns how the package's first step differs from the plain one, in three ways of computing it.

    With the plain implementation's memory layout the two agree in float32, and with the package's own in float64. With
    the package's own in float32 sums run in another order, and an activation with a kink turns rounding into different
    attacks: that difference belongs to the network, and is reported without a limit unless the activation is smooth.
    """
    batch = random_batch(setting.batch_size, setting.size, seed=0)
    found: dict[str, Agreement] = {}
    contiguous = make_package(backbone, setting)
    contiguous.module.energy_model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    found["float32, contiguous"] = compare(make_plain(backbone, setting), contiguous, batch)
    double = copy.deepcopy(backbone).double()
    plain, package = make_plain(double, setting), make_package(double, setting)
    plain.model.double()
    plain.average.double()
    package.double()
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    found["float64, as timed"] = compare(plain, package, wide)
    found["float32, as timed"] = compare(make_plain(backbone, setting), make_package(backbone, setting), batch)
    return found


def interleave(
    contenders: dict[str, Callable[[int], object]], rounds: int, tell: Callable[[str], object]
) -> dict[str, Timing]:
    """Returns the times of calls that take turns, after one untimed call of each."""
    timings = {name: Timing() for name in contenders}
    for name, call in contenders.items():
        start = time.perf_counter()
        call(0)
        timings[name].first = time.perf_counter() - start
        tell(f"  {name}: first call {timings[name].first:.1f} s\n")
    order = list(contenders)
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name](number)
            timings[name].wall.append(time.perf_counter() - wall)
            timings[name].cpu.append(time.process_time() - cpu)
    return timings


def time_steps(
    backbone: nn.Module, setting: Setting, tell: Callable[[str], object]
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Returns the times of Stage-2 steps, and how many graphs were compiled before and during the rounds."""
    batches = [random_batch(setting.batch_size, setting.size, seed) for seed in range(_NUM_BATCHES)]
    runs: dict[str, PlainDAT | PackageDAT] = {
        "plain": make_plain(backbone, setting),
        "package": make_package(backbone, setting),
    }
    if setting.compile:
        runs["package, compiled"] = make_package(backbone, setting, compiled=True)
    graphs: dict[str, int] = {}

    def caller(run: PlainDAT | PackageDAT) -> Callable[[int], object]:
        return lambda number: run.step(batches[number % _NUM_BATCHES])

    def count(line: str) -> None:
        graphs["in the first step"] = _compiled_graphs()
        tell(line)

    before = _compiled_graphs()
    timings = interleave({name: caller(run) for name, run in runs.items()}, setting.rounds, count)
    graphs["in the first step"] -= before
    graphs["in the rounds"] = _compiled_graphs() - before - graphs["in the first step"]
    return timings, graphs


def time_generation(backbone: nn.Module, setting: Setting, tell: Callable[[str], object]) -> dict[str, Timing]:
    """Returns the times of generation chains."""
    x = random_batch(setting.batch_size, setting.size, seed=0)["x_ood"]
    y = torch.arange(setting.batch_size) % 10
    steps = setting.generation_steps
    model = PlainClassifier(copy.deepcopy(backbone), MEAN, STD).eval()

    def package(*, compiled: bool) -> Callable[[int], object]:
        energy_model = EnergyModel(copy.deepcopy(backbone), MEAN, STD).eval()
        energy_model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            energy_model.compile(dynamic=False)
        chain = ascent(_GENERATION_STEP_SIZE, steps)
        return lambda _: ascend(energy_model, x, y, targeted_logit, chain)

    contenders: dict[str, Callable[[int], object]] = {
        "plain": lambda _: generate(model, x, y, _GENERATION_STEP_SIZE, steps, setting.plain_gradient),
        "package": package(compiled=False),
    }
    if setting.compile:
        contenders["package, compiled"] = package(compiled=True)
    return interleave(contenders, setting.rounds, tell)


def summarise(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """Returns medians, and how many times as fast as the plain contender each one is, in three ways."""
    plain = timings["plain"]
    return {
        name: {
            "median": statistics.median(timing.wall),
            "ratio of medians": statistics.median(plain.wall) / statistics.median(timing.wall),
            "median ratio": statistics.median(p / t for p, t in zip(plain.wall, timing.wall, strict=True)),
            "cpu median": statistics.median(timing.cpu),
            "cpu ratio": statistics.median(plain.cpu) / statistics.median(timing.cpu),
        }
        for name, timing in timings.items()
    }


def table(title: str, timings: dict[str, Timing]) -> str:
    """Returns the summary as text."""
    columns = ("median", "ratio of medians", "median ratio", "cpu median", "cpu ratio")
    lines = [f"{title}\n", f"  {'':18}" + "".join(f"{column:>18}" for column in columns) + f"{'first call':>18}\n"]
    for name, row in summarise(timings).items():
        cells = (f"{row[c]:.3f} s" if c.endswith("median") else f"{row[c]:.3f}x" for c in columns)
        lines.append(f"  {name:18}" + "".join(f"{c:>18}" for c in cells) + f"{timings[name].first:>16.1f} s\n")
    return "".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if the implementations disagree."""
    setting, out = _parse(arguments)
    tell = sys.stdout.write
    torch.set_num_threads(setting.threads)
    where = {
        "device": f"cpu, {platform.processor() or platform.machine()}, capability {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "dat_lightning": __version__,
    }
    tell("".join(f"{name}: {value}\n" for name, value in (asdict(setting) | where).items()))
    backbone = make_backbone(setting)
    found = agreements(backbone, setting)
    agree = True
    tell(f"Differences of the first step from the plain implementation (limit {TOLERANCE:g})\n")
    for name, difference in found.items():
        limited = name != "float32, as timed" or setting.activation != "relu"
        agree &= difference.largest() <= TOLERANCE or not limited
        values = ", ".join(f"{key} {value:.1e}" for key, value in asdict(difference).items())
        tell(f"  {name}: {values}{'' if limited else '  (no limit: kinks)'}\n")
    if not agree:
        tell("The implementations disagree: their times would mean nothing.\n")
        return 1
    tell("First calls\n")
    steps, graphs = time_steps(backbone, setting, tell)
    chains = time_generation(backbone, setting, tell)
    tell(table("One Stage-2 step", steps))
    tell(f"  graphs compiled: {graphs}\n")
    tell(table(f"One generation chain of {setting.generation_steps} steps", chains))
    if out is not None:
        result = {
            "setting": asdict(setting),
            "where": where,
            "agreement": {name: asdict(difference) for name, difference in found.items()},
            "graphs": graphs,
            "step": {"summary": summarise(steps), "seconds": {k: asdict(v) for k, v in steps.items()}},
            "generation": {"summary": summarise(chains), "seconds": {k: asdict(v) for k, v in chains.items()}},
        }
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse(arguments: list[str] | None) -> tuple[Setting, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__)
    default = Setting()
    for name, value in asdict(default).items():
        flag = f"--{name.replace('_', '-')}"
        if name == "compile":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        elif name in _CHOICES:
            parser.add_argument(flag, choices=_CHOICES[name], default=value)
        else:
            parser.add_argument(flag, type=int, default=value)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    values = vars(parser.parse_args(arguments))
    out: Path | None = values.pop("json")
    return Setting(**values), out


_CHOICES = {"activation": ("relu", "silu"), "plain_gradient": ("input", "all")}


def _compiled_graphs() -> int:
    import torch._dynamo.utils  # a private counter, and a slow import

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    raise SystemExit(main())
