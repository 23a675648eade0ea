"""``python -m tests.explore.screenshot CHECKPOINT OUTPUT``: the picture of the page in the documentation."""

import io
import sys
from pathlib import Path

from PIL import Image

from tests.explore.server import chromium, serving, visit

_WIDTH = 1240


def main(checkpoint: Path, output: Path) -> None:
    """Writes the page with a counterfactual as a PNG file of 256 colours."""
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
        picture = page.screenshot(clip=clip)
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(output, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
