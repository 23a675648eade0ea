"""Samples, FID and Inception score of the paper's published code, derived from files by PIL, NumPy and SciPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dat_lightning import EnergyModel, PGDSampler, SampleMetrics, SampleWriter, SmallResNet
from dat_lightning.data import ImageDataModule, ImageFolder
from dat_lightning.features import FidelitySettings, TorchFidelityLayers
from dat_lightning.results.measurement import Measurement, differing
from tests import tiny
from tests.features.random_inception import random_inception

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Values = np.ndarray[Any, np.dtype[np.float64]]
NUM_CLASSES, SIZE, STEPS, STEP_SIZE = 5, 16, 2, 1.5
# What Inception sees in this test; 299 takes a minute.
INCEPTION_SIZE = 75
FID_ERROR, SCORE_ERROR = 1e-3, 1e-2


class Pictures(Dataset[Any]):
    """Labelled images of smooth colours."""

    def __init__(self, size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.images = [_blocks(rng, (SIZE, SIZE)) for _ in range(size)]
        self.labels = np.arange(size) % NUM_CLASSES

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], int(self.labels[index])


def _blocks(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return blocks.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """torch-fidelity's own Inception with random weights, and a file of them."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    return random_inception(path, "64"), str(path)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 70 images of many shapes."""
    folder, rng = tmp_path_factory.mktemp("seeds"), np.random.default_rng(1)
    for k in rng.permutation(70):
        _blocks(rng, (int(rng.integers(17, 60)), int(rng.integers(17, 60)))).save(folder / f"{k:03d}.png")
    return folder


def network() -> EnergyModel:
    torch.manual_seed(2)
    return EnergyModel(SmallResNet(num_classes=NUM_CLASSES, in_channels=3, widths=(4, 8)))


def measured(
    path: Path, seeds: Path, weights: str, seed_transform: Any, rounding: Any, isc_size: int | None
) -> dict[str, Measurement]:
    """The figures of 64 samples, which are written as PNG files too."""
    data = ImageDataModule(
        Pictures(80, 3), Pictures(10, 4), held_out=ImageFolder(seeds), image_size=SIZE, seed_transform=seed_transform
    )
    sampler = PGDSampler(64, [STEPS], STEP_SIZE, batch_size=16, rounding=rounding)
    extractor = TorchFidelityLayers("inception-v3-compat", ["64"], weights)
    settings = FidelitySettings(isc_splits=4, isc_size=isc_size)
    # An early layer for both, as the logits of random weights are all alike.
    metrics = SampleMetrics(extractor, ["fid", "isc"], settings, logit_layer="64", cache_dir=str(path / "cache"))
    writer = SampleWriter(str(path / "samples"), ["png"], stages=["test"])
    module = tiny.stage1(energy_model=network())
    tiny.trainer(path, [sampler, metrics, writer], limit_test_batches=1).test(module, datamodule=data, verbose=False)
    return {figure.name: figure for figure in metrics.figures}


# The published way once more, from the first seed to the last figure, by nothing of ours but the network.


def published_samples(seeds: Path) -> Pixels:
    """64 samples as bytes (N, H, W, 3)."""
    return to_bytes(ascended(published_seeds(seeds)), rounded=False)


def published_seeds(seeds: Path) -> Tensor:
    """64 files in the order of their names, squashed, (N, 3, H, W)."""
    images = []
    for path in sorted(seeds.iterdir())[:64]:
        with Image.open(path) as image:
            images.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(np.float32) / 255)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def ascended(x: Tensor) -> Tensor:
    """Seeds (N, 3, H, W) after all steps; seed i climbs the logit of class i mod K."""
    model, labels = network().eval(), np.arange(len(x)) % NUM_CLASSES
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[range(len(x)), labels].sum(), x)
        length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = (x + STEP_SIZE * gradient / (length + 1e-10)).clamp(0, 1)
    return x.detach()


def to_bytes(x: Tensor, rounded: bool) -> Pixels:
    levels = 255 * x.permute(0, 2, 3, 1).numpy()
    return np.asarray(np.rint(levels) if rounded else levels).astype(np.uint8)


def written(folder: Path, pixels: Pixels) -> list[Path]:
    """PNG files of samples in the order of their indices."""
    folder.mkdir()
    paths = [folder / f"{k:03d}.png" for k in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


def layer(original: Any, pixels: Pixels) -> Values:
    """Inception's layer 64 of bytes (N, H, W, 3)."""
    with torch.no_grad():
        (found,) = original(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return np.asarray(found.double().numpy())


def fid(features: Values, real: Values) -> float:
    ours, theirs = np.cov(features, rowvar=False), np.cov(real, rowvar=False)
    root = scipy.linalg.sqrtm(ours @ theirs).real
    between = features.mean(0) - real.mean(0)
    return float(between @ between + np.trace(ours) + np.trace(theirs) - 2 * np.trace(root))


def log_score(logits: Values) -> float:
    """Logarithm of the Inception score: random weights leave a score just above 1."""
    # As torch-fidelity shuffles files that lie in one folder per class.
    order = np.array(sorted(range(64), key=lambda k: (k % NUM_CLASSES, k)))[np.random.RandomState(2020).permutation(64)]
    p = np.exp(logits[order] - logits[order].max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    parts = [part * (np.log(part) - np.log(part.mean(0))) for part in np.split(p, 4)]
    return float(np.log(np.mean([np.exp(part.sum(1).mean()) for part in parts])))


def test_both_protocols_are_derived_independently_and_do_not_compare(
    tmp_path: Path, inception: tuple[Any, str], seeds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", INCEPTION_SIZE)
    original, weights = inception
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    ours = measured(tmp_path / "ours", seeds, weights, "augment", "nearest", None)
    theirs = measured(tmp_path / "theirs", seeds, weights, "squash", "truncate", INCEPTION_SIZE)
    real = layer(original, np.stack([np.asarray(image) for image in Pictures(80, 3).images]))

    files = written(tmp_path / "published", published_samples(seeds))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    sides = (INCEPTION_SIZE, INCEPTION_SIZE)
    resized = np.stack([np.asarray(Image.open(file).resize(sides, Image.Resampling.BILINEAR)) for file in files])
    features, logits = layer(original, pixels), layer(original, resized)
    assert theirs["fid"].value == pytest.approx(fid(features, real), rel=FID_ERROR)
    assert np.log(theirs["inception_score"].value) == pytest.approx(log_score(logits), rel=SCORE_ERROR)
    for k, image in enumerate(pixels):
        path = tmp_path / "theirs" / "samples" / "png" / f"{k % NUM_CLASSES:04d}" / f"{k:06d}.png"
        same = np.asarray(Image.open(path)).astype(int)
        # A sum in another order moves a value over the edge of its level now and then.
        assert (same == image).mean() > 0.98
        assert np.abs(same - image).max() <= 1

    data = ImageDataModule(Pictures(80, 3), Pictures(10, 4), held_out=ImageFolder(seeds), image_size=SIZE)
    x = torch.stack([data.held_out_seeds()(k)[0] for k in range(64)])
    own = layer(original, to_bytes(ascended(x), rounded=True))
    assert ours["fid"].value == pytest.approx(fid(own, real), rel=FID_ERROR)
    assert np.log(ours["inception_score"].value) == pytest.approx(log_score(own), rel=SCORE_ERROR)

    # Each setting alone moves its figure by more than these errors.
    rounded = layer(original, to_bytes(ascended(published_seeds(seeds)), rounded=True))
    assert abs(fid(rounded, real) / fid(features, real) - 1) > 3 * FID_ERROR
    assert abs(fid(rounded, real) / fid(own, real) - 1) > 3 * FID_ERROR
    assert abs(log_score(features) / log_score(logits) - 1) > 3 * SCORE_ERROR
    told = differing([ours["fid"].compared_by, theirs["fid"].compared_by])
    assert set(told) == {"seed_transform", "rounding"}
    told = differing([ours["inception_score"].compared_by, theirs["inception_score"].compared_by])
    assert set(told) == {"seed_transform", "rounding", "isc_size"}
