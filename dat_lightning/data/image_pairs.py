"""The DataModule of the CIFAR and ImageNet recipes: any labelled images, any seeds, the method's augmentations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torchvision.transforms import v2

from dat_lightning.core.errors import InputError, require_counts, require_kind
from dat_lightning.core.random_streams import RandomPermutation
from dat_lightning.data import transforms as augmentations
from dat_lightning.data.draws import DrawSource, EvaluationBatches, Transform
from dat_lightning.data.entries import SizedDataset
from dat_lightning.data.images import ImageSubset, ImageView
from dat_lightning.data.mixing import MixedStream
from dat_lightning.data.paired import OODSplit, PairedDataModule, Split, Stream


class RandomSlice(ImageView):
    """Places ``start`` … ``stop``−1 of a data set in a random order that is a function of the seed.

    Slices of one order that do not overlap share no image, and of two that begin alike the shorter is part of the
    longer. No index list is kept, so a slice of 79 million images costs nothing.

    Args:
        dataset: Any data set; names of images are passed on.
        start: First place.
        stop: Place after the last.
        seed: Parts that name the order.

    Raises:
        InputError: If the places do not lie in the data set.
    """

    def __init__(self, dataset: SizedDataset, start: int, stop: int, seed: Sequence[int | str]) -> None:
        if not 0 <= start <= stop <= len(dataset):
            raise InputError(f"places {start} … {stop} are outside a data set of {len(dataset)} images")
        super().__init__(dataset)
        self.start = start
        self.stop = stop
        self._order = RandomPermutation(len(dataset), *seed)

    def __len__(self) -> int:
        return self.stop - self.start

    def place(self, index: int) -> int:
        """Returns where in the whole data set an entry is."""
        return self._order[self.start + super().place(index)]

    def in_order(self) -> ImageSubset:
        """Returns the same entries in the order of the whole data set; keeps a number for each."""
        return ImageSubset(self.dataset, np.sort([self.place(index) for index in range(len(self))]))


@dataclass(frozen=True)
class StreamTransforms:
    """Transforms of torchvision's v2 in the place of a recipe's augmentations; ``None`` is the recipe's.

    Each takes uint8 tensors (C, H, W) of the data set's own size to such of ``image_size``. Each of several
    configurations on top of one another may name some streams: the others stay as they are below.

    Attributes:
        gen: Of ``x_gen``.
        clf: Of ``x_clf``. Where it differs from gen's, Stage 2 can learn which stream a real image is of.
        ood: Of ``x_ood``; with the recipe ``cifar`` it is gen's, so that nothing but the images tells them apart.

    Raises:
        InputError: If one is no such transform.
    """

    gen: v2.Transform | None = None
    clf: v2.Transform | None = None
    ood: v2.Transform | None = None

    def __post_init__(self) -> None:
        given = {f"transforms.{name}": transform for name, transform in vars(self).items() if transform is not None}
        require_kind(v2.Transform, **given)


class ImageDataModule(PairedDataModule):
    """Labelled images and OOD seeds of any source, with the augmentations of the CIFAR or the ImageNet recipes.

    | batch key | ``cifar`` | ``imagenet`` |
    |---|---|---|
    | ``x_gen`` | crop after padding by 4, flip | resize, centre crop, flip |
    | ``x_clf`` | the same, AutoAugment, Cutout of 16 pixels | random resized crop, flip |
    | ``x_ood`` | as ``x_gen`` | random resized crop, flip |

    Validation images and held-out seeds are set aside by a fixed seed, not by ``seed``: runs stay comparable.

    Args:
        train: Labelled training images, such as :class:`~dat_lightning.data.CIFARImages` or
            :class:`~dat_lightning.data.LabelledFolder`.
        test: Labelled test images.
        ood: OOD images, such as :class:`~dat_lightning.data.TinyImages`, :class:`~dat_lightning.data.ImageFolder`,
            :class:`~dat_lightning.data.Unlabelled` or :class:`~dat_lightning.data.UniformNoise`; Stage 1 needs none.
        held_out: OOD images for generation; by default ``num_held_out`` of ``ood``, which training then does without.
        num_held_out: How many those are.
        max_ood_samples: Use only so many of the OOD images in training; smaller choices are part of larger ones.
        ood_seed: Seed of that choice; held-out seeds do not depend on it.
        validation_size: How many training images are kept for validation; 0 trains on all and validates on ``test``.
        generated: Labelled generated images that are mixed into ``x_clf``, such as
            :class:`~dat_lightning.data.GeneratedImages`.
        generated_fraction: Their share of each batch.
        augmentation: The recipe, see above.
        ood_augmentation: ``crop`` or ``resized_crop``, where it differs from the recipe's: crops of photographs as
            seeds of 32×32 pixels need the latter. With the recipe ``cifar`` they are augmented as ``x_gen`` after it.
        transforms: What streams have in place of the recipe's augmentations.
        image_size: Height and width that the network sees.
        eval_resize: Short side to which evaluation resizes before its centre crop; by default ``image_size``.
        shared: The arguments of :class:`PairedDataModule`.

    Raises:
        InputError: If a number does not fit the data, or two arguments do not go together.

    Source: DAT (arXiv 2510.13872), on its data; Cubuk et al. 2019 (arXiv 1805.09501); DeVries & Taylor 2017
        (arXiv 1708.04552); Wang et al. 2023 (arXiv 2302.04638).
    """

    def __init__(
        self,
        train: SizedDataset,
        test: SizedDataset,
        ood: SizedDataset | None = None,
        held_out: SizedDataset | None = None,
        num_held_out: int = 10_000,
        max_ood_samples: int | None = None,
        ood_seed: int = 0,
        validation_size: int = 0,
        generated: SizedDataset | None = None,
        generated_fraction: float = 0.0,
        augmentation: Literal["cifar", "imagenet"] = "cifar",
        ood_augmentation: Literal["crop", "resized_crop"] | None = None,
        transforms: StreamTransforms = StreamTransforms(),
        image_size: int = 32,
        eval_resize: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.train_images = _sized(train, "train")
        self.test_images = _sized(test, "test")
        self.generated = None if generated is None else _sized(generated, "generated")
        if augmentation not in ("cifar", "imagenet"):
            raise InputError(f"augmentation must be 'cifar' or 'imagenet', got {augmentation!r}")
        if ood_augmentation not in (None, "crop", "resized_crop"):
            raise InputError(f"ood_augmentation must be 'crop' or 'resized_crop', got {ood_augmentation!r}")
        if image_size < 1 or (eval_resize is not None and eval_resize < image_size):
            raise InputError(
                f"image_size must be positive and eval_resize at least that, got {image_size}, {eval_resize}"
            )
        if not 0 <= validation_size < len(self.train_images):
            raise InputError(
                f"validation_size must lie in 0 … {len(self.train_images) - 1}, the number of training images less one,"
                f" got {validation_size}"
            )
        if not 0 <= generated_fraction < 1 or (generated_fraction > 0) != (generated is not None):
            raise InputError(
                "generated and generated_fraction, in (0, 1), go together; got"
                f" {type(generated).__name__} and {generated_fraction}"
            )
        _check_classes(self.train_images, self.test_images)
        self.generated_fraction = generated_fraction
        self.validation_size = validation_size
        self.augmentation = augmentation
        require_kind(StreamTransforms, transforms=transforms)
        self.transforms = transforms
        self.ood_augmentation = ood_augmentation or ("crop" if augmentation == "cifar" else "resized_crop")
        self.image_size = image_size
        self.eval_resize = eval_resize
        self.seeds, self.held_out_images = _split_seeds(ood, held_out, num_held_out, max_ood_samples, ood_seed)

    @property
    def num_classes(self) -> int | None:
        """Largest label of all labelled images, generated ones among them, plus one; ``None`` if one has none."""
        sets = [self.train_images, self.test_images, *([] if self.generated is None else [self.generated])]
        labels: list[Any] = [getattr(dataset, "labels", None) for dataset in sets]
        return None if any(values is None for values in labels) else 1 + max(int(np.max(values)) for values in labels)

    def in_distribution(self, split: Split) -> SizedDataset:
        """Returns a split of the labelled images."""
        if split == "test" or (split == "val" and self.validation_size == 0):
            return self.test_images
        if self.validation_size == 0:
            return self.train_images
        start, stop = (0, self.validation_size) if split == "val" else (self.validation_size, len(self.train_images))
        return RandomSlice(self.train_images, start, stop, (0, "validation split"))

    def out_of_distribution(self, split: OODSplit) -> SizedDataset | None:
        """Returns the seeds of training or of generation."""
        return self.seeds if split == "train" else self.held_out_images

    def stored_seeds(self) -> SizedDataset:
        """Returns the held-out images in the order of their source."""
        images = self._require_ood("held_out")
        return images.in_order() if isinstance(images, RandomSlice) else images

    def transform(self, stream: Stream) -> Transform:
        """Returns the augmentation of a stream: the one that is given, or the recipe's."""
        own = getattr(self.transforms, stream)
        if own is not None:
            return augmentations.eight_bit(own)
        resized = self.ood_augmentation == "resized_crop"
        if stream == "ood" and self.augmentation == "cifar":
            return augmentations.cifar_seeds(self.image_size, resized_crop=resized, gen=self.transforms.gen)
        if stream == "ood":
            return (
                augmentations.imagenet_strong(self.image_size) if resized else augmentations.cifar_weak(self.image_size)
            )
        if self.augmentation == "cifar":
            strong = stream == "clf"
            return augmentations.cifar_strong(self.image_size) if strong else augmentations.cifar_weak(self.image_size)
        return (augmentations.imagenet_strong if stream == "clf" else augmentations.imagenet_weak)(self.image_size)

    def evaluation_transform(self) -> Transform:
        """Returns a resize to ``eval_resize`` and a centre crop."""
        return augmentations.evaluation_resize(self.image_size, self.eval_resize)

    def reference_data(self) -> EvaluationBatches:
        """Returns all training images, validation images among them, resized by PIL to ``image_size``."""
        return EvaluationBatches(self.train_images, augmentations.evaluation_resize(self.image_size))

    def training_stream(self, name: Stream) -> DrawSource:
        """Returns the endless draws of a stream; ``clf`` with its share of generated images."""
        real = super().training_stream(name)
        if name != "clf" or self.generated is None:
            return real
        generated = self._draws(self.generated, self.transform("clf"), "generated")
        return MixedStream(real, generated, self.generated_fraction)


def _sized(dataset: Any, argument: str) -> SizedDataset:
    """A data set that knows its length, and is not empty."""
    if isinstance(dataset, str) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputError(f"{argument} must be a data set with a length, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise InputError(f"{argument} has no images")
    sized: SizedDataset = dataset
    return sized


def _check_classes(train: SizedDataset, test: SizedDataset) -> None:
    """Raises an error unless training and test images number the same classes alike."""
    ours, theirs = (getattr(dataset, "classes", None) for dataset in (train, test))
    if ours is None or theirs is None or list(ours) == list(theirs):
        return
    alone = sorted(set(ours) ^ set(theirs))
    raise InputError(
        f"train has {len(ours)} classes and test {len(theirs)}, and their labels would not mean the same;"
        f" {len(alone)} are in one of them alone, such as {', '.join(map(repr, alone[:3]))}. LabelledFolder's argument"
        " classes chooses and orders them"
    )


def _split_seeds(
    ood: Any, held_out: Any, num_held_out: int, max_samples: int | None, seed: int
) -> tuple[SizedDataset | None, SizedDataset | None]:
    """OOD images for training and for generation, without overlap."""
    if max_samples is not None:
        require_counts(1, max_ood_samples=max_samples)
    if ood is None:
        return None, None if held_out is None else _sized(held_out, "held_out")
    images, order = _sized(ood, "ood"), (0, "OOD split")
    if held_out is not None:
        start, seeds = 0, _sized(held_out, "held_out")
    elif 0 < num_held_out < len(images):
        start, seeds = num_held_out, RandomSlice(images, 0, num_held_out, order)
    else:
        raise InputError(
            f"num_held_out must lie in 1 … {len(images) - 1}, so that the {len(images)} OOD images give seeds for both"
            f" training and generation, got {num_held_out}; or give held_out other images"
        )
    training = RandomSlice(images, start, len(images), order)
    if max_samples is None:
        return training, seeds
    if max_samples > len(training):
        raise InputError(f"max_ood_samples is {max_samples}, but there are only {len(training)} OOD images to train on")
    return RandomSlice(training, 0, max_samples, (seed, "OOD choice")), seeds
