"""``python -m tests.explore.screenshot CHECKPOINT OUTPUT``: the pictures of the page in the documentation."""

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.explore.server import chromium, serving, visit

_WIDTH = 1240
# Corners of the brush's way, as shares of the picture.
_STROKE = ((0.2, 0.55), (0.85, 0.55), (0.85, 0.7), (0.2, 0.7), (0.2, 0.85), (0.85, 0.85))


def main(checkpoint: Path, output: Path) -> None:
    """Writes the page with a counterfactual, and as ``…-filling`` that with a brush, as PNG files of 256 colours."""
    with serving(checkpoint) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": _WIDTH, "height": 900}, color_scheme="light")
        visit(page, address)
        page.get_by_role("button", name="Find the counterfactual").click()
        charts = page.locator("[data-testid=stVegaLiteChart] svg")
        charts.nth(1).wait_for()
        # The page scrolls inside itself, so that the window has to be as high as all of it.
        height = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
        page.set_viewport_size({"width": _WIDTH, "height": height})
        page.wait_for_timeout(3000)
        bottom = charts.nth(1).bounding_box()
        clip = {"x": 0, "y": 0, "width": _WIDTH, "height": bottom["y"] + bottom["height"] + 24}
        pictures = {"": page.screenshot(clip=clip), "-filling": _painted(page)}
    output.parent.mkdir(parents=True, exist_ok=True)
    for ending, picture in pictures.items():
        path = output.with_name(f"{output.stem}{ending}.png")
        Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(path, optimize=True)


def _painted(page: Any) -> bytes:
    """Paints over the lower part of the second example, and has it filled in."""
    page.get_by_role("button", name="2", exact=True).click()
    page.get_by_text("Test image 2").last.wait_for()
    page.get_by_role("tab", name="Fill in a part").click()
    canvas = page.locator("canvas[width='320']")
    canvas.wait_for()
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Start over").click()
    box = canvas.bounding_box()
    stroke = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in _STROKE]
    page.mouse.move(*stroke[0])
    page.mouse.down()
    for corner in stroke[1:]:
        page.mouse.move(*corner, steps=25)
    page.mouse.up()
    page.wait_for_timeout(1000)
    button = page.get_by_role("button", name="Fill in", exact=True)
    button.click()
    page.wait_for_timeout(3000)
    bottom = button.bounding_box()
    clip = {"x": 0, "y": 0, "width": _WIDTH, "height": bottom["y"] + bottom["height"] + 40}
    picture: bytes = page.screenshot(clip=clip)
    return picture


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
