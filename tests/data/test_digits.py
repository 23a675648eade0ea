from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dat_lightning.data import DigitsDataModule, SizedDataset, UniformNoise, ood, shared_images
from dat_lightning.data.digits import load_images, photograph_crops, split_indices
from dat_lightning.data.paired import OODSplit, Stream


def fingerprints(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def images_of(dataset: SizedDataset) -> Tensor:
    entries = (dataset[i] for i in range(len(dataset)))
    return torch.stack([entry[0] if isinstance(entry, tuple) else entry for entry in entries])


def small(**arguments: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"num_ood": 60, "num_held_out": 40, **arguments})


def test_images_are_scikit_learn_s_digits_enlarged_to_16_pixels() -> None:
    images, labels = load_images()
    assert images.shape == (1797, 1, 16, 16)
    assert images.dtype == torch.float32
    assert [images.min().item(), images.max().item()] == [0, 1]
    digits = load_digits()
    assert labels.tolist() == digits.target.tolist()
    # Bilinear doubling: the four pixels around a corner of the grid of 8×8 average to its four neighbours' mean.
    small_images = digits.images / 16
    neighbours = sum(small_images[:, a : a + 7, b : b + 7] for a in (0, 1) for b in (0, 1)) / 4
    doubled = images[:, 0].numpy()
    around = sum(doubled[:, 1 + a : 15 + a : 2, 1 + b : 15 + b : 2] for a in (0, 1) for b in (0, 1)) / 4
    np.testing.assert_allclose(around, neighbours, atol=1e-6)


@pytest.mark.parametrize("validation_size", [0, 10, 144, 1000])
def test_the_splits_share_nothing_and_have_fixed_sizes(validation_size: int) -> None:
    splits = split_indices(validation_size)
    assert {name: len(places) for name, places in splits.items()} == {
        "train": 1437 - validation_size,
        "val": validation_size,
        "test": 360,
    }
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    # Whatever is kept for validation, the test digits stay the same.
    assert splits["test"].tolist() == split_indices(77)["test"].tolist()


def test_every_class_is_in_every_split_in_proportion() -> None:
    labels = load_images()[1].numpy()
    for places in split_indices(144).values():
        counts = Counter(labels[places].tolist())
        assert sorted(counts) == list(range(10))
        assert max(counts.values()) / min(counts.values()) < 1.25


def test_the_loaders_give_each_split_and_no_image_of_another() -> None:
    data = small(batch_size=64, streams=("clf",), max_shift_clf=0)
    val, test = (torch.cat([b["x"] for b in loader]) for loader in (data.val_dataloader(), data.test_dataloader()))
    train = torch.cat([batch["x_clf"] for batch in data.train_dataloader()])
    assert (len(val), len(test)) == (144, 360)
    assert fingerprints(train) <= fingerprints(images_of(data.in_distribution("train")))
    assert len(fingerprints(train)) > 1200
    for a, b in ((train, val), (train, test), (val, test)):
        assert not fingerprints(a) & fingerprints(b)
    assert fingerprints(test) == fingerprints(load_images()[0][split_indices(0)["test"]])
    assert min(val.min(), test.min(), train.min()) >= 0
    assert max(val.max(), test.max(), train.max()) <= 1


def test_labels_stay_with_their_images() -> None:
    images, labels = load_images()
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    batch = next(iter(small(max_shift_gen=0).train_dataloader()))
    assert [label_of[image.numpy().tobytes()] for image in batch["x_gen"]] == batch["y_gen"].tolist()
    batch = next(iter(small().test_dataloader()))
    assert [label_of[image.numpy().tobytes()] for image in batch["x"]] == batch["y"].tolist()


def test_reference_data_are_all_images_that_are_not_for_testing() -> None:
    reference = small().reference_data()
    x = reference[list(range(1437))]["x"]
    assert fingerprints(x) == fingerprints(load_images()[0][split_indices(0)["train"]])
    with pytest.raises(IndexError):
        reference[[1437]]


def test_strong_augmentation_shifts_the_classification_images_alone() -> None:
    data = small(batch_size=64, max_shift_clf=2, max_shift_gen=0)
    batch = next(iter(data.train_dataloader()))
    train = images_of(data.in_distribution("train"))
    shifted = {
        torch.nn.functional.pad(image, (2, 2, 2, 2))[:, dy : dy + 16, dx : dx + 16].contiguous().numpy().tobytes(): (
            dy - 2,
            dx - 2,
        )
        for dy in range(5)
        for dx in range(5)
        for image in train
    }
    assert fingerprints(batch["x_gen"]) <= fingerprints(train)
    shifts = [shifted[image.contiguous().numpy().tobytes()] for image in batch["x_clf"]]
    # Both ways and both axes, up to the largest shift.
    assert {dy for dy, _ in shifts} == {dx for _, dx in shifts} == {-2, -1, 0, 1, 2}


def test_seeds_in_training_are_flipped_crops_and_held_out_seeds_are_as_they_are() -> None:
    data = small()
    crops = images_of(photograph_crops(60, "train"))
    flips = [crops.flip(dims) for dims in ((), (2,), (3,), (2, 3))]
    seeds = torch.cat([batch["x_ood"] for batch in data.train_dataloader()])
    found = [fingerprints(seeds) & fingerprints(flipped.contiguous()) for flipped in flips]
    assert set[bytes]().union(*found) == fingerprints(seeds)
    assert all(found)
    held_out = torch.stack([data.held_out_seeds()(i)[0] for i in range(40)])
    assert fingerprints(held_out) == fingerprints(images_of(photograph_crops(40, "held_out")))


def test_training_and_held_out_seeds_come_from_disjoint_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    # One region black, the other a ramp: a crop tells which of them it saw.
    regions: dict[OODSplit, list[Tensor]] = {
        "train": [torch.zeros(1, 200, 300)] * 2,
        "held_out": [torch.linspace(0, 1, 200).view(1, 200, 1).expand(1, 200, 140)] * 2,
    }
    asked = list[str]()

    def photographs(part: OODSplit) -> list[Tensor]:
        asked.append(part)
        return regions[part]

    monkeypatch.setattr(ood, "_photographs", photographs)
    photograph_crops.cache_clear()
    try:
        data = small(num_ood=23, num_held_out=21)
        train, held_out = data.out_of_distribution("train"), data.out_of_distribution("held_out")
        assert train is not None
        assert held_out is not None
        assert images_of(train).flatten(1).std(1).max() < 1e-6
        assert images_of(held_out).flatten(1).std(1).min() > 0.05
    finally:
        photograph_crops.cache_clear()
    assert Counter(asked) == {"train": 23, "held_out": 21}


def test_noise_seeds_of_training_and_generation_differ() -> None:
    data = small(ood="noise")
    train, held_out = (data.out_of_distribution(split) for split in ("train", "held_out"))
    assert isinstance(train, UniformNoise)
    assert isinstance(held_out, UniformNoise)
    assert (len(train), len(held_out)) == (60, 40)
    assert images_of(train).shape[1:] == (1, 16, 16)
    assert not fingerprints(images_of(train)) & fingerprints(images_of(held_out))
    data.setup("fit")


def test_without_ood_images_stage_1_trains_and_stage_2_says_what_is_missing() -> None:
    stage1 = small(ood="none", streams=("clf",))
    stage1.setup("fit")
    assert next(iter(stage1.train_dataloader())).keys() == {"draw", "x_clf", "y_clf"}

    stage2 = small(ood="none")
    for use in (lambda: stage2.setup("fit"), stage2.train_dataloader):
        with pytest.raises(ValueError, match=r"DigitsDataModule has no out-of-distribution images \(train\)"):
            use()
    with pytest.raises(ValueError, match=r"DigitsDataModule has no out-of-distribution images \(held_out\)"):
        stage1.held_out_seeds()


def test_digits_as_ood_images_are_refused() -> None:
    class Confused(DigitsDataModule):
        def out_of_distribution(self, split: OODSplit) -> SizedDataset | None:
            return self.in_distribution("train")

    with pytest.raises(ValueError, match="images of Confused are the training images: 100%"):
        Confused().setup("fit")


def test_photographs_are_not_digits() -> None:
    data = small()
    data.setup("fit")
    crops = data.out_of_distribution("train")
    assert crops is not None
    assert shared_images(data.in_distribution("train"), crops) == [0.0]


def test_the_same_batches_come_from_any_number_of_workers() -> None:
    alone, two = (list(small(batch_size=256, num_workers=n).train_dataloader()) for n in (0, 2))
    assert len(alone) == len(two) == 1293 // 256
    for a, b in zip(alone, two, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stream", ["gen", "clf", "ood"])
def test_augmented_images_stay_images(stream: Stream) -> None:
    for batch in small(batch_size=256, max_shift_clf=3, max_shift_gen=1, streams=(stream,)).train_dataloader():
        x = batch[f"x_{stream}"]
        assert x.shape == (256, 1, 16, 16)
        assert 0 <= x.min() <= x.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_size": 9}, "validation_size .* 9"),
        ({"validation_size": 1001}, "validation_size .* 1001"),
        ({"ood": "cats"}, "ood must be .* 'cats'"),
        ({"num_ood": 0}, "num_ood must be a whole number of at least 1, got 0"),
        ({"num_held_out": 0}, "num_held_out must be a whole number of at least 1, got 0"),
        ({"max_shift_clf": 16}, "shifts .* 16 and 0"),
        ({"max_shift_gen": -1}, "shifts .* -1"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)
