"""80 Million Tiny Images, from the one file in which they were published."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dat_lightning.core.errors import InputError
from dat_lightning.data.images import RecordFile, check_index
from dat_lightning.data.pixels import CorruptImageError

_RECORD_SIZE = 3 * 32 * 32


class TinyImages(Dataset[Image.Image]):
    """The images in ``tiny_images.bin``, 32×32, without labels and without those that lists exclude.

    A record is one image in column-major order: channel by channel, column by column. The file, 79 302 017 records of
    3 072 bytes, is never loaded; of an exclusion list one number per entry is kept.

    Source: Torralba, Fergus and Freeman 2008, 80 Million Tiny Images.

    Args:
        path: The file.
        exclude: Files with the numbers of records to leave out: text with an integer per line, where blank lines and
            lines that begin with ``#`` mean nothing, or ``.npy``. Any order; a number may come twice.
        first_record: The number that the lists give the first record of the file.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If ``exclude`` is one path instead of several.
        InputError: If the file is empty or not made of records, or a list has an entry that is no record's number.
    """

    def __init__(self, path: str | Path, exclude: Sequence[str | Path] = (), first_record: Literal[0, 1] = 0) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"no file at {self.path}; expected tiny_images.bin")
        size = self.path.stat().st_size
        if size == 0 or size % _RECORD_SIZE:
            raise InputError(
                f"{self.path} has {size} bytes, expected a multiple of {_RECORD_SIZE}; the download is incomplete, or"
                " the file is another"
            )
        if isinstance(exclude, (str, Path)):
            raise InputError(f"exclude must be a list of paths, got {exclude!r}")
        if first_record not in (0, 1):
            raise InputError(f"first_record must be 0 or 1, got {first_record}")
        self.first_record = first_record
        self.num_records = size // _RECORD_SIZE
        numbers = [_excluded(Path(file).expanduser(), first_record, self.num_records) for file in exclude]
        excluded = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *numbers]))
        if len(excluded) == self.num_records:
            raise InputError(f"exclude leaves none of the {self.num_records} images in {self.path}")
        # How many images are kept before each excluded record.
        self._kept_before = excluded - np.arange(len(excluded))
        self._records = RecordFile(self.path, _RECORD_SIZE)

    def __len__(self) -> int:
        return self.num_records - len(self._kept_before)

    def __getitem__(self, index: int) -> Image.Image:
        """Returns image ``index`` as RGB.

        Raises:
            CorruptImageError: If the file can no longer be read there.
        """
        try:
            record = self._records.read(self._record(index))
        except (OSError, EOFError) as error:
            raise CorruptImageError(self.name(index), str(error)) from error
        channels = np.frombuffer(record, dtype=np.uint8).reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(channels.transpose(2, 1, 0)))

    def name(self, index: int) -> str:
        """Returns path and number of image ``index``, as the lists count."""
        return f"{self.path} record {self._record(index) + self.first_record}"

    def _record(self, index: int) -> int:
        check_index(index, len(self))
        return index + int(np.searchsorted(self._kept_before, index, side="right"))


def _excluded(file: Path, first_record: int, num_records: int) -> np.ndarray:
    """The records that a list excludes, counted from 0."""
    if not file.is_file():
        raise FileNotFoundError(f"exclude names {file}, which is no file; expected a list of record numbers")
    numbers, lines = (_numbers_of_array(file), None) if file.suffix == ".npy" else _numbers_of_text(file)
    last = first_record + num_records - 1
    outside = np.flatnonzero((numbers < first_record) | (numbers > last))
    if len(outside):
        place = f"entry {outside[0]}" if lines is None else f"line {lines[outside[0]]}"
        raise InputError(
            f"{file}, {place}: record {numbers[outside[0]]} is outside {first_record} … {last}"
            f" (first_record={first_record})"
        )
    return numbers.astype(np.int64) - first_record


def _numbers_of_array(file: Path) -> np.ndarray:
    try:
        with file.open("rb") as array:
            numbers = np.lib.format.read_array(array, allow_pickle=False)
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        raise InputError(f"{file} is not a readable .npy file of integers: {error}") from error
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise InputError(f"{file} must hold one row of integers, got {numbers.dtype} of shape {numbers.shape}")
    return np.asarray(numbers)


def _numbers_of_text(file: Path) -> tuple[np.ndarray, list[int]]:
    numbers, lines = [], []
    for number, text in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if text.strip() and not text.lstrip().startswith("#"):
            try:
                numbers.append(np.int64(int(text)))
            except (ValueError, OverflowError):
                raise InputError(
                    f"{file}, line {number}: expected a record number, got {text.strip()[:40]!r}"
                ) from None
            lines.append(number)
    return np.asarray(numbers, dtype=np.int64), lines
