"""Digits of which some are rare: classes, or styles within each class, in known shares."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import RandomPermutation
from dat_lightning.data.digits import DigitsDataModule, digits, load_images, split_indices
from dat_lightning.data.entries import SizedDataset
from dat_lightning.data.paired import Split


class RareDigitsDataModule(DigitsDataModule):
    """Digits whose training images are kept in full of one group, and in small shares of the others.

    | ``rare_by`` | groups |
    |---|---|
    | ``class`` | classes, by (label + seed) modulo the number of groups |
    | ``ink`` | parts of each class of equal size, by the sum of an image's pixels: thin, medium and bold strokes |

    Which group is the common one goes round with ``seed``, so that over as many seeds as there are groups each image
    is common once and rare as often as any other. Of each class and group the share is kept that ``shares`` says,
    rounded, at least one image; which images that are is a function of the seed. Validation, test and reference images
    are all the digits, as :class:`DigitsDataModule` has them.

    Args:
        rare_by: What makes an image rare.
        shares: Share of each group that is kept, the most common first; one number for each group.
        shared: The arguments of :class:`DigitsDataModule`.

    Raises:
        InputError: If there are fewer than two groups, a share is outside (0, 1], they do not fall, or do so beyond the
            sixth digit alone, which names of figures do not show.
    """

    def __init__(
        self, rare_by: Literal["class", "ink"] = "class", shares: Sequence[float] = (1.0, 0.1, 0.01), **shared: Any
    ) -> None:
        super().__init__(**shared)
        if rare_by not in ("class", "ink"):
            raise InputError(f"rare_by must be 'class' or 'ink', got {rare_by!r}")
        falling = all(a > b for a, b in pairwise(shares))
        if len(shares) < 2 or not all(0 < share <= 1 for share in shares) or not falling:
            raise InputError(f"shares must be two or more falling numbers in (0, 1], got {list(shares)}")
        self.rare_by = rare_by
        self.shares = tuple(shares)
        if len(set(self.group_names)) < len(shares):
            raise InputError(f"shares must differ in six digits, by which their figures are named, got {list(shares)}")

    def in_distribution(self, split: Split) -> SizedDataset:
        """Returns a split of the digits; of training images the share that is kept."""
        if split != "train":
            return super().in_distribution(split)
        places = split_indices(self.validation_size)["train"]
        images, labels = (part[torch.as_tensor(places)] for part in load_images())
        groups = self.groups(images, labels)
        kept = []
        for label in range(10):
            for group, share in enumerate(self.shares):
                found = np.flatnonzero(((labels == label) & (groups == group)).numpy())
                if len(found):
                    order = RandomPermutation(len(found), self.seed, "rare digits", label, group)
                    kept += [found[order[k]] for k in range(max(1, round(share * len(found))))]
        return digits(places[np.sort(kept)])

    # What evaluators of densities ask for.

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups, the most common one first."""
        return tuple(f"share_{share:g}" for share in self.shares)

    def groups(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the group of each image (N, 1, 16, 16) with its label, (N,)."""
        count = len(self.shares)
        if self.rare_by == "class":
            return (y + self.seed) % count
        ink, ends = x.flatten(1).double().sum(1), self._ink_levels
        return ((ink.unsqueeze(1) > ends.to(ink)[y]).sum(1) + self.seed) % count

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log of the share that is kept of each image's group, (N,), float64: log p but for what is equal."""
        return torch.tensor(self.shares, dtype=torch.float64).log()[self.groups(x, y).cpu()]

    @cached_property
    def _ink_levels(self) -> Tensor:
        """The sums of pixels that cut each class of the training images into parts of equal size, (10, groups − 1)."""
        places = torch.as_tensor(split_indices(self.validation_size)["train"])
        images, labels = (part[places] for part in load_images())
        inner = torch.arange(1, len(self.shares), dtype=torch.float64) / len(self.shares)
        return torch.stack([images[labels == label].double().sum((1, 2, 3)).quantile(inner) for label in range(10)])
