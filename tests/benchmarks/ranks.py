"""Samples per second of generation on 1, 2, … ranks, and what its parts cost.

    python -m tests.benchmarks.ranks [--ranks 1 2] [--samples N] [--threads-per-rank 1] [--device cuda] [--json FILE]

A set of N samples is generated through ``Trainer.predict`` by PGDSampler, with SampleWriter (PNG and npz) and the
Fréchet distance of the features for digits as consumers; each rank is a process (gloo on a CPU, NCCL on GPUs) with its
own threads. Timed is all between the first seed, which is a photograph of 500×375 pixels to be decoded, and the last
figure, on the slowest rank; the reference of the Fréchet distance, the first batch of a process and its start are not.
Numbers of ranks take turns, and the efficiency is the median over the rounds of (time of one rank) / (R · time of R
ranks), so that other work on the machine falls on all alike. Processor seconds are summed over ranks and loader
processes.

The second table is of one rank: the set with a consumer that does nothing, with each of the real ones, with both, and
with seeds that loader processes read, in turn; the cost is the median of the extra time against the first of these.

Sizes depend on the device; ``--net`` and the others change them. The network's weights are random.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from typing_extensions import override

from dat_lightning import (
    DigitsFeatures,
    EnergyModel,
    FrechetDistance,
    ImageDataModule,
    ImageFolder,
    LabelledFolder,
    PGDSampler,
    RobustClassifierModule,
    SampleConsumer,
    SampleWriter,
    SamplingPlan,
    SmallResNet,
    WideResNet,
)
from dat_lightning.backbones import resnet50
from dat_lightning.core.ascent import Precision
from dat_lightning.results.gathering import all_ranks
from dat_lightning.speed import Execution
from tests import tiny
from tests.ddp.ranks import launch, strategy

NUM_PICTURES = 80
Device = Literal["cpu", "cuda"]
Consumers = Literal["nothing", "writer", "features", "both"]

# Network and size of the images.
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "small": (lambda: SmallResNet(in_channels=3, widths=(4, 8)), 16),
    "wrn_16_2": (lambda: WideResNet(16, 2), 32),
    "wrn_34_10": (lambda: WideResNet(34, 10), 32),
    "resnet50": (resnet50, 256),
}


@dataclass(frozen=True)
class Settings:
    """What a set is, and who generates it."""

    device: Device
    net: str
    samples: int
    batch_size: int
    num_steps: int
    threads_per_rank: int
    workers: int
    precision: Precision | None


# A chain of 35 steps, as for 32×32 images, and batches enough for eight GPUs.
SIZES: dict[Device, dict[str, Any]] = {
    "cpu": {"net": "wrn_16_2", "samples": 160, "batch_size": 20, "num_steps": 20, "workers": 1, "precision": "float32"},
    "cuda": {
        "net": "wrn_34_10",
        "samples": 8192,
        "batch_size": 256,
        "num_steps": 35,
        "workers": 8,
        "precision": "bfloat16",
    },
}


class Clock(SampleConsumer):
    """Times a set on all ranks: the last of the callbacks, so that it is told last.

    Attributes:
        seconds: Elapsed time until the slowest rank was done.
        cpu_seconds: Processor time of all ranks and their loader processes.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        self._wait(trainer)
        self._started, self._used = time.perf_counter(), _cpu_seconds()

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        used = _cpu_seconds() - self._used
        self._wait(trainer)
        self.seconds = time.perf_counter() - self._started
        self.cpu_seconds = sum(all_ranks(used))

    def _wait(self, trainer: Trainer) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        trainer.strategy.barrier("Clock")


def _cpu_seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def write_pictures(folder: Path) -> None:
    """Writes crops of two photographs at ImageNet's usual size, as ``class<k>/<n>.jpg``."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for n in range(NUM_PICTURES):
        photograph = photographs[n % len(photographs)]
        height, width = photograph.shape[:2]
        top, left = int(rng.integers(height - 374)), int(rng.integers(width - 499))
        path = folder / f"class{n % 10}" / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(path, quality=92)


def generate(
    settings: Settings, folder: Path, num_ranks: int, consumers: Consumers, workers: int, samples: int
) -> dict[str, float]:
    """Generates a set on this rank's share, and returns its times.

    Args:
        settings: Network and sizes.
        folder: Has the pictures, and gets the samples and the reference of the Fréchet distance.
        num_ranks: Processes that share the set.
        consumers: Who gets the samples.
        workers: Loader processes of each rank.
        samples: Size of the set.
    """
    make, image_size = NETS[settings.net]
    torch.manual_seed(0)
    model = EnergyModel(make(), mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    module = RobustClassifierModule(
        energy_model=model, optimizer=tiny.SGD, threat_model=tiny.ATTACK, execution=Execution(fold_batch_norm=True)
    )
    pictures = LabelledFolder(folder / "pictures")
    data = ImageDataModule(
        *(pictures, pictures, ImageFolder(folder / "pictures")),
        num_held_out=NUM_PICTURES - 1,
        augmentation="imagenet",
        image_size=image_size,
        eval_batch_size=10,
        num_workers=workers,
    )
    sampler = PGDSampler(samples, [settings.num_steps], 0.5, settings.batch_size, precision=settings.precision)
    clock = Clock()
    chosen: list[Callback] = [sampler]
    if consumers in ("writer", "both"):
        chosen.append(SampleWriter(str(folder / f"ranks-{num_ranks}")))
    if consumers in ("features", "both"):
        chosen.append(FrechetDistance(DigitsFeatures(), cache_dir=str(folder / "cache")))
    trainer = tiny.trainer(
        folder,
        [*chosen, clock],
        accelerator="gpu" if settings.device == "cuda" else "cpu",
        devices=num_ranks,
        strategy=strategy(num_ranks),
        deterministic=False,
        limit_predict_batches=1,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, "rank": trainer.global_rank}


def measure_ranks(settings: Settings, folder: Path, num_ranks: int) -> None:
    """Times one set on this process's share after a small one; rank zero writes ``ranks-<R>.json``."""
    _prepare(settings)
    generate(settings, folder, num_ranks, "both", settings.workers, num_ranks * settings.batch_size)
    times = generate(settings, folder, num_ranks, "both", settings.workers, settings.samples)
    if times.pop("rank") == 0:
        with np.load(folder / f"ranks-{num_ranks}" / "samples.npz") as file:
            digest = hashlib.sha256(file["arr_0"].tobytes() + file["arr_1"].tobytes()).hexdigest()[:16]
        (folder / f"ranks-{num_ranks}.json").write_text(json.dumps({**times, "samples": digest}), encoding="utf-8")


def measure_parts(settings: Settings, folder: Path, rounds: int) -> None:
    """Times the same set on one rank with different consumers, in turn, and writes ``parts.json``."""
    _prepare(settings)
    parts: dict[str, tuple[Consumers, int]] = {
        "no consumer": ("nothing", 0),
        "writer": ("writer", 0),
        "features": ("features", 0),
        "writer and features": ("both", 0),
        f"seeds by {settings.workers} loader process{'es' * (settings.workers != 1)}": ("nothing", settings.workers),
    }
    generate(settings, folder, 1, "both", settings.workers, settings.batch_size)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    for number in range(rounds):
        for name in _in_turn(list(parts), number):
            times[name].append(generate(settings, folder, 1, *parts[name], settings.samples))
    (folder / "parts.json").write_text(json.dumps(times), encoding="utf-8")


def _prepare(settings: Settings) -> None:
    """What a process needs before it computes."""
    torch.set_num_threads(settings.threads_per_rank)
    for name in ("lightning.pytorch", "lightning.fabric", "dat_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _in_turn(names: list[Any], number: int) -> list[Any]:
    """Names in an order that is reversed from round to round."""
    return names if number % 2 == 0 else names[::-1]


def scaling(settings: Settings, folder: Path, ranks: Sequence[int], rounds: int) -> dict[str, dict[str, Any]]:
    """Returns a row of figures for each number of ranks, of which the first is one."""
    found: dict[int, list[dict[str, Any]]] = {num_ranks: [] for num_ranks in ranks}
    for number in range(rounds):
        for num_ranks in _in_turn(list(ranks), number):
            launch(measure_ranks, num_ranks, settings, folder, num_ranks)
            found[num_ranks].append(json.loads((folder / f"ranks-{num_ranks}.json").read_text(encoding="utf-8")))
    one = [times["seconds"] for times in found[1]]
    rows: dict[str, dict[str, Any]] = {}
    for num_ranks, several in found.items():
        efficiencies = [first / (num_ranks * times["seconds"]) for first, times in zip(one, several, strict=True)]
        rows[str(num_ranks)] = {
            **_row(settings, several),
            "efficiency": median(efficiencies),
            "efficiencies": efficiencies,
            "sets": sorted({times["samples"] for times in several}),
        }
    return rows


def costs(settings: Settings, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Returns a row of figures for each part of generation."""
    launch(measure_parts, 1, settings, folder, rounds)
    times = json.loads((folder / "parts.json").read_text(encoding="utf-8"))
    least = [each["seconds"] for each in times["no consumer"]]
    rows = {}
    for name, several in times.items():
        extra = [each["seconds"] / first - 1 for each, first in zip(several, least, strict=True)]
        rows[name] = {**_row(settings, several), "cost": median(extra)}
    return rows


def _row(settings: Settings, times: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    seconds = [each["seconds"] for each in times]
    cpu = median(each["cpu_seconds"] for each in times)
    return {"seconds": seconds, "samples_per_s": settings.samples / median(seconds), "cpu_seconds": cpu}


def report(results: Mapping[str, Any]) -> str:
    """Returns the tables as text."""
    s = results["settings"]
    lines = [
        f"{s['samples']} samples, batches of {s['batch_size']}, {s['num_steps']} steps, {s['net']} on {s['device']},"
        f" {s['threads_per_rank']} threads per rank, {results['cores']} cores, load before {results['load']:.1f},"
        f" median of {results['rounds']}",
        f"{'ranks':28}{'samples/s':>12}{'efficiency':>12}{'CPU s':>9}  set",
    ]
    for name, row in results["ranks"].items():
        lines.append(
            f"{name:28}{row['samples_per_s']:12.2f}{row['efficiency']:12.2f}{row['cpu_seconds']:9.1f}"
            f"  {', '.join(row['sets'])}"
        )
    lines.append(f"\n{'one rank':28}{'samples/s':>12}{'cost':>12}{'CPU s':>9}")
    for name, row in results["parts"].items():
        lines.append(f"{name:28}{row['samples_per_s']:12.2f}{row['cost']:12.1%}{row['cpu_seconds']:9.1f}")
    return "\n".join(lines) + "\n"


def parsed(args: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Returns the options, and the settings that they and the device make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="one rank is always among them")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--num-steps", type=int, help="length of the chain")
    parser.add_argument("--threads-per-rank", type=int, default=1)
    parser.add_argument("--workers", type=int, help="loader processes of each rank")
    parser.add_argument("--net", choices=list(NETS))
    parser.add_argument("--precision", choices=["float32", "bfloat16"])
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for pictures and samples; by default a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    sizes = {name: getattr(options, name) for name in SIZES[options.device] if getattr(options, name) is not None}
    settings = Settings(
        device=options.device, threads_per_rank=options.threads_per_rank, **{**SIZES[options.device], **sizes}
    )
    options.ranks = sorted({1, *options.ranks})
    for name in ("samples", "batch_size", "num_steps", "threads_per_rank"):
        if getattr(settings, name) < 1:
            parser.error(f"{name} must be at least 1, got {getattr(settings, name)}")
    if options.rounds < 1 or settings.workers < 0 or options.ranks[0] < 1:
        parser.error("rounds and ranks must be at least 1, and workers at least 0")
    for num_ranks in options.ranks:
        if settings.samples % (num_ranks * settings.batch_size):
            parser.error(
                f"samples must be a multiple of {num_ranks} ranks × batch_size {settings.batch_size}, so that all have"
                f" equally many batches, got {settings.samples}"
            )
    return options, settings


def main(args: Sequence[str] | None = None) -> None:
    options, settings = parsed(args)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.folder is None else options.folder.resolve()
        write_pictures(folder / "pictures")
        results = {
            "settings": asdict(settings),
            "rounds": options.rounds,
            "cores": os.cpu_count(),
            "load": load,
            "ranks": scaling(settings, folder, options.ranks, options.rounds),
            "parts": costs(settings, folder, options.rounds),
        }
    sys.stdout.write(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
