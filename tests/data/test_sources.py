"""Each source as part of a configuration: built by its class path, read by loader processes, resumed in mid-epoch."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dat_lightning import (
    AUCCurriculum,
    DualAdversarialModule,
    EnergyModel,
    ImageDataModule,
    RobustClassifierModule,
    SmallResNet,
)
from dat_lightning.cli import DATArgumentParser, main
from tests import tiny
from tests.data.parquet import needs_datasets, write_parquet
from tests.recipes import CLASSES, random_images, write_cifar

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
STAGE1 = str(Path(__file__).resolve().parents[2] / "configs" / "digits" / "stage1.yaml")
TRAIN, TEST, SEEDS = random_images(40, 1, 8), random_images(20, 2, 8), random_images(60, 3, 8)


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def arrays(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name, images in (("train", TRAIN), ("test", TEST), ("seeds", SEEDS)):
        np.save(root / f"{name}.npy", images)
        np.save(root / f"{name}_labels.npy", np.arange(len(images)) % 10)
    labelled = {
        name: part("dat_lightning.ArrayImages", path=f"{root}/{name}.npy", labels=f"{root}/{name}_labels.npy")
        for name in ("train", "test")
    }
    return {**labelled, "ood": part("dat_lightning.ArrayImages", path=f"{root}/seeds.npy")}


def cifar100_as_seeds(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    sources = arrays(root, monkeypatch)
    write_cifar("cifar100", root, monkeypatch)

    def seeds(train: bool) -> dict[str, Any]:
        cifar = {"name": "cifar100", "root": str(root), "train": train, "skip_classes": ["bus", "apple"]}
        return part("dat_lightning.Unlabelled", dataset=part("dat_lightning.CIFARImages", **cifar))

    return {**sources, "ood": seeds(True), "held_out": seeds(False)}


def parquet(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    datasets: Any = pytest.importorskip("datasets", reason=needs_datasets)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "hf")
    for name, images in (("train", TRAIN), ("test", TEST), ("seeds", SEEDS)):
        labels = [k % 10 for k in range(len(images))]
        write_parquet(root / f"{name}.parquet", [*images], CLASSES["cifar10"], label=labels)
    labelled = {
        name: part("dat_lightning.HuggingFaceImages", files=f"{root}/{name}.parquet", label="label")
        for name in ("train", "test")
    }
    return {**labelled, "ood": part("dat_lightning.HuggingFaceImages", files=f"{root}/seeds.parquet")}


def write_fashion_mnist(root: Path) -> None:
    """Writes the four files as they are unpacked: numbers in big-endian order, then bytes."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count, seed in (("train", 40, 4), ("t10k", 20, 5)):
        grey = random_images(count, seed, 28)[..., 0]
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + grey.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def torchvision(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    write_fashion_mnist(root)
    labelled = {
        name: part("torchvision.datasets.FashionMNIST", root=str(root), train=name == "train")
        for name in ("train", "test")
    }
    noise = part("dat_lightning.UniformNoise", size=60, shape=[1, 28, 28])
    return {**labelled, "ood": noise, "image_size": 28}


SOURCES = pytest.mark.parametrize("source", [arrays, cifar100_as_seeds, parquet, torchvision])


def built(sources: dict[str, Any], **kwargs: Any) -> ImageDataModule:
    """The data module of a configuration, by way of YAML."""
    settings = {"image_size": 8, "num_held_out": 10, "batch_size": 8, **sources, **kwargs}
    text = yaml.safe_dump({"data": part("dat_lightning.ImageDataModule", **settings)})
    parser = DATArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    data: ImageDataModule = parser.instantiate_classes(parser.parse_string(text)).data
    return data


def first_batches(data: ImageDataModule, count: int) -> list[dict[str, Tensor]]:
    data.setup("fit")
    return [batch for batch, _ in zip(data.train_dataloader(), range(count), strict=False)]


@SOURCES
def test_a_source_gives_the_same_batches_to_any_number_of_loader_processes(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = source(tmp_path, monkeypatch)
    alone, shared = (first_batches(built(sources, num_workers=workers), 3) for workers in (0, 2))
    size = sources.get("image_size", 8)
    channels = 1 if source is torchvision else 3
    for one, other in zip(alone, shared, strict=True):
        assert one.keys() == other.keys() >= {"x_gen", "y_gen", "x_clf", "y_clf", "x_ood"}
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert one["x_gen"].shape == one["x_clf"].shape == one["x_ood"].shape == (8, channels, size, size)
    data = built(sources)
    (test,) = data.test_dataloader()
    assert test["y"].tolist() == [k % 10 for k in range(20)]
    expected = random_images(20, 5, 28)[..., :1] if source is torchvision else TEST
    assert torch.equal((test["x"] * 255).round().byte(), torch.from_numpy(expected).permute(0, 3, 1, 2))


@SOURCES
def test_training_on_a_source_goes_on_bit_for_bit(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = source(tmp_path, monkeypatch)

    def trained(checkpoint: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = EnergyModel(SmallResNet(widths=(4,), in_channels=1 if source is torchvision else 3))
        curriculum = AUCCurriculum(max_steps=2, initial_steps=1)
        shared: Any = {"optimizer": tiny.SGD, "threat_model": tiny.ATTACK}
        module = DualAdversarialModule(network, curriculum, contrastive_step_size=0.4, **shared)
        saves = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=3, save_top_k=-1)
        limits: Any = {"max_epochs": 2, "max_steps": 7, "limit_train_batches": 1.0, "enable_checkpointing": True}
        trainer = tiny.trainer(tmp_path, [saves], **limits)
        trainer.fit(module, datamodule=built(sources, num_workers=1), ckpt_path=checkpoint)
        return dict(module.state_dict())

    whole = trained()
    half = tmp_path / "kept" / "step=3.ckpt"  # of five batches in an epoch
    resumed = trained(half)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = torch.load(half, weights_only=True)["state_dict"]
    assert not all(torch.equal(whole[name], before[name]) for name in whole)


def test_a_data_set_of_torchvision_trains_and_is_measured_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = torchvision(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    data = {**sources, "num_held_out": 10, "batch_size": 8}
    network = part("dat_lightning.EnergyModel", backbone=part("dat_lightning.SmallResNet", widths=[4], in_channels=1))
    model = part(
        "dat_lightning.RobustClassifierModule",
        energy_model=network,
        optimizer=part("torch.optim.SGD", lr=0.1),
        threat_model={"norm": "L2", "eps": 0.5, "step_size": 0.25, "num_steps": 2},
    )
    trainer = {"max_epochs": 1, "logger": False, "default_root_dir": "run", "enable_progress_bar": False}
    config = {"model": model, "data": part("dat_lightning.ImageDataModule", **data), "trainer": trainer}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    main(["fit", "--config", "run.yaml"])
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 5
    module = RobustClassifierModule.load_from_checkpoint(path)
    assert module(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_files_of_a_data_set_of_torchvision_that_are_missing_cost_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = torchvision(tmp_path, monkeypatch)
    for file in (tmp_path / "FashionMNIST" / "raw").iterdir():
        file.unlink()
    config = {"data": part("dat_lightning.ImageDataModule", **sources)}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["fit", "--config", STAGE1, "--config", str(tmp_path / "data.yaml")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dat-lightning: error: ")
    assert "a data set of torchvision is not below the folder that is its root" in error
    assert "download: true" in error
