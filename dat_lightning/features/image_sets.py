"""Sets of images in files: folders, and the ``.npz`` of the ADM evaluator."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dat_lightning.core.errors import InputError
from dat_lightning.features.gaussian_stats import Gaussian, check_parts, read_statistics
from dat_lightning.features.layers import LayerReader
from dat_lightning.results.gathering import Values

_MOST_PIXELS = 1 << 24
_SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageSet(Protocol):
    """Images of a set, all of one size."""

    def __len__(self) -> int: ...

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Values]:
        """Yields ``index`` (N,), ``x`` (N, 3, H, W) as uint8 and, if there are classes, ``label`` (N,)."""
        ...


class FolderImages:
    """PNG and JPEG files of a folder and of those in it, in the order of their paths, as torch-fidelity sorts them.

    Args:
        folder: The folder.

    Raises:
        InputError: If it has no images; on reading, if one is damaged or has another size than the first.
    """

    def __init__(self, folder: Path) -> None:
        found = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
        # As text: paths compare part by part, and would put "a/x.png" before "a-b/x.png".
        self.paths = sorted(str(path) for path in found if path.suffix.lower() in _SUFFIXES)
        if not self.paths:
            raise InputError(f"{folder} has no images: expected {', '.join(_SUFFIXES)} in it or in its folders")

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Values]:
        """Yields ``index`` (N,) and ``x`` (N, 3, H, W)."""
        height, width, _ = _pixels(self.paths[0]).shape
        for first in range(0, len(indices), batch_size):
            chosen = list(indices[first : first + batch_size])
            images = []
            for path in (self.paths[index] for index in chosen):
                images.append(_pixels(path))
                if images[-1].shape[:2] != (height, width):
                    raise InputError(
                        f"{path} has {images[-1].shape[0]}×{images[-1].shape[1]} pixels, and {self.paths[0]} has"
                        f" {height}×{width}: images of a set must have one size"
                    )
            yield {"index": torch.tensor(chosen), "x": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)}


class ArrayImages:
    """Images of an ``.npz``: ``arr_0`` (uint8, N×H×W×3) and perhaps ``arr_1``, classes (N), read batch by batch.

    Args:
        path: The file.

    Raises:
        InputError: If the entries are others, or there are no images; on reading, if the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _header(file)
            # Where the pixels begin.
            self._start = file.tell()
            wrong = len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran
            if wrong or min(shape) < 1:
                raise InputError(f"{path}: arr_0 must be uint8 of shape (N, H, W, 3), got {dtype} of shape {shape}")
            if math.prod(shape[1:3]) > _MOST_PIXELS:
                raise InputError(
                    f"{path}: arr_0 has images of {shape[1]}×{shape[2]} pixels; at most 16 million are read"
                )
            self.shape: tuple[int, ...] = shape
            self.labels = self._labels(archive)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Values]:
        """Yields ``index`` (N,), ``x`` (N, 3, H, W) and, if there are classes, ``label`` (N,)."""
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            for first in range(0, len(indices), batch_size):
                chosen = torch.tensor(list(indices[first : first + batch_size]))
                try:
                    raw = b"".join(_read_at(file, self._start + index * size, size) for index in chosen.tolist())
                except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                    raise InputError(f"{self.path}: arr_0 is damaged: {error}") from error
                x = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, *self.shape[1:])
                labels = {} if self.labels is None else {"label": self.labels[chosen]}
                yield {"index": chosen, "x": x.permute(0, 3, 1, 2), **labels}

    def _labels(self, archive: zipfile.ZipFile) -> Tensor | None:
        if "arr_1.npy" not in archive.namelist():
            return None
        check_parts(self.path, archive, ("arr_1",))
        with archive.open("arr_1.npy") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
        if labels.shape != self.shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(
                f"{self.path}: arr_1 must be integers of shape ({self.shape[0]},), got {labels.dtype} of shape"
                f" {labels.shape}"
            )
        return torch.from_numpy(labels.astype(np.int64))


def read_set(path: Path) -> tuple[ImageSet | None, Gaussian | None]:
    """Returns the images and the statistics at a path, at least one of the two.

    Args:
        path: Folder of images, or ``.npz`` with ``arr_0``, with ``mu`` and ``sigma``, or with all three.

    Raises:
        FileNotFoundError: If there is nothing.
        InputError: If it is neither, or its entries are wrong.
    """
    if path.is_dir():
        return FolderImages(path), None
    if not path.is_file():
        raise FileNotFoundError(f"no folder or .npz at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
        images = ArrayImages(path) if "arr_0.npy" in names else None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is no folder, and not a readable .npz: {error}") from error
    gaussian = read_statistics(path) if {"mu.npy", "sigma.npy"} & names else None
    if images is None and gaussian is None:
        raise InputError(f"{path} must have images (arr_0) or statistics (mu and sigma), got {sorted(names)}")
    return images, gaussian


def read_images(
    images: ImageSet,
    reader: LayerReader,
    indices: Sequence[int],
    device: torch.device,
    batch_size: int,
    with_logits: bool = False,
    silent: bool = False,
) -> Iterator[Values]:
    """Yields features, and logits if asked for, of a set's images with the given indices, in batches."""
    with tqdm(total=len(indices), desc="Reading images", unit="images", leave=False, disable=silent) as progress:
        for batch in images.batches(indices, batch_size):
            pixels = batch.pop("x")
            yield {**batch, **reader.read(pixels.to(device), with_logits)}
            progress.update(len(pixels))


def _pixels(path: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image file as uint8 (H, W, 3)."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        raise InputError(f"{path} is not a readable image: {error}") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first index runs fastest, and type of the array in an open ``.npy``."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read_at(file: IO[bytes], position: int, size: int) -> bytes:
    if file.tell() != position:
        file.seek(position)
    found = file.read(size)
    if len(found) != size:
        raise EOFError("the file ends too early")
    return found
