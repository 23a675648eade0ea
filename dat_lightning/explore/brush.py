"""A brush: a picture to paint on, in the browser, and the pixels that were painted as a mask."""

from collections.abc import Sequence
from typing import Any

import streamlit as st
import torch
from torch import Tensor

from dat_lightning.explore.markup import MARK
from dat_lightning.pages.rendering import png_uri

# Smallest side of the canvas, in pixels of the screen; what is smaller is enlarged by a whole number.
_SIDE = 320

_HTML = '<canvas></canvas><button type="button">Start over</button>'

_CSS = """
canvas { display: block; width: 100%; max-width: 400px; cursor: crosshair; touch-action: none; border-radius: 4px; }
button { margin-top: 8px; padding: 4px 12px; font: inherit; color: inherit; background: none; border-radius: 8px;
  border: 1px solid color-mix(in srgb, currentColor 25%, transparent); cursor: pointer; }
"""

# Streamlit calls it with each run of the page: what is painted stays, as long as the picture is the same.
_JS = """
export default function ({ data, parentElement, setStateValue }) {
  const canvas = parentElement.querySelector("canvas");
  canvas.radius = data.radius;
  if (canvas.shown === data.picture) return;
  canvas.shown = data.picture;
  const { width, height, zoom } = data;
  canvas.width = zoom * width;
  canvas.height = zoom * height;
  const context = canvas.getContext("2d");
  const painted = new Set(data.painted);
  const picture = new Image();
  const draw = () => {
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.fillStyle = data.color;
    for (const place of painted)
      context.fillRect((place % width) * zoom, Math.floor(place / width) * zoom, zoom, zoom);
  };
  const paint = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const y = ((event.clientY - box.top) / box.height) * height;
    for (let i = 0; i < height; i++)
      for (let j = 0; j < width; j++)
        if (Math.hypot(j + 0.5 - x, i + 0.5 - y) <= canvas.radius) painted.add(i * width + j);
    draw();
  };
  const send = () => setStateValue("painted", [...painted].sort((a, b) => a - b));
  canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); paint(event); };
  canvas.onpointermove = (event) => { if (event.buttons) paint(event); };
  canvas.onpointerup = send;
  parentElement.querySelector("button").onclick = () => { painted.clear(); draw(); send(); };
  picture.onload = draw;
  picture.src = data.picture;
}
"""


def draw_brush(picture: bytes, height: int, width: int, radius: float, key: str, first: Sequence[int] = ()) -> Tensor:
    """Shows a picture to paint on, and returns which of its pixels are painted, bool (H, W).

    Args:
        picture: PNG file.
        height: Rows of the mask, over the whole picture.
        width: Its columns.
        radius: Of the brush, in pixels of the mask.
        key: Of this brush; a brush with another key is blank.
        first: Places, row · width + column, that are painted to begin with.
    """
    # Registered anew with each run, which Streamlit takes for the same; its registry may be another one by then.
    brush = st.components.v2.component("dat_lightning_brush", html=_HTML, css=_CSS, js=_JS)
    known = st.session_state.get(key, {}).get("painted", list(first))
    data = {
        "picture": png_uri(picture),
        "height": height,
        "width": width,
        "zoom": max(1, -(-_SIDE // max(height, width))),
        "radius": radius,
        "color": f"{MARK}b0",
        "painted": known,
    }
    painted = brush(key=key, data=data, default={"painted": known}, on_painted_change=lambda: None).painted
    return mask_of(painted, height, width)


def mask_of(painted: Any, height: int, width: int) -> Tensor:
    """Returns the mask, bool (H, W), of painted places.

    Args:
        painted: What a browser says; it may say anything, and what is no place is left out.
        height: Rows.
        width: Columns.
    """
    mask = torch.zeros(height * width, dtype=torch.bool)
    for place in painted if isinstance(painted, list | tuple) else ():
        if isinstance(place, int) and 0 <= place < height * width:
            mask[place] = True
    return mask.view(height, width)
