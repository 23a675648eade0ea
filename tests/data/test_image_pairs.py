import logging
import math
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dat_lightning.core.errors import InputError
from dat_lightning.data import (
    ImageDataModule,
    ImageFolder,
    LabelledFolder,
    MixedStream,
    RandomSlice,
    StreamTransforms,
    UniformNoise,
    Unlabelled,
)
from dat_lightning.data.draws import DrawStream, EvaluationBatches, PairedDraws
from dat_lightning.data.pixels import CorruptImageError
from tests.recipes import write_folders


class Flat(Dataset[Any]):
    """Image i is of the one grey level ``offset`` + i, its label i modulo 5; some images are corrupt."""

    def __init__(self, size: int, offset: int = 0, labelled: bool = True, corrupt: tuple[int, ...] = ()) -> None:
        self.size, self.offset, self.labelled, self.corrupt = size, offset, labelled, corrupt

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if index in self.corrupt:
            raise CorruptImageError(self.name(index), "made so")
        image = Image.new("RGB", (40, 36), (self.offset + index,) * 3)
        return (image, index % 5) if self.labelled else image

    def name(self, index: int) -> str:
        return f"flat/{self.offset + index}.png"


def level(images: Tensor) -> list[int]:
    """The grey level at the centre of each image."""
    centre = images[:, 0, images.shape[2] // 2, images.shape[3] // 2]
    return [round(value * 255) for value in centre.tolist()]


def pairs(**kwargs: Any) -> ImageDataModule:
    defaults: dict[str, Any] = {
        "train": Flat(60),
        "test": Flat(20, offset=60),
        "ood": Flat(100, offset=100, labelled=False),
        "num_held_out": 30,
        "batch_size": 10,
        "image_size": 8,
    }
    return ImageDataModule(**{**defaults, **kwargs})


def names(dataset: Any) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


class Floats(Dataset[Any]):
    """Float images of two grey levels, with labels; a source that has done something to its pixels."""

    def __init__(self, low: float, high: float, label: Any = 1, name: str = "floats") -> None:
        self.image = torch.full((3, 40, 36), float(low))
        self.image[:, 10:30, 10:30] = high
        self.label, self.source = label, name

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        return self.image, self.label

    def name(self, index: int) -> str:
        return f"{self.source} {index}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_precision_become_batches_of_float32(dtype: torch.dtype) -> None:
    source = Floats(0.25, 0.75)
    expected = next(iter(pairs(test=source).test_dataloader()))["x"]
    source.image = source.image.to(dtype)
    data = pairs(test=source, train=source)
    found = next(iter(data.test_dataloader()))["x"]
    assert found.dtype == expected.dtype == torch.float32
    # What torch resizes in half precision has its rounding.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    batch = next(iter(data.train_dataloader()))
    assert {batch[key].dtype for key in ("x_gen", "x_clf", "x_ood")} == {torch.float32}


@pytest.mark.parametrize("augmentation", ["cifar", "imagenet"])
@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(-2.1, 2.6, r"\[-2.1, 2.6\]"), (0, 255, r"\[0, 255\]"), (-1, 1, r"\[-1, 1\]")],
)
def test_float_pixels_of_another_range_are_refused_wherever_they_enter(
    augmentation: Any, low: float, high: float, found: str
) -> None:
    """Before they are clipped, after which three quarters of them would be 0 or 1."""
    source = Floats(low, high)
    others = {"train": Floats(0, 1), "test": Floats(0, 1), "ood": Floats(0, 1, name="seeds")}
    for argument in ("train", "test", "ood"):
        data = pairs(**{**others, argument: source}, augmentation=augmentation)
        loader = data.test_dataloader() if argument == "test" else data.train_dataloader()
        with pytest.raises(ValueError, match=rf"floats \d+: float pixels must lie in \[0, 1\], got values in {found}"):
            next(iter(loader))
    data = pairs(**{**others, "ood": source}, augmentation=augmentation)
    with pytest.raises(ValueError, match=rf"floats \d+: float pixels .* {found}"):
        data.held_out_seeds()(0)
    with pytest.raises(ValueError, match=rf"floats 0: float pixels .* {found}"):
        pairs(**{**others, "train": source}, augmentation=augmentation).reference_data()[[0]]


def test_what_a_resize_overshoots_is_clipped() -> None:
    sharp = torch.zeros(3, 8, 8)
    sharp[:, 2:4, 2:4] = 1
    resized = v2.functional.resize(sharp, [32, 32], v2.InterpolationMode.BICUBIC, antialias=True)
    assert resized.min() < -0.05
    assert resized.max() > 1.05
    data = pairs(test=[(resized, 0)] * 5, image_size=32)
    batch = next(iter(data.test_dataloader()))
    assert batch["x"].min() == 0
    assert batch["x"].max() <= 1


@pytest.mark.parametrize("label", [np.int32(1), torch.tensor(1).byte(), torch.tensor([1]), 1.0, np.array(1.0)])
def test_a_label_of_any_type_is_an_index(label: Any) -> None:
    source = Floats(0, 1, label)
    data = pairs(train=source, test=source)
    for batch in (next(iter(data.train_dataloader())), next(iter(data.test_dataloader()))):
        labels = batch["y_gen"] if "y_gen" in batch else batch["y"]
        assert labels.dtype == torch.int64
        assert (labels == 1).all()


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (0.7, "0.7"),
        (torch.tensor([0.1, 0.9]), r"float32 of shape \(2,\)"),
        ("cat", "'cat'"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_a_label_that_is_no_index_is_named_with_its_image(label: Any, found: str) -> None:
    source = Floats(0, 1, label)
    for loader in (pairs(train=source).train_dataloader(), pairs(test=source).test_dataloader()):
        with pytest.raises(ValueError, match=rf"floats \d+: a label must be the index of a class, .*, got {found}"):
            next(iter(loader))


@pytest.mark.parametrize("augmentation", ["cifar", "imagenet"])
def test_a_batch_has_all_parts_at_the_size_of_the_network(augmentation: Any) -> None:
    data = pairs(augmentation=augmentation, image_size=16)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"draw", "x_gen", "y_gen", "x_clf", "y_clf", "x_ood"}
    for key in ("x_gen", "x_clf", "x_ood"):
        assert batch[key].shape == (10, 3, 16, 16)
        assert batch[key].dtype == torch.float32
        assert batch[key].min() >= 0
        assert batch[key].max() <= 1
    assert all(100 <= value < 200 for value in level(batch["x_ood"]))
    assert [value % 5 for value in level(batch["x_gen"])] == batch["y_gen"].tolist()


def test_a_stream_has_the_transform_that_is_given_and_the_others_have_the_recipes() -> None:
    """Here of eight-bit images: the negative of a corner."""
    data = pairs(transforms=StreamTransforms(gen=v2.Lambda(lambda image: 255 - image[:, :16, :16])), image_size=16)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["x_gen"].shape == batch["x_clf"].shape == batch["x_ood"].shape == (10, 3, 16, 16)
    assert [(255 - found) % 5 for found in level(batch["x_gen"])] == batch["y_gen"].tolist()
    assert repr(data.transform("clf")) == repr(pairs(image_size=16).transform("clf"))


def test_streams_have_the_recipes_augmentations() -> None:
    cifar, imagenet = pairs(), pairs(augmentation="imagenet")
    assert "AutoAugment" in repr(cifar.transform("clf"))
    assert "Cutout" in repr(cifar.transform("clf"))
    for stream in ("gen", "ood"):
        assert "AutoAugment" not in repr(cifar.transform(cast(Any, stream)))
        assert "RandomCrop" in repr(cifar.transform(cast(Any, stream)))
    assert "RandomResizedCrop" in repr(imagenet.transform("clf"))
    assert "RandomResizedCrop" in repr(imagenet.transform("ood"))
    assert "RandomResizedCrop" not in repr(imagenet.transform("gen"))
    assert "RandomHorizontalFlip" in repr(imagenet.transform("gen"))
    assert "RandomResizedCrop" in repr(pairs(ood_augmentation="resized_crop").transform("ood"))
    assert "Random" not in repr(cifar.evaluation_transform())


@pytest.mark.parametrize("ood_augmentation", [None, "resized_crop"])
@pytest.mark.parametrize("flips", [False, True])
def test_seeds_of_a_cifar_recipe_have_borders_where_x_gen_has(ood_augmentation: Any, flips: bool) -> None:
    """What is in one of the two alone would tell real images from contrastive ones."""
    transforms = StreamTransforms(gen=v2.Compose([v2.CenterCrop(32), v2.RandomHorizontalFlip()]) if flips else None)
    data = pairs(ood_augmentation=ood_augmentation, transforms=transforms, image_size=32)
    white = Image.new("RGB", (40, 36), "white")
    torch.manual_seed(0)
    for stream in ("gen", "ood"):
        images = torch.stack([data.transform(cast(Any, stream))(white) for _ in range(300)])
        assert images.shape == (300, 3, 32, 32)
        bordered = float((images.amin((1, 2, 3)) < 0.5).float().mean())
        assert bordered == (0 if flips else pytest.approx(1 - 1 / 81, abs=0.03))


def test_evaluation_resizes_before_its_crop_and_the_reference_does_not() -> None:
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3)))
    data = pairs(train=Flat(10), augmentation="imagenet", image_size=16, eval_resize=32)
    # The short side becomes 32, of which the middle half is kept: columns 16 … 48 of 64.
    seen = data.evaluation_transform()(image)[0, 8] * 255
    assert seen[0].item() == pytest.approx(4 * 16.5, abs=4)
    assert seen[-1].item() == pytest.approx(4 * 46.5, abs=4)
    reference = data.reference_data().transform(image)[0, 8] * 255
    assert reference[0].item() == pytest.approx(4 * 1.5, abs=4)
    assert len(cast(Any, data.reference_data().dataset)) == 10


def test_training_and_validation_share_no_image_and_lose_none() -> None:
    data = pairs(validation_size=15)
    train, val = names(data.in_distribution("train")), names(data.in_distribution("val"))
    assert len(val) == 15
    assert sorted(train + val) == sorted(names(Flat(60)))
    assert val == names(pairs(validation_size=15, seed=7).in_distribution("val"))
    assert names(data.in_distribution("test")) == names(Flat(20, offset=60))
    assert val != names(Flat(60))[:15]


def test_without_validation_images_the_test_images_validate() -> None:
    data = pairs()
    assert names(data.in_distribution("val")) == names(Flat(20, offset=60))
    assert len(data.in_distribution("train")) == 60


def test_held_out_seeds_are_no_training_seeds_and_smaller_sets_are_part_of_larger_ones() -> None:
    seeds = {size: names(pairs(max_ood_samples=size).out_of_distribution("train")) for size in (1, 10, 50, None)}
    held_out = names(pairs().out_of_distribution("held_out"))
    assert len(held_out) == 30
    assert len(set(held_out)) == 30
    assert sorted(seeds[None] + held_out) == sorted(names(Flat(100, offset=100)))
    assert [len(chosen) for chosen in seeds.values()] == [1, 10, 50, 70]
    assert seeds[10][:1] == seeds[1]
    assert seeds[50][:10] == seeds[10]
    assert names(pairs(max_ood_samples=10).out_of_distribution("held_out")) == held_out
    other = pairs(max_ood_samples=10, ood_seed=1)
    assert set(names(other.out_of_distribution("train"))) != set(seeds[10])
    assert not set(names(other.out_of_distribution("train"))) & set(held_out)
    assert names(other.out_of_distribution("held_out")) == held_out


def test_held_out_images_of_their_own_leave_all_others_to_training() -> None:
    data = pairs(held_out=Flat(7, offset=220, labelled=False))
    assert names(data.out_of_distribution("held_out")) == names(Flat(7, offset=220))
    assert sorted(names(data.out_of_distribution("train"))) == sorted(names(Flat(100, offset=100)))
    assert level(data.held_out_seeds()(0)[0][None])[0] >= 220


def test_squashed_seeds_come_in_the_order_of_their_source_without_crop_or_flip(tmp_path: Path) -> None:
    """Half of 24 files, of any shape; each as PIL resizes it, again and again."""
    rng = np.random.default_rng(0)
    for k in rng.permutation(24):
        shape = (int(rng.integers(9, 40)), int(rng.integers(9, 40)), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{k:02d}.png")
    chosen = {"ood": ImageFolder(tmp_path), "num_held_out": 12}
    data = pairs(**chosen, seed_transform="squash", seed=3)
    held_out = sorted(names(pairs(**chosen).out_of_distribution("held_out")))
    stream = data.held_out_seeds()
    for k in range(30):
        with Image.open(held_out[k % 12]) as image:
            expected = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
        found, label = stream(k)
        assert label is None
        assert np.array_equal((found * 255).permute(1, 2, 0).numpy(), expected.astype(np.float32))
    # Training is as before, and so is what OOD detection measures.
    for split in ("train", "held_out"):
        assert names(data.out_of_distribution(cast(Any, split))) == names(
            pairs(**chosen).out_of_distribution(cast(Any, split))
        )
    assert repr(data.transform("ood")) == repr(pairs().transform("ood"))
    assert data.seed_settings != pairs().seed_settings


def test_squashed_seeds_of_a_set_of_their_own_or_of_noise_have_the_size_of_evaluation() -> None:
    own = pairs(held_out=Flat(7, offset=220, labelled=False), seed_transform="squash").held_out_seeds()
    assert level(torch.stack([own(k)[0] for k in range(9)])) == [220, 221, 222, 223, 224, 225, 226, 220, 221]
    assert own(0)[0].shape == (3, 8, 8)
    noise = UniformNoise(20, (3, 16, 12))
    made = pairs(ood=noise, num_held_out=5, seed_transform="squash")
    place = sorted(cast(Any, made.out_of_distribution("held_out")).place(k) for k in range(5))[0]
    expected = v2.functional.resize(noise[place], [8, 8], v2.InterpolationMode.BILINEAR, antialias=True)
    assert torch.equal(made.held_out_seeds()(0)[0], expected)


def test_a_corrupt_image_is_replaced_among_squashed_seeds_too() -> None:
    own = Flat(7, offset=220, labelled=False, corrupt=(2,))
    seeds = pairs(held_out=own, seed_transform="squash", max_skipped_share=1.0).held_out_seeds()
    found = level(torch.stack([seeds(k)[0] for k in range(7)]))
    assert found[:2] + found[3:] == [220, 221, 223, 224, 225, 226]
    assert found[2] in range(220, 227)
    assert found[2] != 222


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "list entry 0: an image must be a PIL image or a tensor .*, got ndarray"),
        (torch.zeros(8, 8, 3), r"list entry 0: a tensor must have its channels first, .* shape \(8, 8, 3\)"),
    ],
)
def test_images_that_no_transform_takes_are_named(image: Any, message: str) -> None:
    data = pairs(test=[(image, 0)] * 4)
    with pytest.raises(InputError, match=message):
        next(iter(data.test_dataloader()))


def test_a_file_s_name_is_no_data_set() -> None:
    with pytest.raises(InputError, match="train must be a data set with a length, got str"):
        pairs(train="images.npy")


def test_an_unknown_seed_transform_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seed_transform must be one of \('augment', 'squash'\), got 'crop'"):
        pairs(seed_transform="crop")


def test_noise_can_be_a_seed() -> None:
    batch = next(iter(pairs(ood=UniformNoise(50, (3, 8, 8)), num_held_out=10).train_dataloader()))
    assert batch["x_ood"].shape == (10, 3, 8, 8)
    assert batch["x_ood"].std() > 0.2


def test_stage_1_needs_no_seeds_and_stage_2_says_that_it_does() -> None:
    data = pairs(ood=None, streams=["clf"])
    data.setup("fit")
    assert set(next(iter(data.train_dataloader()))) == {"draw", "x_clf", "y_clf"}
    with pytest.raises(ValueError, match="no out-of-distribution images"):
        pairs(ood=None).setup("fit")


def test_training_images_as_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="are the training images"):
        pairs(ood=Flat(60, labelled=False)).setup("fit")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"validation_size": 60}, r"validation_size must lie in 0 … 59, .*got 60"),
        ({"num_held_out": 100}, r"num_held_out must lie in 1 … 99, .*got 100"),
        ({"num_held_out": 0}, r"got 0"),
        ({"max_ood_samples": 0}, r"max_ood_samples must be a whole number of at least 1, got 0"),
        ({"max_ood_samples": 71}, r"max_ood_samples is 71, but there are only 70 OOD images"),
        ({"augmentation": "mnist"}, r"augmentation must be .*'mnist'"),
        ({"transforms": {"gen": v2.Identity()}}, r"transforms must be of the class StreamTransforms, got {'gen'"),
        ({"ood_augmentation": "flip"}, r"ood_augmentation must be .*'flip'"),
        ({"image_size": 0}, r"image_size must be positive"),
        ({"image_size": 32, "eval_resize": 16}, r"eval_resize at least that, got 32, 16"),
        ({"generated_fraction": 0.5}, r"generated and generated_fraction.*NoneType and 0.5"),
        ({"generated": Flat(5)}, r"generated and generated_fraction.*Flat and 0.0"),
        ({"generated": Flat(5), "generated_fraction": 1.0}, r"Flat and 1.0"),
        ({"train": Flat(0)}, r"train has no images"),
        ({"max_skipped_share": 1.5}, r"max_skipped_share must lie in \[0, 1\], got 1.5"),
    ],
)
def test_a_wrong_argument_is_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs(**kwargs)


def test_a_stream_has_one_of_torchvisions_transforms() -> None:
    with pytest.raises(ValueError, match=r"transforms\.clf must be of the class Transform, got 'flip'"):
        StreamTransforms(clf=cast(Any, "flip"))


def test_a_data_set_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="train must be a data set with a length, got list_iterator"):
        pairs(train=iter([1]))


# Generated images.


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.99])
def test_every_run_of_draws_has_its_share_of_generated_images(fraction: float) -> None:
    def stream(offset: int, labelled: bool = True) -> DrawStream:
        return DrawStream(Flat(50, offset, labelled), pairs().evaluation_transform(), 0, str(offset))

    mixed = MixedStream(stream(0), stream(100), fraction)
    generated = [level(mixed(draw)[0][None])[0] >= 100 for draw in range(400)]
    for length in (10, 16, 100):
        counts = [sum(generated[first : first + length]) for first in range(400 - length)]
        assert max(abs(count - fraction * length) for count in counts) < 1 + 1e-9
    # Either stream is drawn from in order, without gaps.
    real = [mixed(draw) for draw in range(100) if not generated[draw]]
    assert [level(image[None]) for image, _ in real] == [level(stream(0)(n)[0][None]) for n in range(len(real))]


def test_generated_images_reach_the_classifier_alone() -> None:
    data = pairs(generated=Flat(40, offset=210), generated_fraction=0.3, batch_size=20, augmentation="imagenet")
    generated: list[int] = []
    for batch in islice(data.train_dataloader(), 3):
        assert all(value < 60 for value in level(batch["x_gen"]))
        assert all(100 <= value < 200 for value in level(batch["x_ood"]))
        levels = level(batch["x_clf"])
        assert [value % 5 for value in levels] == batch["y_clf"].tolist()
        new = [value for value in levels if value >= 210]
        assert len(new) == 6
        generated += new
    assert len(set(generated)) == 18


# Corrupt images.


def test_a_corrupt_image_is_replaced_by_a_readable_one_that_the_draw_decides() -> None:
    whole = DrawStream(Flat(20), pairs().evaluation_transform(), 3, "gen")
    holed = DrawStream(Flat(20, corrupt=(4, 9)), pairs().evaluation_transform(), 3, "gen")
    again = DrawStream(Flat(20, corrupt=(4, 9)), pairs().evaluation_transform(), 3, "gen")
    for draw in range(60):
        index = whole.index(draw)
        image = holed(draw)[0]
        if index not in (4, 9):
            assert torch.equal(image, whole(draw)[0])
        else:
            assert level(image[None])[0] not in (4, 9)
    for draw in reversed(range(60)):
        assert torch.equal(again(draw)[0], holed(draw)[0])
    assert holed.images.num_loaded == 120
    # Each comes once in each of six passes, and may be drawn as the replacement of the other.
    assert holed.images.num_skipped >= 12


def test_a_source_of_which_nothing_is_readable_ends_with_the_last_reason() -> None:
    stream = DrawStream(Flat(20, corrupt=tuple(range(20))), pairs().evaluation_transform(), 0, "ood")
    with pytest.raises(ValueError, match=r"images of the 'ood' stream cannot be read: 100 in a row.*flat/\d+\.png"):
        stream(0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skipped_images_are_logged_once_with_their_path(num_workers: int, tmp_path: Path) -> None:
    data = pairs(train=Flat(30, corrupt=(7,)), streams=["gen"], num_workers=num_workers)
    # A file, which loader processes share.
    handler = logging.FileHandler(tmp_path / "log", delay=True)
    logging.getLogger("dat_lightning").addHandler(handler)
    loader = data.train_dataloader()
    try:
        for _ in range(2):
            for batch in loader:
                assert set(batch) == {"draw", "x_gen", "y_gen"}
                assert batch["x_gen"].shape == (10, 3, 8, 8)
    finally:
        logging.getLogger("dat_lightning").removeHandler(handler)
        handler.close()
    assert (tmp_path / "log").read_text().splitlines() == [
        "skipped an image (1 different ones so far): flat/7.png is not a readable image: made so"
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_corrupt_images_stop_the_run(num_workers: int) -> None:
    kwargs: dict[str, Any] = {"train": Flat(60, corrupt=tuple(range(0, 60, 3))), "num_workers": num_workers}
    message = r"6 images could not be read, and \d+ could, more than data.max_skipped_share 0.005 allows.*flat/"
    with pytest.raises(InputError, match=message):
        list(pairs(streams=["gen"], max_skipped_share=0.005, **kwargs).train_dataloader())
    assert len(list(pairs(streams=["gen"], max_skipped_share=1.0, **kwargs).train_dataloader())) == 6
    tested = pairs(test=Flat(60, corrupt=tuple(range(0, 60, 3))), max_skipped_share=0.005, num_workers=num_workers)
    with pytest.raises(InputError, match=message):
        list(tested.test_dataloader())


def test_evaluation_leaves_corrupt_images_out_and_keeps_the_others_indices() -> None:
    data = pairs(test=Flat(20, offset=60, corrupt=(3, 8)), eval_batch_size=5)
    batches = list(data.test_dataloader())
    assert all(set(batch) == {"x", "y", "index"} for batch in batches)
    indices = torch.cat([batch["index"] for batch in batches]).tolist()
    assert indices == [i for i in range(20) if i not in (3, 8)]
    assert level(torch.cat([batch["x"] for batch in batches])) == [60 + i for i in indices]
    assert torch.cat([batch["y"] for batch in batches]).tolist() == [i % 5 for i in indices]


def test_an_evaluation_batch_without_a_readable_image_is_an_error() -> None:
    batches = EvaluationBatches(Flat(4, corrupt=(0, 1, 2, 3)), pairs().evaluation_transform())
    with pytest.raises(ValueError, match=r"no image of an evaluation batch can be read: flat/3\.png"):
        batches[range(4)]


def test_a_held_out_seed_that_is_corrupt_is_counted() -> None:
    data = pairs(held_out=Flat(5, offset=220, labelled=False, corrupt=(2,)), augmentation="imagenet")
    seeds = data.held_out_seeds()
    assert all(level(seeds(i)[0][None])[0] >= 220 for i in range(5))
    assert (seeds.images.num_skipped, seeds.images.num_loaded) == (1, 5)


def test_images_of_several_sizes_that_the_transform_leaves_are_named() -> None:
    stream = DrawStream(Flat(5), lambda image: torch.rand(1, 2, 2 + int(torch.randint(3, ()))), 0, "gen")
    with pytest.raises(ValueError, match=r"images of the 'gen' stream have several shapes, \(1, 2, 2\) and"):
        PairedDraws({"gen": stream})[range(20)]


def test_a_slice_refuses_places_outside_its_data_set() -> None:
    with pytest.raises(ValueError, match="places 3 … 61 are outside a data set of 60 images"):
        RandomSlice(Flat(60), 3, 61, (0,))
    with pytest.raises(IndexError):
        RandomSlice(Flat(60), 3, 5, (0,))[2]


class Grey(Flat):
    """Small images, of any number."""

    def __getitem__(self, index: int) -> Any:
        if index in self.corrupt:
            raise CorruptImageError(self.name(index), "made so")
        return Image.new("RGB", (2, 2))


class Large(Flat):
    """Many images, each with a colour of its own."""

    def __getitem__(self, index: int) -> Any:
        number = self.offset + index
        image = Image.new("RGB", (2, 2), (number % 256, number // 256 % 256, number // 65536))
        return (image, index % 5) if self.labelled else image


@pytest.mark.parametrize("validation_size", [0, 1000])
def test_training_images_as_seeds_are_refused_however_many_there_are(validation_size: int) -> None:
    train = Large(30_000)
    data = pairs(train=train, ood=Unlabelled(train), validation_size=validation_size)
    with pytest.raises(ValueError, match=r"are the training images: (100|9\d)%"):
        data.setup("fit")
    pairs(train=train, ood=Large(30_000, offset=50_000, labelled=False)).setup("fit")


def test_training_and_test_folders_must_number_the_same_classes(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", 3, 2, (32, 32), seed=0)
    write_folders(tmp_path / "test", 3, 2, (32, 32), seed=1)
    folders = {name: LabelledFolder(tmp_path / name) for name in ("train", "test")}
    assert pairs(**folders).num_classes == 3
    (tmp_path / "test" / "class0").rename(tmp_path / "test" / "class9")
    with pytest.raises(ValueError, match=r"train has 3 classes and test 3, .*2 are in one of them.*'class0', 'class9'"):
        pairs(train=folders["train"], test=LabelledFolder(tmp_path / "test"))
    chosen = LabelledFolder(tmp_path / "train", classes=["class1", "class2"])
    pairs(train=chosen, test=LabelledFolder(tmp_path / "test", classes=["class1", "class2"]))


def test_corrupt_seeds_are_a_share_of_the_seeds_that_were_drawn() -> None:
    """0.2 % of the seeds are corrupt, 1 % may be: any number of samples can be drawn."""
    seeds = pairs(held_out=Flat(1000, labelled=False, corrupt=(3, 700)), max_skipped_share=0.01, image_size=2)
    seeds.held_out_images = Grey(1000, labelled=False, corrupt=(3, 700))
    stream = seeds.held_out_seeds()
    for i in range(6000):
        stream(i)
    assert (stream.images.num_skipped, stream.images.num_loaded) == (12, 6000)
