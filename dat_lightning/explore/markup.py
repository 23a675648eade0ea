"""Pieces of the page as HTML: pictures whose pixels stay pixels, and the table of classes with its bars."""

import io
from collections.abc import Collection, Sequence
from html import escape

from PIL import Image
from torch import Tensor

from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.explore.explorer import Reading
from dat_lightning.pages.rendering import png_uri
from dat_lightning.sampling.picture_grids import signed_difference

# What the page marks: the target of a walk, and the most likely class.
MARK, FIRST = "#e4572e", "#2f6fde"

# Other colours come from the page's own text colour, so that they are readable on light and on dark.
STYLE = f"""
<style>
[data-testid=stMainBlockContainer] {{ padding-top: 2.5rem; max-width: 1200px; }}
.dat-figures {{ display: grid; gap: 12px; }}
.dat-figures figure {{ margin: 0; min-width: 0; }}
.dat-figures img {{ display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px;
  border: 1px solid color-mix(in srgb, currentColor 25%, transparent); }}
.dat-figures figcaption {{ margin-top: 4px; font-size: 0.85rem; line-height: 1.35; overflow-wrap: anywhere; }}
.dat-figures small {{ display: block; opacity: 0.75; font-variant-numeric: tabular-nums; }}
.dat-figures .dat-current img {{ outline: 3px solid {MARK}; outline-offset: -1px; }}
.dat-classes {{ width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
.dat-classes th, .dat-classes td {{ padding: 3px 8px; text-align: right; border: 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 15%, transparent); }}
.dat-classes th {{ font-weight: 600; }}
.dat-classes th:first-child, .dat-classes td:first-child {{ padding-left: 0; text-align: left;
  overflow-wrap: anywhere; }}
.dat-classes td.dat-bar {{ width: 45%; min-width: 60px; }}
.dat-bar i {{ display: block; height: 0.8em; min-width: 1px; border-radius: 2px; background: #7c8db5; }}
.dat-classes tr.dat-first td {{ font-weight: 700; }}
.dat-classes tr.dat-first i {{ background: {FIRST}; }}
.dat-classes tr.dat-target i {{ background: {MARK}; }}
.dat-energy {{ margin: 0 0 6px; font-size: 1rem; }}
.dat-energy b {{ font-size: 1.35rem; font-variant-numeric: tabular-nums; }}
</style>
"""

# Classes in the table.
_ROWS = 10


def number(value: float, digits: int = 3) -> str:
    """Returns a number as the page writes it, with a true minus sign."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def picture(image: Tensor, limit: int | None = None) -> bytes:
    """Returns an image (C, H, W) in [0, 1] as a PNG file, pixel for pixel unless it is larger than ``limit``."""
    return _png(to_uint8_rgb(image.unsqueeze(0))[0], limit)


def difference(changed: Tensor, original: Tensor) -> tuple[bytes, float]:
    """Returns the signed difference of two images around grey as a PNG file, and what white stands for."""
    scale = max(float((changed - original).abs().max()), 1 / 255)
    return _png(signed_difference(changed.unsqueeze(0), original.unsqueeze(0), scale)[0]), scale


def figures(
    entries: Sequence[tuple[bytes, str, str]], width: int, current: int | None = None, stretch: bool = False
) -> str:
    """Returns pictures side by side, as many in a row as fit.

    Args:
        entries: PNG file, caption, and smaller print below it.
        width: Smallest width of a picture, in pixels of the screen.
        current: Which one has a frame.
        stretch: Whether all share one row, however narrow.
    """
    columns = f"repeat({len(entries)}, minmax(0, 1fr))" if stretch else f"repeat(auto-fill, minmax({width}px, 1fr))"
    limit = f"; max-width: {len(entries) * (width + 12)}px" if stretch else ""
    parts = [f'<div class="dat-figures" style="grid-template-columns: {columns}{limit}">']
    for place, (png, caption, small) in enumerate(entries):
        mark = ' class="dat-current"' if place == current else ""
        text = f"{escape(caption)}<small>{escape(small)}</small>" if small else escape(caption)
        parts.append(
            f'<figure{mark}><img src="{png_uri(png)}" alt="{escape(caption)}"><figcaption>{text}</figcaption></figure>'
        )
    return "".join([*parts, "</div>"])


def class_table(reading: Reading, names: Sequence[str], also: Collection[int] = ()) -> str:
    """Returns E(x), and p(y|x) and E(x, y) of classes; of more than ten, the most likely ones and those in ``also``.

    Args:
        reading: What the network says.
        names: Of the classes.
        also: Classes to show and mark in any case: a target.
    """
    p, energies = reading.probabilities, reading.joint_energies
    if len(names) <= _ROWS:
        shown = list(range(len(names)))
    else:
        best = p.argsort(descending=True)[:_ROWS].tolist()
        shown = best + [k for k in also if k not in best]
    rows = []
    for k in shown:
        kind = " ".join(["dat-first"] * (k == reading.prediction) + ["dat-target"] * (k in also))
        rows.append(
            f'<tr class="{kind}"><td>{escape(names[k])}</td>'
            f'<td class="dat-bar"><i style="width: {100 * float(p[k]):.1f}%"></i></td>'
            f"<td>{number(float(p[k]), 4)}</td><td>{number(float(energies[k]))}</td></tr>"
        )
    head = "<tr><th>class y</th><th></th><th>p(y|x)</th><th>E(x, y)</th></tr>"
    energy = f'<p class="dat-energy">E(x) = <b>{number(reading.energy)}</b></p>'
    more = f"<p><small>{len(names) - len(shown)} less likely classes are not shown.</small></p>"
    table = f'<table class="dat-classes"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
    return energy + table + (more if len(shown) < len(names) else "")


def _png(pixels: Tensor, limit: int | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    if limit is not None:
        image.thumbnail((limit, limit))
    image.save(file, "PNG")
    return file.getvalue()
