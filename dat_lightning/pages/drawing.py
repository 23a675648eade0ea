"""Diagrams as files and data URIs, in one style, with matplotlib, which is imported when something is drawn."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dat_lightning.core.errors import InputError

# Style files of this folder, by the names under which matplotlib finds them.
LIGHT = ("dat_lightning.pages.light",)
DARK = (*LIGHT, "dat_lightning.pages.dark")

# Told apart on white and on dark blue, and by most people who confuse red and green.
PALETTE = ("#2b7fd4", "#d9822b", "#2a9d74", "#c2557f", "#8a72d1", "#8b8f2a", "#64748b")
NEUTRAL = "#8493a8"

Drawing = Callable[[], Any]

# Where a name may stand beside its point, in 1/72 inch, with its alignments; the best come first. Off the point's own
# row and column, where its error bars are.
_PLACES = (
    (9, 6, "left", "bottom"),
    (-9, 6, "right", "bottom"),
    (9, -6, "left", "top"),
    (-9, -6, "right", "top"),
    (0, 10, "center", "bottom"),
    (0, -10, "center", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
)


def require_matplotlib(extra: str = "reports") -> ModuleType:
    """Returns ``matplotlib.pyplot``.

    Args:
        extra: The extra of this package that brings it.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise InputError(f"plots need matplotlib: pip install 'dat-lightning[{extra}]'") from error
    return plt


def label(name: str) -> str:
    """Returns a name as text in a plot: with spaces, and with dollars that begin no formula."""
    return name.replace("_", " ").replace("$", r"\$")


def write_beside(
    figure: Any,
    axes: Any,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    colors: Sequence[str] | None = None,
) -> None:
    """Writes names beside points, each where it covers no other point and no name, if there is such a place.

    Args:
        figure: Has the axes.
        axes: Where the points are.
        points: In the units of the axes.
        names: One for each.
        colors: Of the names; by default that of the axis' label, and grey where no place is free.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    centers = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in centers]
    for k, (point, name) in enumerate(zip(points, names, strict=True)):
        others = taken[:k] + taken[k + 1 :]
        tried: list[tuple[int, Any, Any]] = []
        for dx, dy, across, up in _PLACES:
            text = axes.annotate(name, point, (dx, dy), textcoords="offset points", ha=across, va=up, fontsize=9)
            box = text.get_window_extent()
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            tried.append((sum(box.overlaps(other) for other in others) + outside, text, box))
            if tried[-1][0] == 0:
                break
        covered, best, box = min(tried, key=lambda each: each[0])
        for _, text, _ in tried:
            if text is not best:
                text.remove()
        best.set_color(colors[k] if colors is not None else NEUTRAL if covered else axes.yaxis.label.get_color())
        taken.append(box)


def svg_uri(draw: Drawing, styles: Sequence[str] = LIGHT) -> str:
    """Returns the figure that ``draw`` makes, as a data URI."""
    contents = _drawn(draw, styles, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(contents).decode()


def write_png(path: Path, draw: Drawing, dots_per_inch: int = 160) -> None:
    """Writes the figure that ``draw`` makes as a PNG on white."""
    path.write_bytes(_drawn(draw, LIGHT, format="png", dpi=dots_per_inch, metadata={"Software": None}))


def _drawn(draw: Drawing, styles: Sequence[str], **options: Any) -> bytes:
    plt = require_matplotlib()
    buffer = io.BytesIO()
    with plt.style.context(list(styles)):
        figure = draw()
        figure.savefig(buffer, **options)
        plt.close(figure)
    return buffer.getvalue()
