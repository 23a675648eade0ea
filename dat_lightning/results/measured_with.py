"""Short digests of what decides a figure besides the model, so that only figures with the same ones are compared."""

import hashlib
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dat_lightning.data.fingerprint import data_fingerprint, image_digest, module_fingerprint
from dat_lightning.data.pixels import to_uint8_rgb

_LENGTH = 16


def network_digest(network: nn.Module) -> str:
    """Returns a digest of an extractor, a judge or a classifier, behind the name of its class."""
    return f"{type(network).__name__} {module_fingerprint(network)[:_LENGTH]}"


def image_digests(x: Tensor, y: Tensor) -> Tensor:
    """Returns a number for each image and label, (N,) int64, from at most 4 096 of the image's values as ten bits."""
    values = x.detach().flatten(1)
    values = values[:, :: max(1, values.shape[1] // 4096)].float().nan_to_num().mul(1023).round().to(torch.int32).cpu()
    pairs = zip(values, y.tolist(), strict=True)
    digests = [hashlib.sha256(f"{label}".encode() + image.numpy().tobytes()).digest() for image, label in pairs]
    return torch.tensor([int.from_bytes(digest[:7], "big") for digest in digests])


def set_digest(digests: Tensor) -> str:
    """Returns a digest of the images behind :func:`image_digests`, (N,), in their order."""
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:_LENGTH]


def reference_digest(trainer: Trainer, data: Any) -> str:
    """Returns a digest of reference images as evaluation sees them; every rank must call it.

    No network reads them, so that another device gives the same digest.

    Args:
        trainer: Lets rank zero alone read.
        data: Has ``dataset`` and ``transform``, as the DataModule's ``reference_data()``.
    """
    return trainer.strategy.broadcast(data_digest(data) if trainer.is_global_zero else "")


def data_digest(data: Any) -> str:
    """Returns what :func:`reference_digest` does, from this rank alone."""
    size = len(data.dataset)
    seen = to_uint8_rgb(data[sorted({k * size // 16 for k in range(16)})]["x"])
    parts = (data_fingerprint(data.dataset), repr(data.transform), image_digest(seen))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_LENGTH]
