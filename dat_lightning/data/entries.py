"""Entries of data sets: an image, alone or with a label, that may turn out to be corrupt."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import CorruptImageError


class SizedDataset(Protocol):
    """A map-style data set that knows its length; an entry is an image or an (image, label) pair."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def image_of(entry: Any) -> Any:
    """Returns the image of an entry that is one, or a tuple or list that begins with one."""
    return entry[0] if isinstance(entry, tuple | list) else entry


def label_of(entry: Any) -> int | None:
    """Returns the class index of an entry, ``None`` if it has no label.

    Raises:
        InputError: If the label is no integer.
    """
    label = entry[1] if isinstance(entry, tuple | list) and len(entry) > 1 else None
    if label is None or type(label) is int:
        return label
    value = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
    if value.size != 1 or value.dtype.kind not in "biuf" or value.item() != np.floor(value.item()):
        shown = f"{value.dtype} of shape {value.shape}" if value.size != 1 else repr(value.item())
        raise InputError(f"a label must be the index of a class, an integer, got {shown}")
    return int(value.item())


def image_name(dataset: SizedDataset, index: int) -> str:
    """Returns where an image comes from: what the data set's ``name`` says, or else its type and the index."""
    name = getattr(dataset, "name", None)
    return str(name(index)) if callable(name) else f"{type(dataset).__name__} entry {index}"


class ReadableImages:
    """A data set whose corrupt images are left out: the one place that knows what to do about them.

    Whoever reads asks for the messages and hands them on to a :class:`~dat_lightning.data.skipped.SkippedImages`, also
    from loader processes, whose own counts nobody would see.

    Args:
        dataset: Raises :class:`~dat_lightning.data.CorruptImageError` where an image cannot be read.
    """

    def __init__(self, dataset: SizedDataset) -> None:
        self.dataset = dataset
        self._skipped: list[str] = []

    def read(self, index: int) -> Any | None:
        """Returns entry ``index``, or ``None`` if its image is corrupt, which is noted."""
        try:
            return self.dataset[index]
        except CorruptImageError as error:
            self._skipped.append(str(error))
            return None

    def transformed(self, index: int, entry: Any, transform: Any) -> tuple[Tensor, int | None]:
        """Returns image and label of entry ``index`` as a network takes them.

        Raises:
            InputError: With the image's name, if the transform refuses it, or its label is no integer.
        """
        try:
            return transform(image_of(entry)), label_of(entry)
        except InputError as error:
            raise InputError(f"{image_name(self.dataset, index)}: {error}") from error

    def take_skipped(self) -> list[str]:
        """Returns why images were skipped since the last call, a message each."""
        taken, self._skipped = self._skipped, []
        return taken
