"""Where the pixels of an augmented image come from: shifts and flips, undone by their own draw."""

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import get_size

from dat_lightning.core.errors import InputError
from dat_lightning.data.draws import DrawStream

# Places as pixels in [0, 1], exact in float32 up to four thousand pixels a side.
_SCALE = 2.0**-24


def image_size(stream: DrawStream, draws: list[int]) -> tuple[int, int]:
    """Returns height and width that the images of some draws have in their data set.

    Raises:
        InputError: If they differ.
    """
    sizes = sorted({tuple(get_size(stream.unaugmented(draw))) for draw in draws})
    if len(sizes) > 1:
        found = ", ".join(f"{height}×{width}" for height, width in sizes[:3])
        raise InputError(f"the images of the {stream.name!r} stream must all have one size, got {found}")
    height, width = sizes[0]
    return height, width


def pixel_places(stream: DrawStream, draws: list[int], size: tuple[int, int]) -> Tensor:
    """Returns which pixel of its data set's image each pixel of a draw is, (N, H·W) int64, −1 where it is none of them.

    The stream's augmentation is applied to an image whose values are the numbers of its pixels, with each draw's own
    random numbers. Its second channel counts backwards, so that whatever changes values is noticed.

    Args:
        stream: The stream.
        draws: Numbers of the draws.
        size: Height and width of the data set's images.

    Raises:
        InputError: If the augmentation does more than to move, mirror or cover pixels.
    """
    count = size[0] * size[1]
    numbers = torch.arange(1, count + 1, dtype=torch.float32).view(1, *size)
    image = torch.cat([numbers, count + 1 - numbers, numbers]) * _SCALE
    moved = torch.stack([stream.replayed(draw, image) for draw in draws]).flatten(2) / _SCALE
    forwards, backwards, _ = moved.unbind(1)
    whole = (forwards == forwards.round()) & (forwards + backwards == count + 1)
    if not bool((whole | ((forwards == 0) & (backwards == 0))).all()):
        raise InputError(
            f"the augmentation of the {stream.name!r} stream does more than to move pixels, so that a perturbation of"
            " an image cannot be carried through it: leave shifts, flips and covers alone, or begin attacks anew"
        )
    return forwards.long() - 1
