"""Entries of data sets: an image, alone or with a label, that may turn out to be corrupt."""

import logging
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import CorruptImageError

logger = logging.getLogger(__name__)

# Loaded images below which a share means little: two bad files among the first ten are no two in ten.
_MIN_LOADED = 1000


class SizedDataset(Protocol):
    """A map-style data set that knows its length; an entry is an image or an (image, label) pair."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def image_of(entry: Any) -> Any:
    """Returns the image of an entry that is one, or a tuple or list that begins with one."""
    return entry[0] if isinstance(entry, tuple | list) else entry


def _raw_image(entry: Any) -> Any:
    image = image_of(entry)
    if not isinstance(image, Image | Tensor):
        raise InputError(f"an image must be a PIL image or a tensor (C, H, W), got {type(image).__name__}")
    if isinstance(image, Tensor) and image.dim() == 3 and image.shape[2] in (1, 3) and image.shape[0] > 3:
        raise InputError(f"a tensor must have its channels first, (C, H, W), got the shape {tuple(image.shape)}")
    return image


def label_of(entry: Any) -> int | None:
    """Returns the class index of an entry, ``None`` if it has no label.

    Raises:
        InputError: If the label is no integer.
    """
    label = entry[1] if isinstance(entry, tuple | list) and len(entry) > 1 else None
    if label is None or type(label) is int:
        return label
    value = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
    if value.size != 1 or value.dtype.kind not in "biuf" or value.item() % 1 != 0:
        shown = f"{value.dtype} of shape {value.shape}" if value.size != 1 else repr(value.item())
        raise InputError(f"a label must be the index of a class, an integer, got {shown}")
    return int(value.item())


def image_name(dataset: SizedDataset, index: int) -> str:
    """Returns where an image comes from: what the data set's ``name`` says, or else its type and the index."""
    name = getattr(dataset, "name", None)
    return str(name(index)) if callable(name) else f"{type(dataset).__name__} entry {index}"


class ReadableImages:
    """A data set whose corrupt images are left out: the one place that knows what to do about them.

    Each is logged once, with its path, and too many are an error. Each process counts what it reads itself: loader
    processes share no memory, and each has its part of all images.

    Args:
        dataset: Raises :class:`~dat_lightning.data.CorruptImageError` where an image cannot be read.
        max_skipped_share: Largest share of loaded images that may be corrupt, in [0, 1]; by default any.

    Attributes:
        num_loaded: Images read so far.
        num_skipped: Corrupt ones so far, each counted every time.
        last: Why the last of these cannot be read.

    Raises:
        InputError: If the share is outside [0, 1].
    """

    def __init__(self, dataset: SizedDataset, max_skipped_share: float = 1.0) -> None:
        check_share(max_skipped_share)
        self.dataset = dataset
        self.max_skipped_share = max_skipped_share
        self.num_loaded = 0
        self.num_skipped = 0
        self.last = ""
        self._known: set[str] = set()

    def read(self, index: int) -> Any | None:
        """Returns entry ``index``, or ``None`` if its image is corrupt.

        Raises:
            InputError: If more than the allowed share was corrupt, which counts from a thousand loaded images on.
        """
        try:
            entry = self.dataset[index]
        except CorruptImageError as error:
            self._skip(str(error))
            return None
        self.num_loaded += 1
        # Here, so that of images that all fail whoever reads can say more than a share.
        if self.num_skipped > self.max_skipped_share * max(self.num_loaded, _MIN_LOADED):
            raise InputError(
                f"{self.num_skipped} images could not be read, and {self.num_loaded} could, more than"
                f" data.max_skipped_share {self.max_skipped_share:g} allows; the last one: {self.last}"
            )
        return entry

    def transformed(self, index: int, entry: Any, transform: Any) -> tuple[Tensor, int | None]:
        """Returns image and label of entry ``index`` as a network takes them.

        Raises:
            InputError: With the image's name, if it is neither a PIL image nor a tensor of channels first, the
                transform refuses it, or its label is no integer.
        """
        try:
            return transform(_raw_image(entry)), label_of(entry)
        except InputError as error:
            raise InputError(f"{image_name(self.dataset, index)}: {error}") from error

    def _skip(self, reason: str) -> None:
        self.num_skipped += 1
        self.last = reason
        if reason not in self._known:
            self._known.add(reason)
            logger.warning("skipped an image (%d different ones so far): %s", len(self._known), reason)


def check_share(max_skipped_share: float) -> None:
    """Raises an InputError unless a share of corrupt images lies in [0, 1]."""
    if not 0 <= max_skipped_share <= 1:
        raise InputError(f"max_skipped_share must lie in [0, 1], got {max_skipped_share}")
