import base64
import io
import re

import pytest
import torch
from PIL import Image

from dat_lightning.explore import Reading
from dat_lightning.explore.markup import STYLE, class_table, difference, figures, number, picture


def pixels(png: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return torch.tensor(list(image.tobytes())).view(image.height, image.width, 3).permute(2, 0, 1)


def cells(table: str) -> list[list[str]]:
    rows = re.findall(r"<tr class=\"[^\"]*\">(.*?)</tr>", table)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(-1.5, 3, "−1.500"), (0.25, 1, "0.2"), (-0.0001, 3, "0.000"), (12, 0, "12"), (-12.3456, 2, "−12.35")],
)
def test_numbers_have_a_true_minus_and_no_negative_zero(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_pictures_are_pixel_for_pixel_and_thumbnails_small() -> None:
    image = torch.rand(3, 6, 5)
    assert torch.equal(pixels(picture(image)), (image * 255).round().long())
    grey = torch.rand(1, 4, 4)
    assert torch.equal(pixels(picture(grey)), (grey * 255).round().long().expand(3, -1, -1))
    assert pixels(picture(torch.rand(1, 300, 200), 100)).shape == (3, 100, 67)
    assert pixels(picture(torch.rand(1, 16, 16), 100)).shape == (3, 16, 16)


def test_a_difference_is_grey_where_nothing_changed() -> None:
    original = torch.full((1, 2, 2), 0.5)
    changed = original + torch.tensor([[[0.2, -0.2], [0.0, 0.1]]])
    png, scale = difference(changed, original)
    assert scale == pytest.approx(0.2)
    assert pixels(png)[0].flatten().tolist() == pytest.approx([255, 0, 128, 191], abs=1)
    assert difference(original, original)[1] == pytest.approx(1 / 255)


def test_the_table_has_every_class_and_marks_the_first_and_the_target() -> None:
    logits = torch.tensor([1.0, 3.0, -2.0])
    table = class_table(Reading(logits), ["cat", "<b>dog", "owl"], (2,))
    p = logits.softmax(0).tolist()
    expected = [["cat", "", f"{p[0]:.4f}", "−1.000"], ["&lt;b&gt;dog", "", f"{p[1]:.4f}", "−3.000"]]
    assert cells(table) == [*expected, ["owl", "", f"{p[2]:.4f}", "2.000"]]
    assert re.findall(r'<tr class="([^"]*)">', table) == ["", "dat-first", "dat-target"]
    assert f"width: {100 * p[1]:.1f}%" in table
    assert f"E(x) = <b>{number(-float(logits.logsumexp(0)))}</b>" in table


def test_of_many_classes_the_likely_ones_and_the_target_are_shown() -> None:
    logits = torch.arange(40.0)
    table = class_table(Reading(logits), [f"c{k}" for k in range(40)], (3,))
    assert [row[0] for row in cells(table)] == [f"c{k}" for k in range(39, 29, -1)] + ["c3"]
    assert "29 less likely classes are not shown" in table


def test_figures_carry_their_pictures_and_escape_their_captions() -> None:
    png = picture(torch.rand(1, 2, 2))
    html = figures([(png, "a<b", ""), (png, "c", "d&e")], 100, current=1)
    assert html.count(base64.b64encode(png).decode()) == 2
    assert "a&lt;b" in html
    assert "<small>d&amp;e</small>" in html
    assert html.count('class="dat-current"') == 1
    assert html.index("a&lt;b") < html.index('class="dat-current"')


def test_the_style_needs_no_other_host() -> None:
    assert "http" not in STYLE
    assert "url(" not in STYLE
