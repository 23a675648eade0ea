"""The check of pixels: images are floats in [0, 1], to within what rounding does to them."""

import torch
from torch import Tensor

from dat_lightning.core.errors import InputError

ROUNDING = 1e-3
"""How far from [0, 1] a pixel may lie, by a transform's rounding or half precision: a quarter of an eight-bit level."""


def require_pixels(images: Tensor, what: str, *, allow_nan: bool = False) -> None:
    """Raises an InputError unless all pixels lie in [0, 1], to within :data:`ROUNDING`; waits for a device.

    Args:
        images: Any shape.
        what: What they are; begins the message.
        allow_nan: Whether NaN and infinite pixels are somebody else's matter.
    """
    values = images.detach().flatten()
    values = values[values.isfinite()] if allow_nan else values
    if values.numel() == 0:
        return
    low, high = map(float, torch.aminmax(values.float()))
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise InputError(
            f"{what} must be images in [0, 1], got values in [{low:.4g}, {high:.4g}]: let the data give raw pixels;"
            " normalisation belongs into the network (mean and std of EnergyModel)"
        )
