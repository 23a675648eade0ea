"""What pages are made of: Jinja2 templates, plots for light and dark pages, pictures, numbers and settings as text."""

import base64
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from dat_lightning.pages.drawing import DARK, LIGHT, Drawing, svg_uri
from dat_lightning.results.evaluation_file import write_text

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Pictures up to this width are enlarged, with square pixels.
_SMALL = 400


class Plot(NamedTuple):
    """A diagram in a page.

    Attributes:
        light: Data URI for light pages.
        dark: The same for dark ones.
        description: What it shows, for those who do not see it.
        caption: What stands below; ``Markup`` is HTML, other text is not.
        broad: Whether it takes the whole width where plots stand side by side.
    """

    light: str
    dark: str
    description: str
    caption: str
    broad: bool = False


class Picture(NamedTuple):
    """A PNG file in a page.

    Attributes:
        caption: Text.
        uri: Its contents.
        problem: Why it cannot be shown, a sentence; empty if it can.
        small: Whether it is enlarged.
    """

    caption: str
    uri: str = ""
    problem: str = ""
    small: bool = False


def write_page(path: Path, template: str, **values: Any) -> None:
    """Writes a page that needs neither a network nor other files, whole or not at all.

    Args:
        path: The file.
        template: Name of a file in ``templates``; text in it is escaped.
        values: What the template uses; ``title`` among them.
    """
    environment = Environment(
        loader=PackageLoader("dat_lightning.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, "flat": flat, "number": number}
    write_text(path, environment.get_template(template).render(values))


def plot(draw: Drawing, description: str, caption: str, *, broad: bool = False) -> Plot:
    """Returns the matplotlib figure that ``draw`` makes, drawn once for light and once for dark pages."""
    return Plot(svg_uri(draw, LIGHT), svg_uri(draw, DARK), description, caption, broad)


def picture(path: Path, caption: str) -> Picture:
    """Returns the contents of a PNG file; if it cannot be read, a sentence that says so."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        return Picture(caption, problem=f"The picture {path} cannot be read: {error.strerror}.")
    if not contents.startswith(_PNG_SIGNATURE) or len(contents) < 24:
        return Picture(caption, problem=f"The picture {path} is no PNG file.")
    (width,) = struct.unpack(">I", contents[16:20])
    return Picture(caption, png_uri(contents), small=width <= _SMALL)


def png_uri(contents: bytes) -> str:
    """Returns the contents of a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(contents).decode()


def array_uri(pixels: NDArray[np.uint8]) -> str:
    """Returns pixels, (H, W) or (H, W, 3), as a PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return png_uri(file.getvalue())


def breakable(name: str) -> Markup:
    """Returns a name as HTML that may be broken after an underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def number(value: float) -> str:
    """Returns a number as tables show it: four significant digits, the same minus as in print."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.4g}" if abs(value) < 1e4 or abs(value) >= 1e7 else f"{value:.0f}"
    return text.replace("-", "−")


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns names and values as text; nested ones get names with dots, long lists are cut."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _text(value)))
    return rows


def _text(value: Any, most: int = 12) -> str:
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        shown = ", ".join(_text(each, 4) for each in value[:most])
        return shown if len(value) <= most else f"{shown}, … ({len(value)} in all)"
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_text(each, 4)}" for name, each in value.items())
    return str(value)
