"""The files that the CIFAR and ImageNet recipes expect, small and in their real formats, in the current folder."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, CIFAR100

from tests.data.parquet import write_parquet

CIFAR: dict[str, tuple[Any, str, dict[str, int], str]] = {
    "cifar10": (
        CIFAR10,
        "cifar-10-batches-py",
        {**{f"data_batch_{k}": 12 for k in range(1, 6)}, "test_batch": 20},
        "labels",
    ),
    "cifar100": (CIFAR100, "cifar-100-python", {"train": 60, "test": 20}, "fine_labels"),
}

# As the published files name and order them.
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""
CLASSES = {"cifar10": CIFAR10_CLASSES.split(), "cifar100": CIFAR100_CLASSES.split()}


class Means(nn.Module):
    """Stands in for Inception, whose weights are not at hand: the mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


def write_cifar(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes pickled batches, and makes torchvision expect their checksums."""
    source, folder, sizes, key = CIFAR[name]
    classes = CLASSES[name]
    rng, stride = np.random.default_rng(len(classes) - 10), 1 if name == "cifar10" else 7
    files: dict[str, Any] = {
        file: {
            key: (np.arange(size) * stride % len(classes)).tolist(),
            "data": rng.integers(0, 256, (size, 3072), dtype=np.uint8),
        }
        for file, size in sizes.items()
    }
    files[source.meta["filename"]] = {source.meta["key"]: classes}
    (root / folder).mkdir(parents=True)
    checksums = {}
    for file, content in files.items():
        data = pickle.dumps(content)
        (root / folder / file).write_bytes(data)
        checksums[file] = hashlib.md5(data).hexdigest()
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[file, checksums[file]] for file, _ in getattr(source, part)])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": checksums[source.meta["filename"]]})


def write_tiny_images(root: Path, records: int = 120) -> None:
    """Writes the file of 80M Tiny Images, and lists of records to exclude."""
    root.mkdir(parents=True, exist_ok=True)
    np.random.default_rng(1).integers(0, 256, (records, 3072), dtype=np.uint8).tofile(root / "tiny_images.bin")
    for name in CIFAR:
        (root / f"tiny_images_{name}.txt").write_text("3\n7\n", encoding="utf-8")


def write_folders(root: Path, classes: int, per_class: int, size: tuple[int, int], seed: int) -> None:
    """Writes JPEG files ``class<k>/<n>.jpg`` of random blocks."""
    rng = np.random.default_rng(seed)
    for k in range(classes):
        folder = root / f"class{k}"
        folder.mkdir(parents=True)
        for n in range(per_class):
            blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            blocks.resize(size, Image.Resampling.BICUBIC).save(folder / f"{n}.jpg")


def write_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes everything below ``root``, which stands for the configurations' ``data``."""
    for name in CIFAR:
        write_cifar(name, root, monkeypatch)
    write_tiny_images(root)
    write_folders(root / "imagenet" / "train", 10, 3, (40, 36), 2)
    write_folders(root / "imagenet" / "val", 10, 2, (40, 36), 3)
    write_folders(root / "openimages" / "train", 2, 30, (50, 36), 4)
    write_folders(root / "openimages" / "held_out", 2, 10, (36, 50), 5)
    write_folders(root / "cifar10" / "train", 10, 6, (32, 32), 6)
    write_folders(root / "cifar10" / "test", 10, 2, (32, 32), 7)
    write_folders(root / "photographs", 3, 30, (60, 48), 8)
    np.save(root / "300K_random_images.npy", random_images(60, 9))


def random_images(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Returns uint8 images (count, size, size, 3) of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_parquet_files(root: Path) -> None:
    """Writes CIFAR-10 and photographs as the Hub has such data; needs the package ``datasets``."""
    for part, count in (("train", 60), ("test", 20)):
        images, labels = random_images(count, count), [k % 10 for k in range(count)]
        write_parquet(root / "cifar10" / f"{part}-0.parquet", [*images], CLASSES["cifar10"], column="img", label=labels)
    write_parquet(root / "photographs" / "a.parquet", [*random_images(40, 3, size=48)])
