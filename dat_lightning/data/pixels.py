"""Images as eight-bit pixels, as files and feature extractors take them, and the error for those that are none."""

import torch
from torch import Tensor

from dat_lightning.core.errors import InputError


class CorruptImageError(InputError):
    """An image that cannot be read: truncated, damaged, gone, or no image at all.

    A data set raises it for the entry concerned; training and evaluation go on without that entry and count it.

    Args:
        name: Path or record of the image.
        reason: What is wrong with it. Without one, ``name`` is the whole message: a loader process hands errors over
            as text alone, and the type of the error is to survive that.
    """

    def __init__(self, name: str, reason: str | None = None) -> None:
        super().__init__(name if reason is None else f"{name} is not a readable image: {reason}")
        self.name = name


def to_uint8_rgb(images: Tensor) -> Tensor:
    """Returns uint8 images (N, 3, H, W) from images (N, C, H, W) in [0, 1]; grey ones (C = 1) are repeated.

    Values are rounded to the nearest level, so that 0.999 becomes 255.

    Raises:
        InputError: If the images have neither one nor three channels.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"images must have shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    pixels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1) if images.shape[1] == 1 else pixels
