"""Test images that neither two nor four processes can share evenly."""

from typing import Any

from torch.utils.data import Subset

from dat_lightning import DigitsDataModule
from dat_lightning.data import SizedDataset
from dat_lightning.data.paired import Split

NUM_TEST = 359


class UnevenDigits(DigitsDataModule):
    """The digits with so many test images."""

    num_test = NUM_TEST

    def in_distribution(self, split: Split) -> SizedDataset:
        dataset: Any = super().in_distribution(split)
        return Subset(dataset, range(self.num_test)) if split == "test" else dataset


def uneven_digits() -> UnevenDigits:
    # In batches of 60 and 61 on one process: no rank's share is a multiple of that.
    return UnevenDigits(batch_size=32, validation_size=20, num_ood=200, num_held_out=50, eval_batch_size=61)
