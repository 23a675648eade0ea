"""Grids of tiles with captions, and which images they show."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_lightning.sampling.picture_grids import Shortlist, Tile, captioned_grid, signed_difference

GREEN, BLUE, RED = (10, 200, 30), (10, 20, 250), (200, 30, 30)


def tile(color: tuple[int, int, int], caption: str = "", marked: bool = False, side: int = 8) -> Tile:
    return Tile(torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).expand(3, side, side), caption, marked)


def count(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((pixels == color).all(2).sum())


def drawn(rows: Sequence[Sequence[Tile | None]], title: str = "title", names: tuple[str, ...] = ()) -> np.ndarray:
    return np.array(captioned_grid(rows, title, names))


def test_every_tile_is_shown_whole_and_enlarged() -> None:
    rows: list[list[Tile | None]] = [
        [tile(GREEN, "one"), None, tile(GREEN)],
        [tile(BLUE, "a caption wider than its tile is"), tile(GREEN)],
    ]
    pixels = drawn(rows, names=("first", "second"))
    # 8 pixels become 96: nothing is covered by captions, names or neighbours.
    assert count(pixels, GREEN) == 3 * 96 * 96
    assert count(pixels, BLUE) == 96 * 96
    assert count(pixels, RED) == 0


def test_large_images_keep_their_size() -> None:
    assert count(drawn([[tile(GREEN, side=120)]]), GREEN) == 120 * 120


def test_a_marked_tile_has_a_frame() -> None:
    pixels = drawn([[tile(GREEN), tile(BLUE, marked=True)]])
    assert count(pixels, RED) == 102 * 102 - 96 * 96
    ys, xs = np.nonzero((pixels == RED).all(2))
    inner = np.nonzero((pixels == BLUE).all(2))
    assert ys.min() == inner[0].min() - 3
    assert xs.max() == inner[1].max() + 3


def test_a_long_title_is_broken() -> None:
    short, long = (drawn([[tile(GREEN)]], title) for title in ("word", "word " * 60))
    assert short.shape[1] < long.shape[1] <= 5 * 96
    assert long.shape[0] > short.shape[0] + 60
    assert count(long, GREEN) == 96 * 96


def test_a_grid_needs_tiles() -> None:
    with pytest.raises(ValueError, match="rows must have at least one tile, got none"):
        captioned_grid([[None]], "title")


def test_differences_lie_around_grey() -> None:
    original = torch.full((1, 1, 1, 3), 0.5)
    changed = original + torch.tensor([0.0, 0.2, -0.1])
    levels = signed_difference(changed, original, scale=0.2)
    assert levels.shape == (1, 3, 1, 3)
    assert levels[0, 0, 0].tolist() == [128, 255, 64]


def test_a_shortlist_keeps_the_first_by_key() -> None:
    torch.manual_seed(0)
    keys: Tensor = torch.randint(0, 60, (100,))
    order = sorted(range(100), key=lambda i: (int(keys[i]), i))[:7]
    for size in (100, 9):
        shortlist = Shortlist(7)
        for rows in torch.randperm(100).split(size):
            shortlist.add(keys[rows].tolist(), rows.tolist(), {"value": rows * 2.0})
        kept = shortlist.gathered()
        assert kept["index"].tolist() == order
        assert kept["value"].tolist() == [2.0 * i for i in order]
        assert kept["key"].tolist() == [int(keys[i]) for i in order]
