"""What pages are made of: the frame, plots that follow the reader's colour scheme, pictures, lists of settings."""

import base64
import html
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dat_lightning.pages.drawing import DARK, LIGHT, Drawing, svg_uri

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Pictures up to this width are enlarged, with square pixels.
_SMALL = 400


def html_page(title: str, sections: Sequence[str], css: str) -> str:
    """Returns a page that needs neither a network nor other files.

    Args:
        title: Text.
        sections: HTML.
        css: Style sheet.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def plot(draw: Drawing, description: str, caption: str, *, broad: bool = False) -> str:
    """Returns the figure that ``draw`` makes, once for light and once for dark pages.

    Args:
        draw: Makes a matplotlib figure.
        description: What it shows, as text for those who do not see it.
        caption: HTML.
        broad: Whether it takes the whole width where plots stand side by side.
    """
    kind = ' class="broad"' if broad else ""
    return (
        f'<figure{kind}><picture><source media="(prefers-color-scheme: dark)" srcset="{svg_uri(draw, DARK)}">'
        f'<img class="plot" alt="{html.escape(description)}" src="{svg_uri(draw, LIGHT)}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def picture(path: Path, caption: str) -> str:
    """Returns a PNG file inside the page; if it cannot be read, a sentence that says so.

    Args:
        path: The file.
        caption: Text.
    """
    try:
        contents = path.read_bytes()
    except OSError as error:
        return f"<p>{html.escape(f'The picture {path} cannot be read: {error.strerror}.')}</p>"
    if not contents.startswith(_PNG_SIGNATURE) or len(contents) < 24:
        return f"<p>{html.escape(f'The picture {path} is no PNG file.')}</p>"
    (width,) = struct.unpack(">I", contents[16:20])
    kind = "picture small" if width <= _SMALL else "picture"
    uri = "data:image/png;base64," + base64.b64encode(contents).decode()
    text = html.escape(caption)
    return f'<figure><img class="{kind}" alt="{text}" src="{uri}"><figcaption>{text}</figcaption></figure>'


def settings(values: Mapping[str, Any]) -> str:
    """Returns a list of names and values; nested ones become names with dots, long lists are cut."""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _flat(values))
    return f"<dl>{rows}</dl>"


def breakable(name: str) -> str:
    """Returns a name as HTML that may be broken after an underscore."""
    return html.escape(name).replace("_", "_<wbr>")


def number(value: float) -> str:
    """Returns a number as tables show it: four significant digits, the same minus as in print."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.4g}" if abs(value) < 1e4 or abs(value) >= 1e7 else f"{value:.0f}"
    return text.replace("-", "−")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
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
