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
from torch.utils.data import DataLoader

from dat_lightning import DigitsDataModule, PGDSampler, SampleBatch
from dat_lightning.core import Logits
from dat_lightning.data import SizedDataset
from dat_lightning.data.digits import digits, load_images, split_indices
from dat_lightning.data.draws import DrawStream, EvaluationBatches
from dat_lightning.data.paired import Split
from dat_lightning.sampling import Memorisation
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

    def in_distribution(self, split: Split) -> SizedDataset:
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
    share, median = memorisation.figures[:2]
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
    steps = {"test/memorisation_steps": 0.0}
    assert logged == pytest.approx({**steps, **{f"test/{f.name}": f.value for f in memorisation.figures}}, rel=1e-6)
    assert {"quantile": 0.01, "metric": "L2", "num_sampling_steps": 0}.items() <= share.settings.items()


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
    assert sum(seen) == 1437 + 360 + 2 * 2 * 40
    seen.clear()
    trainer.test(tiny.stage1(), datamodule=data, verbose=False)
    assert seen == []


def test_the_training_images_follow_the_data(tmp_path: Path) -> None:
    """The same callback with other data compares with these."""

    class Smaller(Planted):
        def reference_data(self) -> EvaluationBatches:
            return EvaluationBatches(digits(split_indices(144)["val"]), self.evaluation_transform())

    memorisation = Memorisation(Pixels())
    seeds, _ = planted()
    sizes = []
    for data in (Planted(seeds), Smaller(seeds)):
        run(tmp_path, memorisation, data)
        sizes.append(memorisation.figures[0].details["num_training_images"])
    assert sizes == [1437, 144]


class Scripted(PGDSampler):
    """Its snapshots are given, not climbed."""

    def __init__(self, snapshots: dict[int, Tensor]) -> None:
        super().__init__(num_samples=40, num_steps=list(snapshots), step_size=1.0, batch_size=16)
        self.snapshots = snapshots

    def generate(self, logits: Logits, seeds: Tensor, indices: Tensor, num_classes: int) -> SampleBatch:
        images = {steps: images[indices] for steps, images in self.snapshots.items()}
        return SampleBatch(indices, indices % num_classes, seeds, images)


def snapshots() -> dict[int, Tensor]:
    """Step count → images: one copy is made on the way, three are there early, and bad samples come last."""
    copies, originals = planted()
    one = real("test")[:40].clone()
    one[5] = real("train")[7]
    noise = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert len(originals) == 3
    return {2: one, 4: copies, 9: noise}


def scripted(path: Path, data: dict[int, Tensor], **kwargs: Any) -> tuple[Memorisation, dict[str, float]]:
    memorisation = Memorisation(Pixels(), dirpath=str(path / "out"), num_pictures=4, **kwargs)
    trainer = tiny.trainer(path, [memorisation, Scripted(data)])
    trainer.test(Foreign(), datamodule=Planted(real("test")[:40]), verbose=False)
    return memorisation, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_every_snapshot_has_its_figures_and_the_worst_share_stands_for_all(tmp_path: Path) -> None:
    data = snapshots()
    memorisation, logged = scripted(tmp_path, data)
    nearest = {steps: distances(images, real("train")).min(1) for steps, images in data.items()}
    threshold = np.quantile(distances(real("test"), real("train")).min(1), 0.01)
    shares = {steps: float((values < threshold).mean()) for steps, values in nearest.items()}
    medians = {steps: float(np.sort(values)[19]) for steps, values in nearest.items()}
    assert shares == {2: 1 / 40, 4: 3 / 40, 9: 0.0}
    figures = {figure.name: figure for figure in memorisation.figures}
    expected = {"memorised_share": shares[4], "nearest_training_distance": medians[4]}
    for steps in data:
        expected[f"memorised_share_{steps}_steps"] = shares[steps]
        expected[f"nearest_training_distance_{steps}_steps"] = medians[steps]
        assert figures[f"memorised_share_{steps}_steps"].settings["num_sampling_steps"] == steps
        assert figures[f"memorised_share_{steps}_steps"].details["num_sampling_steps"] == steps
    assert list(figures) == list(expected)
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected, abs=1e-5)
    named = {f"test/{name}": value for name, value in expected.items()}
    assert logged == pytest.approx({"test/memorisation_steps": 4.0, **named}, rel=1e-5)
    for name, values in (("memorised_share", shares), ("nearest_training_distance", medians)):
        chosen = figures[name]
        assert chosen.details["num_sampling_steps"] == 4
        assert chosen.details["sweep_steps"] == [2, 4, 9]
        assert chosen.details["sweep"] == pytest.approx(list(values.values()), abs=1e-5)
        # Runs with the same sweep are compared, whichever steps are chosen.
        assert chosen.settings["num_sampling_steps"] == "those of 2, 4, 9 with the largest memorised share"
    assert {entry["sample"] for entry in figures["memorised_share"].details["flagged"]} == {3, 17, 36}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test_memorisation_4_steps.png"]
    with Image.open(tmp_path / "out" / "test_memorisation_4_steps.png") as picture:
        red = (np.asarray(picture) == (200, 30, 30)).all(2)
    # The three copies are framed: two side by side, and one below.
    assert ((red.sum(1) == 2 * 102).sum(), (red.sum(1) == 102).sum()) == (6, 6)


@pytest.mark.parametrize("steps", [2, 9])
def test_the_snapshot_can_be_asked_for(steps: int, tmp_path: Path) -> None:
    memorisation, logged = scripted(tmp_path, snapshots(), num_steps=steps)
    share, median, *others = memorisation.figures
    assert share.details["num_sampling_steps"] == logged["test/memorisation_steps"] == steps
    assert share.settings["num_sampling_steps"] == steps
    assert len(others) == 6
    assert share.value == {2: 1 / 40, 9: 0.0}[steps]
    assert median.value == {f.name: f for f in others}[f"nearest_training_distance_{steps}_steps"].value
    assert len(share.details["flagged"]) == {2: 1, 9: 0}[steps]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"test_memorisation_{steps}_steps.png"]


def test_of_equal_shares_the_nearest_samples_count(tmp_path: Path) -> None:
    data = snapshots()
    noise = data[9]
    near = (0.9 * noise + 0.1 * real("test")[:40]).clamp(0, 1)
    memorisation, logged = scripted(tmp_path, {1: noise, 3: near, 8: noise, 9: near})
    assert {f.value for f in memorisation.figures if "share" in f.name} == {0.0}
    assert logged["test/memorisation_steps"] == 3


def test_figures_tell_what_they_were_measured_with(tmp_path: Path) -> None:
    class Shifted(Planted):
        """One test image differs in one pixel."""

        def test_dataloader(self) -> Any:
            batches = list(super().test_dataloader())
            batches[1]["x"][3, 0, 5, 5] = 1 - batches[1]["x"][3, 0, 5, 5]
            return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    seeds, _ = planted()
    names, found = ("metric", "extractor", "reference", "test_images"), []
    for kind in (Planted, Planted, Shifted):
        memorisation = Memorisation(Pixels())
        run(tmp_path, memorisation, kind(seeds))
        used = [{name: f.settings[name] for name in names} for f in memorisation.figures]
        assert all(part == used[0] for part in used)
        found.append(used[0])
    assert found[0] == found[1]
    assert {name for name in found[0] if found[0][name] != found[2][name]} == {"test_images"}


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

    with pytest.raises(ValueError, match=r"Memorisation compares with training images: use a DataModule with"):
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
