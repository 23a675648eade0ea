"""Reading images, and views of data sets of images: what all image sources have in common."""

import errno
import io
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from dat_lightning.core.errors import InputError
from dat_lightning.data.entries import SizedDataset, image_name, image_of
from dat_lightning.data.pixels import CorruptImageError

# What a file may hold, whatever its name says. Pillow knows more, some of which (EPS) start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


# Too many open files, no memory: the next image would fail as well, and skipping would change the data in silence.
_NOT_THE_IMAGE_S_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


# What a file server says when it is away for a moment, and the seconds before it is asked again.
_MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_PAUSES = (0.5, 2.0, 8.0)


def read_image(path: str | Path) -> Image.Image:
    """Returns the image in a file, decoded, as RGB with eight bits.

    Grey is repeated, sixteen-bit grey is scaled, palettes and CMYK are converted, transparency is dropped, and of
    several frames the first is taken. The orientation that a camera noted in EXIF is ignored, as torchvision does.

    Raises:
        CorruptImageError: If the file is missing, is no image, or is damaged; or a file server fails several times.
        OSError: If the process has too many open files or too little memory.
    """
    with _unreadable_is_corrupt(str(path)):
        for pause in _PAUSES:
            try:
                return _decoded(path)
            except OSError as error:
                if error.errno not in _MAY_PASS:
                    raise
            time.sleep(pause)
        return _decoded(path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Returns the image that the bytes of a file hold, as :func:`read_image` does.

    Raises:
        CorruptImageError: With ``name``, if they are no image, or a damaged one.
        OSError: If the process has too little memory.
    """
    with _unreadable_is_corrupt(name):
        return _decoded(io.BytesIO(content))


@contextmanager
def _unreadable_is_corrupt(name: str) -> Iterator[None]:
    """Makes a CorruptImageError of whatever says that an image cannot be read."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise CorruptImageError(name, f"it is none of {', '.join(FORMATS)}") from error
    except OSError as error:
        if error.errno in _NOT_THE_IMAGE_S_FAULT:
            raise
        raise CorruptImageError(name, error.strerror or str(error)) from error
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        raise CorruptImageError(name, f"{type(error).__name__}: {error}") from error


def _decoded(file: str | Path | IO[bytes]) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    # Older versions of Pillow read sixteen bits as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = eight_bit_grey(image)
    elif image.mode in ("I", "F"):
        raise InputError(f"pixels of mode {image.mode!r} have no agreed white")
    # Pillow warns that the transparency of a palette is lost, which is meant.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def eight_bit_grey(image: Image.Image) -> Image.Image:
    """Returns sixteen-bit grey as eight bits: 65535 / 257 = 255, where Pillow would clip at 255."""
    grey = (np.asarray(image).astype(np.int64) + 128) // 257
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def check_index(index: int, size: int) -> None:
    """Raises an IndexError unless an index lies in 0 … size − 1."""
    if not 0 <= index < size:
        raise IndexError(f"image {index} is outside 0 … {size - 1}")


class ImageView(Dataset[Any]):
    """Entries of another data set under other indices; names are the other's.

    Subclasses say how many entries they have, and override :meth:`place` where they are not all in the same order.

    Args:
        dataset: The other data set.
    """

    def __init__(self, dataset: SizedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Returns entry ``index`` of the view."""
        return self.dataset[self.place(index)]

    def place(self, index: int) -> int:
        """Returns where in the other data set an entry is; an IndexError if the view has no such entry."""
        check_index(index, len(self))
        return index

    def name(self, index: int) -> str:
        """Returns where image ``index`` comes from."""
        return image_name(self.dataset, self.place(index))


class ImageSubset(ImageView):
    """Some entries of a data set.

    Args:
        dataset: The whole.
        indices: Which entries, in which order; a range or NumPy array is kept as it is.

    Raises:
        InputError: If an index is no integer or outside the data set.
    """

    def __init__(self, dataset: SizedDataset, indices: Sequence[int] | np.ndarray) -> None:
        # Of a range the ends are enough; it may be longer than memory.
        ends: Sequence[int] | np.ndarray = [*indices[:1], *indices[-1:]] if isinstance(indices, range) else indices
        ends = np.asarray(ends)
        if ends.size and (ends.ndim != 1 or not np.issubdtype(ends.dtype, np.integer)):
            raise InputError(f"indices must be one row of integers, got {ends.dtype} of shape {ends.shape}")
        if ends.size and not 0 <= ends.min() <= ends.max() < len(dataset):
            raise InputError(f"indices must lie in 0 … {len(dataset) - 1}, got {ends.min()} … {ends.max()}")
        super().__init__(dataset)
        self.indices = indices if isinstance(indices, range) else np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def place(self, index: int) -> int:
        """Returns where in the whole an entry is."""
        return int(self.indices[super().place(index)])


class Unlabelled(ImageView):
    """The images of another data set, without labels: out-of-distribution seeds from labelled data.

    Args:
        dataset: Entries are images, or pairs of image and label.
    """

    def __getitem__(self, index: int) -> Any:
        """Returns image ``index``."""
        return image_of(super().__getitem__(index))


class RecordFile:
    """Equally long records in a file of any size; each process opens it at its first read.

    Records are read one by one instead of mapped into memory: a map reads far around each place, fills memory with
    pages, and ends the process where the disk fails or the file shrinks.

    Args:
        path: The file.
        record_size: Bytes of a record.
        offset: Where the first record begins.
    """

    def __init__(self, path: Path, record_size: int, offset: int = 0) -> None:
        self.path = path
        self.record_size = record_size
        self.offset = offset
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def read(self, record: int) -> bytes:
        """Returns record number ``record``, counted from 0.

        Raises:
            OSError: If the file is gone or cannot be read.
            EOFError: If the file ends before the end of the record.
        """
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        data = os.pread(self._descriptor, self.record_size, self.offset + record * self.record_size)
        if len(data) < self.record_size:
            raise EOFError("the file has become shorter")
        return data
