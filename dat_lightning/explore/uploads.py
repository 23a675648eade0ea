"""Images that people bring along: any size, mode and orientation, as the network's images; or one sentence why not."""

import io
import math
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.data.images import FORMATS, eight_bit_grey

MAX_PIXELS = 25_000_000
MAX_MEGABYTES = 20
# A JPEG file may paint the whole image once for every few bytes: pixels times scans.
_MAX_PAINTED = 10**10

# TIFF's tags.
_TILE_WIDTH, _TILE_LENGTH = 322, 323

# What one image takes in memory, a dozen at once would take a dozen times.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Upload:
    """An image as the network takes it.

    Attributes:
        image: Shape (C, H, W), in [0, 1].
        notes: What was changed on the way, a sentence each.
    """

    image: Tensor
    notes: tuple[str, ...]


def read_upload(data: bytes, name: str, image_shape: tuple[int, int, int], invert: bool = False) -> Upload:
    """Returns the image in a file's bytes, turned upright, cropped to the middle, and scaled to the network's size.

    Sixteen-bit grey is scaled, palettes, CMYK and grey are converted to the network's channels, transparent pixels are
    laid on white, and of several frames the first is taken. An image of the network's size keeps its pixels. Threads
    take turns.

    Args:
        data: The file.
        name: What it is called, for messages.
        image_shape: Channels (1 or 3), height and width.
        invert: Whether to swap light and dark, for networks that know light strokes on dark paper.

    Raises:
        InputError: If it is empty, too large, damaged, or no image; or the network takes neither grey nor colour.
    """
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise InputError(f"files hold grey or colour images, but this network takes {channels} channels")
    if not data:
        raise InputError(f"{name} is empty")
    if len(data) > MAX_MEGABYTES << 20:
        raise InputError(f"{name} has {len(data) / (1 << 20):.0f} MB; at most {MAX_MEGABYTES} are taken")
    with _ONE_AT_A_TIME:
        image, notes = _decoded(data, name, (width, height))
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = torch.from_numpy(np.asarray(image).copy()).view(height, width, channels).permute(2, 0, 1).float() / 255
    if invert:
        pixels, notes = 1 - pixels, [*notes, "light and dark swapped"]
    return Upload(pixels.contiguous(), tuple(notes))


def _decoded(data: bytes, name: str, size: tuple[int, int]) -> tuple[Image.Image, list[str]]:
    try:
        with warnings.catch_warnings():
            # The size is checked below, and details of damaged metadata are for nobody here.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # Counting the frames would read the whole file.
                notes = ["the first of several frames was taken"] if getattr(image, "is_animated", False) else []
                image.seek(0)
                _check_header(image, data, name)
                fitted, changes = _fitted(image, size)
                return fitted, notes + changes
    except UnidentifiedImageError:
        raise InputError(f"{name} is no image of a kind that is read here: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} has too many pixels; at most {MAX_PIXELS // 10**6} million are taken") from None
    except _RefusedError as error:
        raise InputError(str(error)) from None
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name} is damaged: {reason}") from error


class _RefusedError(Exception):
    pass


def _check_header(image: Image.Image, data: bytes, name: str) -> None:
    # No pixel is decoded so far.
    tags = getattr(image, "tag_v2", {})
    width, height = max(image.size, (tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)), key=math.prod)
    if width * height > MAX_PIXELS:
        raise _RefusedError(f"{name} has {width}×{height} pixels; at most {MAX_PIXELS // 10**6} million are taken")
    if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) * width * height > _MAX_PAINTED:
        raise _RefusedError(f"{name} paints {width}×{height} pixels {scans} times, which takes too long")
    if image.mode in ("I", "F") and image.format not in ("PNG", "PPM"):
        raise _RefusedError(f"{name} has pixels of mode {image.mode!r}, for which there is no agreed white")


def _fitted(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, list[str]]:
    """An eight-bit image of a size, grey or RGB, as a camera's EXIF says it should be looked at; and what was changed.

    As few copies as can be are made before it is small.
    """
    notes = []
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode.startswith("I"):
        image = eight_bit_grey(image)
    elif image.mode not in ("L", mode):
        image = image.convert(mode)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        notes.append("transparent parts were laid on white")
    if image.size != size:
        notes.append(f"cropped and scaled from {image.width}×{image.height} to {size[0]}×{size[1]}")
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    return image, notes
