"""Images in NumPy arrays: ``.npy`` files of any size, read one image at a time."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dat_lightning.core.errors import InputError
from dat_lightning.data.images import RecordFile, check_index
from dat_lightning.data.pixels import CorruptImageError

_CHANNELS = {1: "L", 3: "RGB"}


class ArrayImages(Dataset[Image.Image | tuple[Image.Image, int]]):
    """The images in a ``.npy`` file, uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W), such as ``300K_random_images.npy``.

    The file is never loaded, and a copy of this object in a loader process opens it anew. Labels, integers (N,) in a
    ``.npy`` of their own, are held in memory.

    Args:
        path: The file of the images.
        labels: The file of their labels; without one, entries are images alone.
        classes: Names of the classes by index, for pages that show them.

    Attributes:
        labels: Class index of each image, int64; ``None`` without labels.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If a file is damaged or incomplete, an array is of another kind, there are more or fewer labels than
            images, or a label has no name among ``classes``.
    """

    def __init__(
        self, path: str | Path, labels: str | Path | None = None, classes: Sequence[str] | None = None
    ) -> None:
        self.path = _existing(path, "images, uint8 (N, H, W, 3)")
        shape, start = _image_header(self.path)
        self.size, self.height, self.width = shape[:3]
        self.channels = shape[3] if len(shape) == 4 else 1
        self.labels = None if labels is None else _labels(_existing(labels, "labels, integers (N,)"))
        if self.labels is not None and len(self.labels) != self.size:
            raise InputError(f"{self.path} has {self.size} images, but {labels} has {len(self.labels)} labels")
        self.classes: tuple[str, ...] | None = None if classes is None else tuple(classes)
        largest = -1 if self.labels is None else int(self.labels.max(initial=-1))
        if classes is not None and largest >= len(classes):
            raise InputError(f"{labels} has the label {largest}, but there are {len(classes)} classes: {list(classes)}")
        self._records = RecordFile(self.path, self.height * self.width * self.channels, start)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Image.Image | tuple[Image.Image, int]:
        """Returns image ``index``, RGB or grey as in the file, and its label if there are labels.

        Raises:
            CorruptImageError: If the file can no longer be read there.
        """
        check_index(index, self.size)
        try:
            pixels = self._records.read(index)
        except (OSError, EOFError) as error:
            raise CorruptImageError(self.name(index), str(error)) from error
        image = Image.frombytes(_CHANNELS[self.channels], (self.width, self.height), pixels)
        return image if self.labels is None else (image, int(self.labels[index]))

    def name(self, index: int) -> str:
        """Returns path and number of image ``index``."""
        check_index(index, self.size)
        return f"{self.path} image {index}"


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns shape, whether in Fortran order, and type of the array in a ``.npy``; its data follow in ``file``.

    Raises:
        ValueError: If it is no ``.npy``, or one of a version that NumPy does not write for plain arrays.
    """
    versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in versions:
        raise ValueError(f"version {version} of the format is for arrays with named fields")
    shape, fortran_order, dtype = versions[version](file)
    return shape, fortran_order, dtype


def checked_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Returns class indices (N,) as int64.

    Raises:
        InputError: With ``name``, if they are of another shape, no integers, or negative.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{name} must be integers of shape (N,), got {labels.dtype} of shape {labels.shape}")
    if len(labels) and labels.min() < 0:
        raise InputError(f"{name} must not be negative, got {labels.min()}")
    return labels.astype(np.int64)


def _existing(path: str | Path, what: str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; expected a .npy of {what}")
    return path


def _image_header(path: Path) -> tuple[tuple[int, ...], int]:
    """Shape of the images, and the length of what precedes them."""
    try:
        with path.open("rb") as file:
            shape, fortran_order, dtype = read_header(file)
            start = file.tell()
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        raise InputError(f"{path} is not a readable .npy file: {error}") from error
    if dtype != np.uint8 or len(shape) not in (3, 4) or min(shape) < 1 or (*shape, 1)[3] not in _CHANNELS:
        hint = (
            "; channels come last: np.transpose(images, (0, 2, 3, 1))"
            if len(shape) == 4 and shape[1] in _CHANNELS
            else ""
        )
        raise InputError(
            f"{path} must be uint8 of shape (N, H, W, 3), (N, H, W, 1) or (N, H, W), got {dtype} of shape {shape}{hint}"
        )
    if fortran_order:
        raise InputError(f"{path} is in Fortran order; save it again as np.ascontiguousarray(images)")
    size, expected = path.stat().st_size - start, math.prod(shape)
    if size != expected:
        reason = "the copy or download is incomplete" if size < expected else "other data follow"
        raise InputError(f"{path} has {size} bytes of images, but its shape {shape} needs {expected}: {reason}")
    return shape, start


def _labels(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # as above
        raise InputError(f"{path} is not a readable .npy file of labels: {error}") from error
    return checked_labels(labels, str(path))
