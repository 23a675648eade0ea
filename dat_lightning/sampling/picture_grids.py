"""Pictures that need words: which images are shown, grids of tiles with captions, and differences around grey."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.results.gathering import Values, gather

_TILE_SIDE = 96
_GAP = 10
_FRAME = 3
_FONT_SIZE = 13
_LINE = 17
_INK, _MARK, _PAPER = (30, 41, 59), (200, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Tile:
    """One image of a grid.

    Attributes:
        image: uint8, (3, H, W).
        caption: Lines below it; Pillow's own font has ASCII letters alone.
        marked: Whether it gets a red frame.
    """

    image: Tensor
    caption: str = ""
    marked: bool = False


class Shortlist:
    """Keeps those images that come first by a key, over all batches and ranks.

    The choice depends on keys and indices alone, not on batches, their order or the number of ranks.

    Args:
        size: How many to keep.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: dict[int, tuple[float, Values]] = {}

    def add(self, keys: Sequence[float], indices: Sequence[int], values: Values) -> None:
        """Considers a batch.

        Args:
            keys: The smallest are kept; of equal ones, those with the smaller index.
            indices: Global indices.
            values: What to keep of each example, (N, …) each.
        """
        ranked = sorted(zip(keys, indices, range(len(indices)), strict=True))[: self.size]
        for key, index, place in ranked:
            self._entries[index] = (key, {name: value[place].detach().cpu() for name, value in values.items()})
        best = sorted(self._entries, key=lambda index: (self._entries[index][0], index))[: self.size]
        self._entries = {index: self._entries[index] for index in best}

    def gathered(self) -> Values:
        """Returns what is kept, smallest key first, with its ``index`` and ``key``; every rank must call it."""
        entries = sorted(self._entries.items())
        mine: list[Values] = []
        if entries:
            names = entries[0][1][1]
            mine = [{name: torch.stack([values[name] for _, (_, values) in entries]) for name in names}]
            mine[0]["index"] = torch.tensor([index for index, _ in entries])
            mine[0]["key"] = torch.tensor([key for _, (key, _) in entries])
        everything = gather(mine)
        # Sorted by index before, so a stable order by key is the one of add().
        order = everything["key"].argsort(stable=True)[: self.size]
        return {name: value[order] for name, value in everything.items()}


def signed_difference(changed: Tensor, original: Tensor, scale: float) -> Tensor:
    """Returns ``changed`` − ``original`` as uint8 (N, 3, H, W): grey is 0, white +``scale`` and black −``scale``.

    Args:
        changed: Shape (N, C, H, W), C = 1 or 3.
        original: Likewise.
        scale: Positive.
    """
    return to_uint8_rgb(0.5 + (changed - original).float() / (2 * scale))


def captioned_grid(rows: Sequence[Sequence[Tile | None]], title: str, row_names: Sequence[str] = ()) -> Image.Image:
    """Returns a picture of captioned tiles, small images enlarged by a whole number.

    Args:
        rows: Tiles of equal size; ``None`` leaves a place empty.
        title: Above the grid, broken into lines where it does not fit.
        row_names: Left of the rows.

    Raises:
        InputError: If there is no tile.
    """
    tiles = [tile for row in rows for tile in row if tile is not None]
    if not tiles:
        raise InputError("rows must have at least one tile, got none")
    font = ImageFont.load_default(size=_FONT_SIZE)
    zoom = max(1, -(-_TILE_SIDE // max(tiles[0].image.shape[-2:])))
    height, width = (zoom * side for side in tiles[0].image.shape[-2:])
    words = [line for tile in tiles for line in tile.caption.split("\n")]
    cell_width = int(max([width, *(font.getlength(line) for line in words)])) + _GAP
    heights = [height + _FRAME + _LINE * _num_lines(row) + _GAP for row in rows]
    left = _GAP + int(max((font.getlength(name) + _GAP for name in row_names), default=0))
    total = left + cell_width * max(len(row) for row in rows)
    lines = _broken(title, font, max(total, 4 * _TILE_SIDE) - 2 * _GAP)
    top = 2 * _GAP + _LINE * len(lines)
    total = max(total, int(max(font.getlength(line) for line in lines)) + 2 * _GAP)
    canvas = Image.new("RGB", (total, top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((_GAP, _GAP), "\n".join(lines), fill=_INK, font=font, spacing=_LINE - _FONT_SIZE)
    for r, row in enumerate(rows):
        y = top + sum(heights[:r])
        if r < len(row_names):
            draw.text((_GAP, y + (height - _FONT_SIZE) // 2), row_names[r], fill=_INK, font=font)
        for c, tile in enumerate(row):
            if tile is not None:
                _paste(canvas, draw, tile, (left + c * cell_width, y), (width, height), font)
    return canvas


def _num_lines(row: Sequence[Tile | None]) -> int:
    return max((len(tile.caption.split("\n")) for tile in row if tile is not None and tile.caption), default=0)


def _paste(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    tile: Tile,
    corner: tuple[int, int],
    size: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = corner
    width, height = size
    if tile.marked:
        draw.rectangle((x - _FRAME, y - _FRAME, x + width + _FRAME - 1, y + height + _FRAME - 1), fill=_MARK)
    image = Image.fromarray(tile.image.permute(1, 2, 0).contiguous().cpu().numpy())
    canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), corner)
    color = _MARK if tile.marked else _INK
    for number, line in enumerate(tile.caption.split("\n")):
        draw.text((x, y + height + _FRAME + number * _LINE), line, fill=color, font=font)


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """The text in lines that are at most that wide, as far as its words allow."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
