"""Labelled images that a generative model made, in the .npz files in which they are published."""

import errno
import hashlib
import math
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch.utils.data import Dataset

from dat_lightning.core.errors import InputError
from dat_lightning.data.arrays import checked_labels, read_header
from dat_lightning.data.images import RecordFile, check_index
from dat_lightning.data.pixels import CorruptImageError


class GeneratedImages(Dataset[tuple[Image.Image, int]]):
    """Generated images with labels: a ``.npz`` with ``image``, uint8 (N, H, W, 3), and ``label``, integers (N,).

    Images are read from the file one by one. Of a compressed file, ``image`` is unpacked once, to a file whose name
    depends on name, size and time of the original; of several processes one unpacks while the others wait.

    Source: Wang et al. 2023, arXiv 2302.04638, whose published sets have this form.

    Args:
        path: The file.
        cache_dir: Where to unpack; the folder of the file if ``None``.

    Attributes:
        labels: Class index of each image, int64.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it has to be unpacked and ``cache_dir`` has no space for that or cannot be written.
        InputError: If the file is damaged, or an array is missing or of another kind.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"no file at {self.path}; expected a .npz with 'image' and 'label'")
        with _opened(self.path) as archive:
            self.labels = _labels(self.path, archive)
            (count, self.height, self.width, _), header_size = _image_header(self.path, archive)
            if count != len(self.labels):
                raise InputError(f"{self.path} has {count} entries in 'image', but {len(self.labels)} in 'label'")
            if archive.getinfo("image.npy").compress_type == zipfile.ZIP_STORED:
                file, start = self.path, _start(self.path, archive)
            else:
                cache = self.path.parent if cache_dir is None else Path(cache_dir).expanduser()
                file, start = _unpacked(self.path, archive, cache), 0
        self._records = RecordFile(file, self.height * self.width * 3, start + header_size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Returns image ``index`` as RGB, and its label.

        Raises:
            CorruptImageError: If the file can no longer be read there.
        """
        check_index(index, len(self))
        try:
            pixels = self._records.read(index)
        except (OSError, EOFError) as error:
            raise CorruptImageError(self.name(index), str(error)) from error
        return Image.frombytes("RGB", (self.width, self.height), pixels), int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns path and number of image ``index``."""
        check_index(index, len(self))
        return f"{self.path} image {index}"


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        raise InputError(f"{path} is not a readable .npz file: {error}") from error
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    missing = [key for key in ("image", "label") if key not in names]
    if missing:
        archive.close()
        raise InputError(f"{path} lacks {missing}; expected 'image' and 'label', got {names[:8]}")
    return archive


def _labels(path: Path, archive: zipfile.ZipFile) -> np.ndarray:
    try:
        with archive.open("label.npy") as member:
            labels = np.lib.format.read_array(member, allow_pickle=False)
    except Exception as error:  # as above
        raise InputError(f"{path}: 'label' cannot be read: {error}") from error
    return checked_labels(labels, f"{path}: 'label'")


def _image_header(path: Path, archive: zipfile.ZipFile) -> tuple[tuple[int, ...], int]:
    """Shape of the images, and the length of what precedes them."""
    try:
        with archive.open("image.npy") as member:
            shape, fortran_order, dtype = read_header(member)
            header_size = member.tell()
    except Exception as error:  # as above
        raise InputError(f"{path}: 'image' cannot be read: {error}") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise InputError(f"{path}: 'image' must be uint8 of shape (N, H, W, 3), got {dtype} of shape {shape}")
    if fortran_order:
        raise InputError(f"{path}: 'image' is in Fortran order; save it again as np.ascontiguousarray(image)")
    size = archive.getinfo("image.npy").file_size
    if header_size + math.prod(shape) != size:
        raise InputError(f"{path}: 'image' has {size - header_size} bytes, but its shape is {shape}")
    return shape, header_size


def _start(path: Path, archive: zipfile.ZipFile) -> int:
    """Where the stored member begins: after its local header, whose length is not that of the directory's entry."""
    info = archive.getinfo("image.npy")
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name_length) + int(extra_length)


def _unpacked(path: Path, archive: zipfile.ZipFile, cache: Path) -> Path:
    """The file with the uncompressed images, which is made if it is not there."""
    size, stat = archive.getinfo("image.npy").file_size, path.stat()
    key = hashlib.sha256(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache / f"{path.stem}-{key}.npy"
    try:
        if not _is_whole(target, size):
            cache.mkdir(parents=True, exist_ok=True)
            _unpack(archive, target, size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not unpack 'image' of {path}, {size} bytes, to {cache}: {error.strerror or error}; name a folder"
            " with space for it as cache_dir",
            str(cache),
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: 'image' is damaged: {error}") from error
    return target


def _unpack(archive: zipfile.ZipFile, target: Path, size: int) -> None:
    # No such module on Windows, where uncompressed files can be used.
    import fcntl

    part = target.with_name(f"{target.name}.part")
    # Appending, because another process may be writing it; the lock ends with the process that holds it.
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_whole(target, size):
            part.unlink(missing_ok=True)
            return
        file.truncate(0)
        if shutil.disk_usage(target.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rank_zero_info(f"unpacking {size / 2**30:.1f} GiB of images to {target}, once")
        try:
            with archive.open("image.npy") as member:
                shutil.copyfileobj(member, file, 2**20)
            file.flush()
        except BaseException:
            # Not deleted: a process that waits for the lock would write into a file that has no name any more.
            file.truncate(0)
            raise
        part.replace(target)


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
