"""Images per second that one loader process delivers for each recipe, and what that feeds.

    python -m tests.benchmarks.pipelines --cifar DIR --imagenet DIR [--json FILE]

``--cifar`` is a folder ``train/<class>/*`` of 32×32 images, ``--imagenet`` a folder ``<class>/*`` of photographs. One
training image of Stage 2 is three loaded images: x_gen, x_clf and x_ood.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dat_lightning.data import ImageDataModule, ImageFolder, LabelledFolder, TinyImages
from dat_lightning.data.paired import Stream


class InMemory(Dataset[Any]):
    """The first images of a labelled folder as arrays, as torchvision's CIFAR keeps them."""

    def __init__(self, folder: LabelledFolder, size: int) -> None:
        places = range(0, len(folder), max(1, len(folder) // size))
        entries = [folder[i] for i in places]
        self.images = np.stack([np.asarray(image) for image, _ in entries])
        self.labels = [label for _, label in entries]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


def say(text: str) -> None:
    """Writes a line to the terminal at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def tiny_images_file(path: Path, records: int) -> Path:
    """Writes a file in the layout of 80M Tiny Images."""
    pixels = np.random.default_rng(0).integers(0, 256, (records, 3072), dtype=np.uint8)
    pixels.tofile(path)
    return path


def large_photographs(source: Path, target: Path, count: int) -> Path:
    """Writes photographs at ImageNet's usual 500×375 pixels, enlarged: what a decoder has to work on."""
    for n, path in enumerate(sorted(source.rglob("*.*"))[:count]):
        folder = target / f"class{n % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{n}.jpg", quality=92)
    return target


def images_per_second(data: ImageDataModule, seconds: float) -> float:
    """Returns the rate at which one process makes training batches."""
    batches = chain.from_iterable(repeat(data.train_dataloader()))
    next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(batches)
        count += sum(len(value) for key, value in batch.items() if key.startswith("x_"))
    return count / (time.perf_counter() - start)


def recipes(cifar: Path, imagenet: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """Returns the arguments of the DataModule of each recipe."""
    folder = LabelledFolder(cifar / "train")
    memory = InMemory(folder, 5000)
    tiny = TinyImages(tiny_images_file(scratch / "tiny_images.bin", 20_000))
    photographs = large_photographs(imagenet, scratch / "photographs", 300)
    small: dict[str, Any] = {"augmentation": "cifar", "image_size": 32, "batch_size": 32, "num_held_out": 10}
    large: dict[str, Any] = {"augmentation": "imagenet", "image_size": 256, "batch_size": 8, "num_held_out": 10}
    return {
        "CIFAR in memory, Tiny Images": {"train": memory, "test": memory, "ood": tiny, **small},
        "CIFAR as JPEG files, crops of 288-pixel JPEGs": {
            "train": folder,
            "test": folder,
            "ood": ImageFolder(imagenet),
            "ood_augmentation": "resized_crop",
            **small,
        },
        "ImageNet as 288-pixel JPEGs": {
            "train": LabelledFolder(imagenet),
            "test": memory,
            "ood": ImageFolder(imagenet),
            **large,
        },
        "ImageNet as 500×375 JPEGs": {
            "train": LabelledFolder(photographs),
            "test": memory,
            "ood": ImageFolder(photographs),
            **large,
        },
    }


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--imagenet", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    streams: dict[str, tuple[Stream, ...]] = {"x_gen": ("gen",), "x_clf": ("clf",), "x_ood": ("ood",)}
    streams |= {"Stage 1": ("clf",), "Stage 2": ("gen", "clf", "ood")}
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cases = recipes(options.cifar, options.imagenet, Path(scratch))
        say(f"images/s of one process, median of {options.rounds} (one of {os.cpu_count()} cores)")
        say(f"{'':48}" + "".join(f"{name:>10}" for name in streams))
        for name, arguments in cases.items():
            rates: dict[str, list[float]] = {stream: [] for stream in streams}
            for _ in range(options.rounds):
                for stream, chosen in streams.items():
                    data = ImageDataModule(**arguments, streams=chosen)
                    rates[stream].append(images_per_second(data, options.seconds))
            results[name] = {stream: median(values) for stream, values in rates.items()}
            say(f"{name:48}" + "".join(f"{value:10.0f}" for value in results[name].values()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
