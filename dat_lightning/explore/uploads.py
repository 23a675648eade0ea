"""Images that people bring along: any size, mode and orientation, as the network's images; or one sentence why not."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.data.images import FORMATS, eight_bit_grey

MAX_PIXELS = 50_000_000
MAX_MEGABYTES = 20


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
    laid on white, and of several frames the first is taken. An image of the network's size keeps its pixels.

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
    image, notes = _decoded(data, name)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        notes.append(f"cropped and scaled from {image.width}×{image.height} to {width}×{height}")
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy()).view(height, width, channels).permute(2, 0, 1).float() / 255
    if invert:
        pixels, notes = 1 - pixels, [*notes, "light and dark swapped"]
    return Upload(pixels.contiguous(), tuple(notes))


def _decoded(data: bytes, name: str) -> tuple[Image.Image, list[str]]:
    try:
        with warnings.catch_warnings():
            # The size is checked below, and details of damaged metadata are for nobody here.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image, name)
                return _upright(image)
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


def _check_size(image: Image.Image, name: str) -> None:
    # The header alone is read so far.
    if image.width * image.height > MAX_PIXELS:
        raise _RefusedError(
            f"{name} has {image.width}×{image.height} pixels; at most {MAX_PIXELS // 10**6} million are taken"
        )
    if image.mode in ("I", "F") and image.format not in ("PNG", "PPM"):
        raise _RefusedError(f"{name} has pixels of mode {image.mode!r}, for which there is no agreed white")


def _upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """An eight-bit image, grey or RGB, as a camera's EXIF says it should be looked at; and what was changed."""
    notes = []
    frames = int(getattr(image, "n_frames", 1))
    if frames > 1:
        notes.append(f"the first of {frames} frames was taken")
        image.seek(0)
    image.load()
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        return eight_bit_grey(turned), notes
    if turned.has_transparency_data:
        layered = turned.convert("RGBA")
        if layered.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent parts were laid on white")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB"), notes
    return (turned if turned.mode in ("L", "RGB") else turned.convert("RGB")), notes
