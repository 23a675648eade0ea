"""Images as eight-bit pixels, as files and feature extractors take them, and the error for those that are none."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dat_lightning.core.errors import InputError

Rounding = Literal["nearest", "truncate"]
"""How a value in [0, 1] becomes one of 256 levels: 255·x to the nearest one, or cut, which makes 0.999 a 254."""


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


def to_uint8_rgb(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Returns uint8 images (N, 3, H, W) from images (N, C, H, W) in [0, 1]; grey ones (C = 1) are repeated.

    Images that were eight bits before keep their levels either way.

    Args:
        images: Float images.
        rounding: How values become levels.

    Raises:
        InputError: If the images have neither one nor three channels.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"images must have shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    levels = images.detach() * 255
    levels = levels.round() if rounding == "nearest" else levels.floor()
    pixels = levels.clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1) if images.shape[1] == 1 else pixels


def resized_by_pil(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Returns uint8 images (…, height, width) from such of any height and width, resized by PIL, bilinear.

    PIL and torch differ by a level or two; both smooth what becomes smaller. The ratio of the sides is not kept.

    Args:
        pixels: uint8, (…, H, W); every plane is resized alone, as PIL does with the channels of an image.
        size: Height and width.
    """
    height, width = size
    if pixels.shape[-2:] == (height, width):
        return pixels
    planes = pixels.detach().cpu().reshape(-1, *pixels.shape[-2:]).numpy()
    resized = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in planes]
    made = torch.from_numpy(np.stack([np.asarray(plane) for plane in resized]))
    return made.reshape(*pixels.shape[:-2], height, width).to(pixels.device)
