"""A small run of each kind through the command line, and parts that fail in it on purpose."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from tests.recipes import write_folders

ROOT = Path(__file__).resolve().parents[2]
STAGE1, STAGE2 = (str(ROOT / "configs" / "digits" / f"{name}.yaml") for name in ("stage1", "dat"))
TINY = str(ROOT / "tests" / "conf" / "tiny.yaml")


class Pixels(Dataset[tuple[Tensor, int]]):
    """Float images (3, 16, 16) with labels k mod 10, of which one in ten may have a NaN pixel.

    Args:
        size: How many.
        bad: Whether image 0, 10, 20, … has one.
    """

    def __init__(self, size: int, bad: bool = False) -> None:
        self.images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(size))
        if bad:
            self.images[::10, 1, 8, 8] = torch.nan

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % 10


class Dying(Pixels):
    """The loader process is killed when it comes to image 7, as the system does when memory runs out."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Removes(Callback):
    """Removes a folder after the second step.

    Args:
        path: The folder.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            shutil.rmtree(self.path)


class Keeps(Callback):
    """Keeps the figures of the last run, and whether its weights are finite and have moved."""

    figures: dict[str, float]
    finite: bool
    moved: bool

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Keeps.figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        state = pl_module.state_dict().values()
        Keeps.finite = all(bool(value.isfinite().all()) for value in state)
        now = [p.detach() for p in pl_module.parameters()]
        Keeps.moved = any(not torch.equal(a, b) for a, b in zip(self.before, now, strict=True))


def dataset(name: str, **arguments: Any) -> dict[str, Any]:
    """The YAML of a data set."""
    return {"class_path": name if "." in name else f"dat_lightning.data.{name}", "init_args": arguments}


def write_config(folder: Path, *, callbacks: list[Any] | None = None, classes: int = 10, **data: Any) -> str:
    """Writes the configuration of a small Stage 2 on 16×16 colour images and returns its path.

    Args:
        folder: Where the images and the file go.
        callbacks: Further callbacks, as YAML.
        classes: Classes of the network.
        data: Arguments of the ImageDataModule, instead of folders of JPEG files.
    """
    config = yaml.safe_load(Path(STAGE2).read_text(encoding="utf-8"))
    tiny = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))
    model = config["model"]["init_args"]
    backbone = {"num_classes": classes, "in_channels": 3, "widths": [4, 8]}
    model["energy_model"] = {
        "class_path": "dat_lightning.EnergyModel",
        "init_args": {"backbone": {"class_path": "dat_lightning.SmallResNet", "init_args": backbone}},
    }
    model["threat_model"]["num_steps"] = model["eval_threat_model"]["num_steps"] = 1
    if "train" not in data:
        write_folders(folder / "train", 10, 4, (16, 16), seed=0)
        data["train"] = dataset("LabelledFolder", root=str(folder / "train"))
    data.setdefault("test", data["train"])
    if "ood" not in data:
        write_folders(folder / "ood", 1, 60, (20, 20), seed=1)
        data["ood"] = dataset("ImageFolder", root=str(folder / "ood"))
    settings = {"image_size": 16, "batch_size": 8, "eval_batch_size": 8, "num_held_out": 20, "num_workers": 0}
    config["data"] = {"class_path": "dat_lightning.ImageDataModule", "init_args": settings | data}
    guard = {"class_path": "dat_lightning.DivergenceGuard", "init_args": {"action": "skip"}}
    sampling = [c for c in tiny["trainer"]["callbacks"] if "Frechet" not in c["class_path"]]
    config["trainer"] |= tiny["trainer"] | {"limit_train_batches": 4, "log_every_n_steps": 1}
    config["trainer"]["callbacks"] = [*sampling[:1], guard, *(callbacks or []), *sampling[1:]]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def write_modes(folder: Path) -> dict[str, np.ndarray]:
    """Writes a left black, right white image in every mode; returns what each has to be read as, (16, 16, 3) bytes."""
    grey = np.zeros((16, 16), dtype=np.uint8)
    grey[:, 8:] = 255
    colour = np.stack([grey] * 3, axis=2)
    alpha = np.full((16, 16, 1), 128, dtype=np.uint8)
    images = {
        "L": Image.fromarray(grey),
        "1": Image.fromarray(grey).convert("1"),
        "P": Image.fromarray(colour).quantize(2),
        "I16": Image.fromarray(grey.astype(np.uint16) * 257),
        "LA": Image.fromarray(np.concatenate([grey[:, :, None], alpha], axis=2)),
        "RGBA": Image.fromarray(np.concatenate([colour, alpha], axis=2)),
        "CMYK": Image.fromarray(colour).convert("CMYK"),
        "RGB": Image.fromarray(colour),
    }
    folder.mkdir(parents=True)
    for mode, image in images.items():
        image.save(folder / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}")
    return dict.fromkeys(images, colour)
