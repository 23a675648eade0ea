"""Memorisation: planted copies are found, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn

from dat_lightning import DigitsDataModule, PGDSampler
from dat_lightning.callbacks import Memorisation
from dat_lightning.data.digits import Digits, load_images, split_indices
from dat_lightning.data.draws import DrawStream, EvaluationBatches
from dat_lightning.data.paired import Split
from tests import tiny


class Pixels(nn.Module):
    """Pixels as features, so that distances are those of images."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0].flatten(1).float() / 255


class Planted(DigitsDataModule):
    """Digits whose seeds, which samples without steps are, are given."""

    def __init__(self, seeds: Tensor) -> None:
        super().__init__(eval_batch_size=100)
        self.seeds = seeds

    def held_out_seeds(self) -> DrawStream:
        seeds: Callable[[int], tuple[Tensor, None]] = lambda i: (self.seeds[i], None)  # noqa: E731
        return seeds  # type: ignore[return-value]


class SameSplits(Planted):
    """The mistake to test on training images."""

    def in_distribution(self, split: Split) -> Digits:
        return super().in_distribution("train")


class Foreign(LightningModule):
    """A module of another project."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass


def real(which: str) -> Tensor:
    """The 1 437 digits to train with, or the 360 to test with."""
    splits = split_indices(144)
    places = splits["test"] if which == "test" else np.sort(np.concatenate([splits["train"], splits["val"]]))
    return load_images()[0][torch.from_numpy(places)]


def levels(images: Tensor) -> np.ndarray:
    """Eight-bit pixels as features, in float64."""
    pixels: np.ndarray = np.rint(images.flatten(1).double().numpy() * 255) / 255
    return pixels


def distances(images: Tensor, pool: Tensor) -> np.ndarray:
    """All L2 distances, one by one."""
    rows = levels(pool)
    return np.stack([np.sqrt(((rows - image) ** 2).sum(1)) for image in levels(images)])


def run(path: Path, memorisation: Memorisation, data: Planted, **kwargs: Any) -> dict[str, float]:
    sampler = PGDSampler(num_samples=len(data.seeds), num_steps=[0], step_size=0.5, batch_size=16)
    trainer = tiny.trainer(path, [memorisation, sampler], **kwargs)
    trainer.test(Foreign(), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def planted() -> tuple[Tensor, dict[int, int]]:
    """Forty noisy test digits, three of which are replaced by training digits; and which by which."""
    noise = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    seeds = (real("test")[:40] * 0.5 + 0.5 * noise).clamp(0, 1)
    copies = {3: 100, 17: 1436, 36: 0}
    for sample, original in copies.items():
        seeds[sample] = real("train")[original]
    return seeds, copies


@pytest.mark.parametrize("inference_mode", [False, True])
def test_planted_copies_are_flagged_and_nothing_else(inference_mode: bool, tmp_path: Path) -> None:
    seeds, copies = planted()
    memorisation = Memorisation(Pixels(), num_neighbours=2)
    logged = run(tmp_path, memorisation, Planted(seeds), inference_mode=inference_mode)
    share, median = memorisation.figures
    listed = share.details["flagged"]
    assert {entry["sample"]: entry["training_images"][0] for entry in listed} == copies
    assert share.value == pytest.approx(3 / 40)
    assert share.num_samples == 40
    nearest = distances(seeds, real("train"))
    for entry in listed:
        expected = np.sort(nearest[entry["sample"]])[:2]
        assert entry["distances"] == pytest.approx(expected.tolist(), abs=1e-3)
        assert entry["class"] == entry["sample"] % 10
    closest = nearest.min(1)
    of_tests = distances(real("test"), real("train")).min(1)
    assert share.details["threshold"] == pytest.approx(np.quantile(of_tests, 0.01), abs=1e-5)
    quantiles = share.details["quantile_levels"]
    assert share.details["sample_quantiles"] == pytest.approx(np.quantile(closest, quantiles), abs=1e-3)
    assert share.details["test_image_quantiles"] == pytest.approx(np.quantile(of_tests, quantiles), abs=1e-5)
    assert median.value == pytest.approx(float(np.sort(closest)[19]), abs=1e-5)  # torch's median: the lower of two
    assert (share.details["num_training_images"], share.details["num_test_images"]) == (1437, 360)
    assert logged == pytest.approx({f"test/{f.name}": f.value for f in memorisation.figures}, rel=1e-6)
    assert "nearer than the 0.01 quantile of 360 real test images; L2 distance" in share.protocol


@pytest.mark.parametrize("quantile", [0.01, 0.1])
def test_real_test_images_are_flagged_as_often_as_the_quantile_says(quantile: float, tmp_path: Path) -> None:
    memorisation = Memorisation(Pixels(), quantile=quantile)
    run(tmp_path, memorisation, Planted(real("test")))
    assert memorisation.figures[0].value == pytest.approx(quantile, abs=1 / 360)
    assert len(memorisation.figures[0].details["flagged"]) == round(memorisation.figures[0].value * 360)


def test_the_cosine_does_not_see_brightness(tmp_path: Path) -> None:
    seeds, copies = planted()
    darker = {3: 0.5}
    for sample, factor in darker.items():
        seeds[sample] *= factor
    found = {}
    for metric in ("L2", "cosine"):
        memorisation = Memorisation(Pixels(), metric=metric)
        run(tmp_path, memorisation, Planted(seeds))
        found[metric] = {entry["sample"] for entry in memorisation.figures[0].details["flagged"]}
    assert found == {"L2": set(copies) - set(darker), "cosine": set(copies)}


def test_the_picture_shows_the_nearest_samples_beside_their_originals(tmp_path: Path) -> None:
    seeds, _ = planted()
    memorisation = Memorisation(Pixels(), num_neighbours=2, num_pictures=3, dirpath=str(tmp_path / "out"))
    run(tmp_path, memorisation, Planted(seeds))
    path = tmp_path / "out" / "test_memorisation_0_steps.png"
    assert memorisation.figures[0].details["pictures"] == [str(path)]
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    # Red frames of three pixels around three tiles of 96, in two rows: two copies side by side, and one below.
    red = (pixels == (200, 30, 30)).all(2)
    assert (red.sum(1) == 2 * 102).sum() == 6
    assert (red.sum(1) == 102).sum() == 6
    ys, xs = np.nonzero(red)
    top, left = int(ys.min()) + 3, int(xs.min()) + 3
    tile = pixels[top : top + 96, left : left + 96, 0][3::6, 3::6]
    seen = torch.from_numpy(tile.copy()).float().div(255).view(1, 1, 16, 16)
    assert distances(seen, seeds[[3, 17, 36]]).min() < 1e-6
    # Its nearest training image stands right of it, and is the same.
    columns = [
        x
        for x in range(left + 97, left + 200)
        if np.array_equal(pixels[top : top + 96, x : x + 96, 0][3::6, 3::6], tile)
    ]
    assert columns


def test_features_of_training_images_are_computed_once_for_a_trainer(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counting(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().forward(images)

    memorisation = Memorisation(Counting(), stages=["val"])
    seeds, _ = planted()
    sampler = PGDSampler(num_samples=40, num_steps=[0, 1], step_size=0.5, batch_size=40)
    trainer = tiny.trainer(tmp_path, [memorisation, sampler], max_epochs=2, limit_train_batches=1, limit_val_batches=1)
    data = Planted(seeds)
    trainer.fit(tiny.stage1(), datamodule=data)
    assert sum(seen) == 1437 + 360 + 2 * 40
    seen.clear()
    trainer.test(tiny.stage1(), datamodule=data, verbose=False)
    assert seen == []


def test_the_training_images_follow_the_data(tmp_path: Path) -> None:
    """The same callback with other data compares with these."""

    class Smaller(Planted):
        def reference_data(self) -> EvaluationBatches:
            return EvaluationBatches(Digits(split_indices(144)["val"]), self.evaluation_transform())

    memorisation = Memorisation(Pixels())
    seeds, _ = planted()
    sizes = []
    for data in (Planted(seeds), Smaller(seeds)):
        run(tmp_path, memorisation, data)
        sizes.append(memorisation.figures[0].details["num_training_images"])
    assert sizes == [1437, 144]


def test_the_snapshot_is_the_one_asked_for(tmp_path: Path) -> None:
    seeds, copies = planted()
    data = Planted(seeds)
    found = {}
    for steps in (None, 0):
        memorisation = Memorisation(Pixels(), num_steps=steps)
        sampler = PGDSampler(num_samples=40, num_steps=[0, 5], step_size=1.0, batch_size=40)
        tiny.trainer(tmp_path, [memorisation, sampler]).test(Foreign(), datamodule=data, verbose=False)
        found[steps] = memorisation.figures[0].value
    assert found == {None: 0.0, 0: pytest.approx(len(copies) / 40)}


# Warnings and errors.


def test_a_test_set_within_the_training_set_is_noticed(tmp_path: Path) -> None:
    memorisation = Memorisation(Pixels())
    with pytest.warns(UserWarning, match="test images are at distance 0 from training images"):
        run(tmp_path, memorisation, SameSplits(planted()[0]))
    assert memorisation.figures[0].value == 0


def test_few_test_images_are_noticed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"360 test images are few for the quantile 0.001"):
        run(tmp_path, Memorisation(Pixels(), quantile=0.001), Planted(planted()[0]))


def test_the_sampler_has_to_take_the_snapshot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Memorisation.num_steps=7 is not among the sampler's snapshots \[0\]"):
        run(tmp_path, Memorisation(Pixels(), num_steps=7), Planted(planted()[0]))


def test_neighbours_have_to_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_neighbours must be at most the number of training images 1437, got 2000"):
        run(tmp_path, Memorisation(Pixels(), num_neighbours=2000), Planted(planted()[0]))


def test_training_images_are_needed(tmp_path: Path) -> None:
    class Without(Planted):
        reference_data = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"Memorisation compares with training images: use a DataModule with"):
        run(tmp_path, Memorisation(Pixels()), Without(planted()[0]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_neighbours": 0}, "num_neighbours must be at least 1, got 0"),
        ({"num_pictures": 0}, "num_pictures must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"metric": "Linf"}, "metric must be 'L2' or 'cosine', got 'Linf'"),
        ({"quantile": 0.0}, "quantile must be between 0 and 1, got 0.0"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Memorisation(Pixels(), **kwargs)
