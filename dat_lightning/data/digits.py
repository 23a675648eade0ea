"""scikit-learn's handwritten digits, with seeds from its two photographs: real data that come with the installation."""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from dat_lightning.core.errors import InputError, require_counts
from dat_lightning.data.draws import EvaluationBatches, Transform
from dat_lightning.data.entries import SizedDataset
from dat_lightning.data.ood import PhotographCrops, UniformNoise
from dat_lightning.data.paired import OODSplit, PairedDataModule, Split, Stream

IMAGE_SIZE = 16
NUM_TEST = 360


@lru_cache(maxsize=1)
def load_images() -> tuple[Tensor, Tensor]:
    """Returns the 1 797 digits as images (N, 1, 16, 16) in [0, 1], and labels (N,)."""
    # Importing scikit-learn takes seconds.
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    return images.clamp(0, 1), torch.from_numpy(data.target).long()


@lru_cache(maxsize=8)
def split_indices(validation_size: int) -> dict[Split, np.ndarray]:
    """Returns the places of each split: 360 fixed test images, and the other 1 437 less ``validation_size``."""
    from sklearn.model_selection import train_test_split

    labels = load_images()[1].numpy()
    train, test = train_test_split(np.arange(len(labels)), test_size=NUM_TEST, stratify=labels, random_state=0)
    validation = train[:0]
    if validation_size:
        train, validation = train_test_split(train, test_size=validation_size, stratify=labels[train], random_state=0)
    return {"train": train, "val": validation, "test": test}


def digits(indices: np.ndarray) -> TensorDataset:
    """Returns the digits at some places of scikit-learn's order: images (1, 16, 16) in [0, 1] with their labels."""
    images, labels = load_images()
    return TensorDataset(images[torch.as_tensor(indices)], labels[torch.as_tensor(indices)])


@lru_cache(maxsize=4)
def photograph_crops(size: int, part: OODSplit) -> TensorDataset:
    """Returns the crops that seeds are, in memory."""
    crops = PhotographCrops(size, part, IMAGE_SIZE)
    return TensorDataset(torch.stack([crops[i] for i in range(size)]))


class DigitsDataModule(PairedDataModule):
    """Digits as in-distribution data, and crops of photographs as seeds; nothing is downloaded.

    The split is fixed: 1 437 images to train and validate with, 360 to test. Strong augmentation, for ``x_clf``, shifts
    by up to ``max_shift_clf`` pixels each way; weak augmentation, for ``x_gen``, by up to ``max_shift_gen``; seeds are
    flipped.

    Args:
        batch_size: Global batch size in training.
        validation_size: How many of the 1 437 are kept from training for validation, 10 at least.
        ood: Where seeds come from: crops of photographs, uniform noise, or nowhere, which leaves Stage 1.
        num_ood: Number of different OOD images in training.
        num_held_out: Number of different seeds for generation, from other parts of the photographs.
        max_shift_clf: Largest shift of ``x_clf``, in pixels of 16.
        max_shift_gen: Largest shift of ``x_gen``.
        shared: The other arguments of :class:`PairedDataModule`.

    Raises:
        InputError: If a number is outside its range or ``ood`` is unknown.
    """

    def __init__(
        self,
        batch_size: int = 64,
        validation_size: int = 144,
        ood: Literal["photographs", "noise", "none"] = "photographs",
        num_ood: int = 4000,
        num_held_out: int = 1000,
        max_shift_clf: int = 1,
        max_shift_gen: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **shared)
        if not 10 <= validation_size <= 1000:
            raise InputError(f"validation_size must lie in 10 … 1000, got {validation_size}")
        if ood not in ("photographs", "noise", "none"):
            raise InputError(f"ood must be 'photographs', 'noise' or 'none', got {ood!r}")
        require_counts(1, num_ood=num_ood, num_held_out=num_held_out)
        if not (0 <= max_shift_clf < IMAGE_SIZE and 0 <= max_shift_gen < IMAGE_SIZE):
            raise InputError(f"shifts must lie in 0 … {IMAGE_SIZE - 1}, got {max_shift_clf} and {max_shift_gen}")
        self.validation_size = validation_size
        self.ood = ood
        self.num_ood = num_ood
        self.num_held_out = num_held_out
        self.max_shift_clf = max_shift_clf
        self.max_shift_gen = max_shift_gen

    def in_distribution(self, split: Split) -> SizedDataset:
        """Returns a split of the digits."""
        return digits(split_indices(self.validation_size)[split])

    def out_of_distribution(self, split: OODSplit) -> SizedDataset | None:
        """Returns crops or noise; held-out crops come from other parts of the photographs, held-out noise is other."""
        size = self.num_ood if split == "train" else self.num_held_out
        if self.ood == "photographs":
            return photograph_crops(size, split)
        if self.ood == "noise":
            return UniformNoise(size, (1, IMAGE_SIZE, IMAGE_SIZE), seed=0 if split == "train" else 1)
        return None

    def transform(self, stream: Stream) -> Transform:
        """Returns shifts for ``gen`` and ``clf``, flips for ``ood``."""
        if stream == "ood":
            return _typed(v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]))
        shift = self.max_shift_clf if stream == "clf" else self.max_shift_gen
        return _typed(v2.RandomCrop(IMAGE_SIZE, padding=shift) if shift else v2.Identity())

    def evaluation_transform(self) -> Transform:
        """Returns images as they are."""
        return _typed(v2.Identity())

    def seed_transform(self) -> Transform:
        """Returns seeds as they are."""
        return _typed(v2.Identity())

    def reference_data(self) -> EvaluationBatches:
        """Returns the 1 437 images that are not for testing."""
        splits = split_indices(self.validation_size)
        both = np.sort(np.concatenate([splits["train"], splits["val"]]))
        return EvaluationBatches(digits(both), self.evaluation_transform())


def _typed(transform: Transform) -> Transform:
    """A torchvision transform, which has no type, as what it is."""
    return transform
