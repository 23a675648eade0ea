"""The page in a real browser: what it shows is what torch computes from the checkpoint without the page."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dat_lightning import DigitsDataModule
from dat_lightning.core import Ascent, targeted_logit, unbounded_ascent
from dat_lightning.core.energy import EnergyModel
from dat_lightning.explore import Explorer, open_checkpoint
from tests.explore.conftest import climb, network
from tests.explore.server import CHROMIUM, chromium, serving, visit

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt install chromium"),
]

# Milliseconds, long enough for a machine that is busy with other things.
WAIT = 60_000


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    pytest.importorskip("streamlit", reason="no Streamlit here: pip install 'dat-lightning[browser]'")
    with serving(checkpoint) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="no Playwright here: pip install 'dat-lightning[browser]'")
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A visitor's page; it fails a test if it asked another host for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(WAIT)
    requests: list[str] = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("websocket", lambda websocket: requests.append(websocket.url))
    visit(opened, address)
    yield opened
    context.close()
    own = address.removeprefix("http")
    foreign = [url for url in requests if not url.startswith(("data:", "blob:", f"http{own}", f"ws{own}"))]
    assert any(url.startswith(f"ws{own}") for url in requests)
    assert foreign == []


def rows(page: Any, table: int) -> list[list[str]]:
    """Cells of a table of classes; the first is the reading's, the second the counterfactual's."""
    found = page.locator("table.dat-classes").nth(table).locator("tbody tr")
    return [found.nth(k).locator("td").all_inner_texts() for k in range(found.count())]


def value(text: str) -> float:
    return float(text.replace("−", "-"))


def check_table(page: Any, table: int, model: EnergyModel, image: Tensor) -> None:
    """Waits until a table says what the network says about an image."""
    with torch.no_grad():
        logits = model(image.unsqueeze(0))[0]
    expected = [*logits.softmax(0).tolist(), *(-logits).tolist()]
    for _ in range(WAIT // 250):
        shown = rows(page, table)
        names, numbers = [row[0] for row in shown], [value(row[k]) for k in (2, 3) for row in shown]
        if names == list("0123456789") and numbers == pytest.approx(expected, abs=6e-4):
            return
        # The page is redrawn from top to bottom, and its captions come first.
        page.wait_for_timeout(250)
    assert numbers == pytest.approx(expected, abs=6e-4)


def check_curves(page: Any, model: EnergyModel, states: list[Tensor], target: int) -> None:
    """Reads the points of both plots, as a screen reader does."""
    with torch.no_grad():
        logits = model(torch.stack(states))
    curves = {
        f"p({target}|x)": logits.softmax(1)[:, target],
        f"E(x, {target})": -logits[:, target],
        "E(x)": -logits.logsumexp(1),
    }
    charts = page.locator("[data-testid=stVegaLiteChart]")
    charts.nth(1).locator("[aria-label^='step: ']").first.wait_for()
    labels = charts.locator("[aria-label^='step: ']").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    for name, expected in curves.items():
        patterns = (
            rf"step: (\d+); {re.escape(name)}: (\S+);",
            rf"step: (\d+); energy: (\S+); which: {re.escape(name)}$",
        )
        found = [match for label in labels for pattern in patterns if (match := re.match(pattern, label))]
        points = {int(match[1]): value(match[2]) for match in found}
        assert sorted(points) == list(range(len(states)))
        assert [points[k] for k in sorted(points)] == pytest.approx(expected.tolist(), abs=1e-3)


def choose(page: Any, label: str, option: str) -> None:
    """Chooses from a list, again if the page is redrawn meanwhile."""
    box = page.get_by_role("combobox", name=label, exact=True)
    for _ in range(20):
        box.fill(option)
        page.keyboard.press("Enter")
        page.wait_for_timeout(250)
        if box.input_value() == option:
            return
    pytest.fail(f"{label} does not take {option}")


def pixels(source: str) -> Tensor:
    """What a picture on the page shows, (1, H, W) in [0, 1]."""
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L")
    return torch.from_numpy(np.asarray(image).copy()).unsqueeze(0) / 255


def example(checkpoint: Path, place: int) -> tuple[Tensor, int]:
    examples = open_checkpoint(checkpoint).examples
    assert examples is not None
    image, label = examples[place]
    assert label is not None
    return image, label


def test_an_example_is_read_and_turned_into_another_class(page: Any, checkpoint: Path) -> None:
    model, (image, label) = network(checkpoint), example(checkpoint, 2)
    page.get_by_role("button", name="3", exact=True).click()
    page.get_by_text("Test image 3", exact=False).last.wait_for()
    page.get_by_text(f"labelled {label}").wait_for()
    check_table(page, 0, model, image)

    target = (label + 3) % 10
    page.get_by_label("ε, radius of the ball").fill("2.5")
    page.get_by_label("Steps", exact=True).first.fill("10")
    choose(page, "Target class", str(target))
    page.get_by_role("button", name="Find the counterfactual").click()
    page.get_by_text("At step 10 read as").wait_for()
    states = climb(model, image, target, 10, 2.5 * 2.5 / 10, 2.5)
    check_table(page, 1, model, states[-1])
    length = float((states[-1] - image).norm())
    assert length > 1
    page.get_by_text(f"L2 {length:.3f}"[:-1], exact=False).wait_for()
    shown = page.locator("figure", has=page.get_by_text("Step 10 of 10")).locator("img").get_attribute("src")
    torch.testing.assert_close(pixels(shown), states[-1], atol=1.5 / 255, rtol=0)
    check_curves(page, model, states, target)

    # One step back with the arrow key.
    page.get_by_role("slider").focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("At step 9 read as").wait_for()
    check_table(page, 1, model, states[9])

    # Another image has no counterfactual yet.
    page.get_by_role("button", name="1", exact=True).click()
    # Not by a locator, which is strict: while the page is made anew, old and new texts may stand there together.
    page.wait_for_function("() => !document.body.innerText.includes('At step')")
    check_table(page, 0, model, example(checkpoint, 0)[0])


def test_a_bad_upload_is_a_sentence_and_the_next_one_works(page: Any, checkpoint: Path) -> None:
    page.get_by_text("Upload", exact=True).click()
    page.get_by_text("Choose an image, and this side says").wait_for()

    def upload(name: str, data: bytes) -> None:
        entry = {"name": name, "mimeType": "image/png", "buffer": data}
        page.locator("input[type=file]").set_input_files(entry)

    upload("corrupt.png", b"\x89PNG\r\n\x1a\n and then nothing")
    page.get_by_text(re.compile(r"corrupt\.png is (no image|damaged)")).wait_for()
    grey = np.random.default_rng(5).integers(0, 256, (16, 16), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    upload("mine.png", file.getvalue())
    page.locator("figcaption", has_text="mine.png").wait_for()
    image = torch.from_numpy(grey).unsqueeze(0) / 255
    check_table(page, 0, network(checkpoint), image)
    assert page.get_by_text(re.compile(r"corrupt\.png is")).count() == 0

    page.get_by_text("Swap light and dark").click()
    page.get_by_text("light and dark swapped").wait_for()
    check_table(page, 0, network(checkpoint), 1 - image)


def test_samples_of_a_class_come_from_the_seed(page: Any, checkpoint: Path) -> None:
    page.get_by_role("tab", name="Samples of a class").click()
    page.get_by_text("held-out out-of-distribution images").wait_for()
    choose(page, "Class", "6")
    for label, text in (("Images", "3"), ("Seed", "4")):
        page.get_by_label(label, exact=True).fill(text)
    page.get_by_label("Steps", exact=True).last.fill("7")
    page.get_by_label("Step size", exact=True).last.fill("0.3")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Samples of class 6").wait_for()
    figures = page.locator(".dat-samples figure")
    assert figures.count() == 3
    seeds, model = DigitsDataModule().held_out_seeds(), network(checkpoint)
    chain = Ascent(targeted_logit, unbounded_ascent(0.3, 7), open_checkpoint(checkpoint).rule)
    for k in range(3):
        seed, draw = seeds(4 * 64 + k)[0].unsqueeze(0), torch.tensor([4 * 64 + k])
        end = chain(model, seed, torch.tensor([6]), draws=draw)[0]
        torch.testing.assert_close(
            pixels(figures.nth(k).locator("img").get_attribute("src")), end, atol=1.5 / 255, rtol=0
        )
        with torch.no_grad():
            p, energy = model(end[None]).softmax(1)[0, 6], -model(end[None]).logsumexp(1)[0]
        caption = figures.nth(k).locator("figcaption").inner_text()
        shown = [value(number) for number in re.findall(r"[−\d]\d*\.\d+", caption)]
        assert shown == pytest.approx([float(p), float(energy)], abs=3e-3)


def test_what_the_brush_paints_over_is_filled_in_and_nothing_else(page: Any, checkpoint: Path) -> None:
    image, _ = example(checkpoint, 0)
    page.get_by_role("tab", name="Fill in a part").click()
    canvas = page.locator("canvas[width='320']")
    canvas.wait_for()
    page.get_by_role("button", name="Start over").click()
    box = canvas.bounding_box()
    heights = [box["y"] + box["height"] * share for share in (0.3, 0.6)]
    page.mouse.move(box["x"] + box["width"] * 0.5, heights[0])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, heights[1], steps=20)
    page.mouse.up()
    choose(page, "Class, if known", "6")
    panel = page.get_by_role("tabpanel").filter(has=canvas)
    panel.get_by_label("Steps", exact=True).fill("5")
    panel.get_by_label("Step size", exact=True).fill("0.4")
    panel.get_by_role("button", name="Fill in", exact=True).click()
    panel.get_by_text("Filled in 5 steps").wait_for()
    original, left, filled = (pixels(panel.locator("img").nth(k).get_attribute("src")) for k in range(3))
    torch.testing.assert_close(original, image, atol=0.6 / 255, rtol=0)
    # A stroke of the brush down the middle: a pixel counts if its centre is as near to the way as the radius.
    radius, mask = 16 / 12, torch.zeros(16, 16, dtype=torch.bool)
    for i, j in np.ndindex(16, 16):
        y = min(max(i + 0.5, 0.3 * 16), 0.6 * 16)
        mask[i, j] = bool(np.hypot(i + 0.5 - y, j + 0.5 - 8) <= radius)
    assert int(mask.sum()) > 12
    assert torch.equal(left[:, ~mask], original[:, ~mask])
    torch.testing.assert_close(left[:, mask], torch.full_like(left[:, mask], 0.5), atol=1 / 255, rtol=0)
    assert torch.equal(filled[:, ~mask], original[:, ~mask])
    rule = open_checkpoint(checkpoint).rule
    expected = Explorer(network(checkpoint), (1, 16, 16)).fill(image, mask, 6, 5, 0.4, rule=rule).images[5]
    torch.testing.assert_close(filled, expected, atol=1.5 / 255, rtol=0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_without_scrolling_sideways(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("table.dat-classes").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # Text stands out from its ground: luminances differ by what WCAG asks of text.
    ratio = page.evaluate(
        """() => {
          const level = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(x => x / 255)
            .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
          const text = getComputedStyle(document.querySelector('.dat-classes td')).color;
          const ground = getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor;
          const [a, b] = [level(text), level(ground)].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05);
        }"""
    )
    assert ratio >= 4.5
