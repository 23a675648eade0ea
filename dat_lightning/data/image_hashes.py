"""Hashes that near-duplicates share in most bits: of what a picture looks like, or of a network's features."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import stream_generator
from dat_lightning.data.fingerprint import SizedDataset
from dat_lightning.data.pixels import CorruptImageError, to_uint8_rgb


@dataclass(frozen=True)
class ImageHashes:
    """Hashes of those images of a data set that can be read.

    Attributes:
        hashes: Shape (N, W), W words of 64 bits each.
        indices: Shape (N,), which entry of the data set each is.
        num_skipped: How many images were corrupt.
    """

    hashes: np.ndarray
    indices: np.ndarray
    num_skipped: int = 0


def _pixels(image: Any) -> Tensor:
    """An image as floats (C, H, W) in [0, 1]: a tensor of that shape, or a PIL image or array (H, W) or (H, W, C)."""
    if isinstance(image, Tensor):
        return image.float() / 255 if image.dtype == torch.uint8 else image.float()
    array = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).float() / 255


_SIDE = 32
# The 64 lowest frequencies (row, column) but the mean, in a fixed order.
_FREQUENCIES = np.array(sorted(np.ndindex(16, 16), key=lambda uv: (uv[0] ** 2 + uv[1] ** 2, uv))[1:65])
_COSINES = np.cos(np.pi * np.arange(16)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
# Below every coefficient that a picture has: rounding must not decide the bits of an image of one colour.
_FLAT = 1e-3


def perceptual_hash(image: Any) -> np.ndarray:
    """Returns the 64-bit hash of an image, shape (1,): the signs of its lowest frequencies.

    The image is made grey, resized to 32×32 with antialiasing, and transformed by the two-dimensional DCT-II; a bit
    says whether one of the 64 lowest frequencies beside the mean has a positive coefficient. Brightness and contrast do
    not matter, compression and scale little; cropping matters from a few per cent on. pHash compares with the median
    instead of zero; against zero, the hash of the mirror image is known as well.

    Args:
        image: A PIL image or array, (H, W) or (H, W, C) of eight bits, or a tensor (C, H, W), float in [0, 1] or uint8.

    Source: Zauner 2010 (Implementation and Benchmarking of Perceptual Image Hash Functions), on the DCT hash.
    """
    pixels = _pixels(image)
    luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
    grey = pixels[:1] if len(pixels) < 3 else (pixels[:3] * luma.view(3, 1, 1)).sum(0, keepdim=True)
    small = F.interpolate(grey[None], size=(_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)[0, 0]
    coefficients = _COSINES @ small.double().numpy() @ _COSINES.T
    return _packed(coefficients[_FREQUENCIES[:, 0], _FREQUENCIES[:, 1]] > _FLAT)


def mirrored_hashes(hashes: ImageHashes) -> ImageHashes:
    """Returns the perceptual hashes of the images reflected left to right: odd horizontal frequencies change sign."""
    return replace(hashes, hashes=hashes.hashes ^ _packed(_FREQUENCIES[:, 1] % 2 == 1))


def _packed(bits: np.ndarray) -> np.ndarray:
    """Words of 64 bits, (..., W), from booleans (..., 64 W)."""
    return np.packbits(bits, axis=-1).view(np.uint64)


class _Prepared(Dataset[tuple[int, np.ndarray | None]]):
    """Index and what ``prepare`` makes of the image, ``None`` of a corrupt one."""

    def __init__(self, dataset: SizedDataset, prepare: Callable[[Any], np.ndarray], indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.prepare = prepare
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, np.ndarray | None]:
        index = self.indices[place]
        try:
            entry = self.dataset[index]
        except CorruptImageError:
            return index, None
        return index, self.prepare(entry[0] if isinstance(entry, tuple) else entry)


def _readable(entries: list[tuple[int, np.ndarray | None]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Indices and values of a batch, without those of corrupt images."""
    kept = [(index, value) for index, value in entries if value is not None]
    return np.array([index for index, _ in kept], dtype=np.int64), [value for _, value in kept]


def _batches(
    images: _Prepared, batch_size: int, num_workers: int, title: str
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    loader: Iterable[Any] = DataLoader(images, batch_size, num_workers=num_workers, collate_fn=_readable)
    yield from tqdm(loader, desc=title, unit="batch")


def _gathered(batches: Iterable[tuple[np.ndarray, np.ndarray]], words: int, size: int) -> ImageHashes:
    indices, hashes = [np.empty(0, np.int64)], [np.empty((0, words), np.uint64)]
    for index, values in batches:
        indices.append(index)
        hashes.append(values)
    kept = np.concatenate(indices)
    return ImageHashes(np.concatenate(hashes), kept, size - len(kept))


def perceptual_hashes(dataset: SizedDataset, batch_size: int = 256, num_workers: int = 0) -> ImageHashes:
    """Returns the :func:`perceptual_hash` of each image of a data set; an entry is an image or a pair with a label."""
    images = _Prepared(dataset, perceptual_hash, range(len(dataset)))
    batches = _batches(images, batch_size, num_workers, "Hashing")
    return _gathered(((index, np.stack(values)) for index, values in batches if values), 1, len(dataset))


def _uint8_rgb(image: Any, image_size: int | None) -> np.ndarray:
    """Pixels (3, H, W) of eight bits."""
    pixels = _pixels(image)[None]
    if image_size is not None:
        size = (image_size, image_size)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    return to_uint8_rgb(pixels)[0].numpy()


class FeatureHasher:
    """Hashes images by the features of a network, where a picture's content counts more than its layout.

    Bits are the signs of random projections of the features minus a centre; two images differ in about as many bits as
    the angle between their features is of π.

    Args:
        extractor: Maps uint8 images (N, 3, H, W) to features (N, D), or to a tuple that begins with them, as for
            :class:`~dat_lightning.sampling.FrechetDistance`. Images go to the device that it is on.
        reference: The data set that gives the centre, the mean feature of 2 000 evenly spaced images; the
            in-distribution one.
        bits: Length of a hash, a multiple of 64.
        image_size: Height and width that images are resized to; ``None`` if all have one size anyway.
        batch_size: Images per pass of the extractor.
        num_workers: Processes that load images.
        seed: Seed of the projections.

    Raises:
        InputError: If ``bits`` is no positive multiple of 64, or no image of ``reference`` can be read.

    Source: Charikar 2002 (Similarity estimation techniques from rounding algorithms), section 3.
    """

    def __init__(
        self,
        extractor: nn.Module,
        reference: SizedDataset,
        bits: int = 256,
        image_size: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if bits < 64 or bits % 64:
            raise InputError(f"bits must be a positive multiple of 64, got {bits}")
        self.extractor = extractor.eval()
        self.bits = bits
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        count = min(len(reference), 2000)
        some = [k * len(reference) // count for k in range(count)]
        features = [values for _, values in self._features(reference, some, "Centre of the features")]
        if not features:
            raise InputError(f"the features need a centre, but none of {count} reference images can be read")
        self.center: Tensor = torch.cat(features).mean(0)
        generator = stream_generator(seed, "feature hash")
        self.projections = torch.randn(len(self.center), bits, generator=generator, dtype=torch.float64)

    def __call__(self, dataset: SizedDataset) -> ImageHashes:
        """Returns the hash of each image of a data set."""
        batches = self._features(dataset, range(len(dataset)), "Hashing features")
        signs = ((index, ((values - self.center) @ self.projections > 0).numpy()) for index, values in batches)
        return _gathered(((index, _packed(bits)) for index, bits in signs), self.bits // 64, len(dataset))

    def _features(
        self, dataset: SizedDataset, indices: Sequence[int], title: str
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        tensor = next(chain(self.extractor.parameters(), self.extractor.buffers()), torch.empty(0))
        images = _Prepared(dataset, partial(_uint8_rgb, image_size=self.image_size), indices)
        for index, pixels in _batches(images, self.batch_size, self.num_workers, title):
            if pixels:
                with torch.no_grad():
                    output = self.extractor(torch.from_numpy(np.stack(pixels)).to(tensor.device))
                features = output[0] if isinstance(output, tuple) else output
                yield index, features.flatten(1).double().cpu()


def feature_hashes(
    dataset: SizedDataset, extractor: nn.Module, bits: int = 256, center_of: SizedDataset | None = None
) -> ImageHashes:
    """Returns the hashes that a :class:`FeatureHasher` makes of a data set.

    Args:
        dataset: The images.
        extractor: Maps uint8 images (N, 3, H, W) to features.
        bits: Length of a hash, a multiple of 64.
        center_of: The data set that gives the centre, by default the same; only hashes with one centre are comparable.
    """
    return FeatureHasher(extractor, dataset if center_of is None else center_of, bits)(dataset)
