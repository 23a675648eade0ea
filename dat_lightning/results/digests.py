"""SHA-256 digests of files, networks and images, by which measurements, caches and kept values are told apart."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dat_lightning.data.entries import ReadableImages, SizedDataset
from dat_lightning.data.fingerprint import image_digest
from dat_lightning.data.pixels import to_uint8_rgb

# Digits of a digest that stand in settings and in names of files.
_LENGTH = 16


def digest(parts: Iterable[str | bytes | Tensor]) -> str:
    """Returns the hash of texts, bytes and tensors, in hexadecimal digits; where a part ends matters."""
    sha256 = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            raw = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            head = f"{part.dtype} {tuple(part.shape)}"
        else:
            raw, head = (part.encode(), "text") if isinstance(part, str) else (part, "bytes")
        sha256.update(f"{head} {len(raw)}\n".encode())
        sha256.update(raw)
    return sha256.hexdigest()


def identity(name: str, full_digest: str) -> str:
    """Returns a name with a short digest, as settings have it: what one reads, and what tells it from its like."""
    return f"{name} sha256:{full_digest[:_LENGTH]}".lstrip()


def file_digest(path: Path, whole_up_to: int = 20_000, num_samples: int = 2_000) -> str:
    """Returns the SHA-256 of a file, or a digest of the files in a folder.

    Of a folder count all files up to a number, beyond it evenly spaced ones. Folders with the same files in them are
    alike, wherever they lie.
    """
    if path.is_file():
        sha256 = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
        return sha256.hexdigest()
    files = sorted(Path(where) / name for where, _, names in os.walk(path) for name in names)
    count = len(files) if len(files) <= whole_up_to else num_samples
    chosen = [files[k * len(files) // count] for k in range(count)]
    named = (f"{file.relative_to(path).as_posix()} {file_digest(file)}" for file in chosen)
    return digest([str(len(files)), *named])


def network_digest(network: nn.Module) -> str:
    """Returns a digest of a network's class, structure, weights and all buffers."""
    # First the state dict, for which a module may load its weights.
    tensors = {**network.state_dict(), **dict(network.named_buffers())}
    named = (part for name, value in sorted(tensors.items()) for part in (name, value))
    return digest([f"{type(network).__module__}.{type(network).__qualname__}\n{network}", *named])


def network_identity(network: nn.Module) -> str:
    """Returns the class of an extractor, a judge or a classifier, what it says of itself, and its digest."""
    said = network.extra_repr()
    return identity(f"{type(network).__name__}({said})" if said else type(network).__name__, network_digest(network))


def data_digest(dataset: SizedDataset, whole_up_to: int = 20_000, num_samples: int = 2_000) -> str:
    """Returns a digest of a data set's images: of all up to a size, beyond it of evenly spaced ones and the length."""
    size = len(dataset)
    count = size if size <= whole_up_to else num_samples
    images = ReadableImages(dataset)
    entries = (images.read(k * size // count) for k in range(count))
    return digest([str(size), *("unreadable" if entry is None else image_digest(entry) for entry in entries)])


def reference_digest(data: Any) -> str:
    """Returns a digest of reference images as evaluation sees them; no network reads them, so no device changes it.

    Args:
        data: Has ``dataset`` and ``transform``, as the DataModule's ``reference_data()``.
    """
    return digest([data_digest(data.dataset), repr(data.transform), to_uint8_rgb(probe_images(data))])


def probe_images(data: Any) -> Tensor:
    """Returns sixteen evenly spaced reference images, transformed: settings that no name shows change these."""
    size = len(data.dataset)
    images: Tensor = data[sorted({k * size // 16 for k in range(16)})]["x"]
    return images


def image_digests(x: Tensor, y: Tensor) -> Tensor:
    """Returns a number for each image and label, (N,) int64, from at most 4 096 of the image's values as ten bits."""
    values = x.detach().flatten(1)
    values = values[:, :: max(1, values.shape[1] // 4096)].float().nan_to_num().mul(1023).round().to(torch.int32).cpu()
    found = [digest([str(label), image]) for image, label in zip(values, y.tolist(), strict=True)]
    return torch.tensor([int(each[:14], 16) for each in found], dtype=torch.int64)


def set_identity(digests: Tensor) -> str:
    """Returns what tells the images behind :func:`image_digests`, (N,), from others; their order counts."""
    return identity("", digest([digests]))
