import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dat_lightning.explore import read_upload
from dat_lightning.explore.uploads import MAX_MEGABYTES

GREY, COLOUR = (1, 16, 16), (3, 16, 16)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    upload = read_upload(file(Image.fromarray(PIXELS)), "x.png", COLOUR)
    assert torch.equal(upload.image, torch.from_numpy(PIXELS).permute(2, 0, 1) / 255)
    assert upload.notes == ()
    grey = PIXELS[..., 0]
    assert torch.equal(read_upload(file(Image.fromarray(grey)), "x.png", GREY).image[0], torch.from_numpy(grey) / 255)


def test_grey_becomes_colour_and_colour_grey() -> None:
    grey = read_upload(file(Image.fromarray(PIXELS[..., 0])), "x.png", COLOUR).image
    assert torch.equal(grey, (torch.from_numpy(PIXELS[..., 0]) / 255).expand(3, -1, -1))
    luma = read_upload(file(Image.fromarray(PIXELS)), "x.png", GREY).image[0]
    weights = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luma, torch.from_numpy(PIXELS).float() @ weights / 255, atol=1.1 / 255, rtol=0)


def test_other_sizes_are_cropped_to_the_middle_and_scaled() -> None:
    wide = np.zeros((40, 100), np.uint8)
    wide[:, 30:70] = 200
    upload = read_upload(file(Image.fromarray(wide)), "wide.png", GREY)
    assert upload.notes == ("cropped and scaled from 100×40 to 16×16",)
    inside = upload.image[..., 1:-1]  # the filter blends the rim with what was cropped
    torch.testing.assert_close(inside, torch.full_like(inside, 200 / 255), atol=0.02, rtol=0)
    assert float(upload.image.min()) > 0.7
    assert read_upload(file(Image.new("L", (1, 3), 7)), "x.png", GREY).image.shape == GREY


def test_a_photograph_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    image = np.zeros((16, 16), np.uint8)
    image[:8, :8] = 255
    upright = read_upload(file(Image.fromarray(image), exif=exif), "x.png", GREY).image[0]
    assert torch.equal(upright, torch.from_numpy(np.rot90(image, -1).copy()) / 255)


def test_sixteen_bits_are_scaled() -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = read_upload(file(Image.fromarray(values)), "deep.png", GREY).image[0]
    torch.testing.assert_close(image, torch.from_numpy(values / 65535).float(), atol=0.6 / 255, rtol=0)


def test_palettes_and_cmyk_are_converted() -> None:
    flat = Image.new("RGB", (16, 16), (200, 30, 60))
    for data in (file(flat.quantize(4)), file(flat.convert("CMYK"), "JPEG", quality=100)):
        image = read_upload(data, "x", COLOUR).image
        torch.testing.assert_close(image.mean((1, 2)), torch.tensor([200, 30, 60]) / 255, atol=0.02, rtol=0)


def test_transparent_parts_are_laid_on_white_and_opaque_ones_stay() -> None:
    image = np.zeros((16, 16, 4), np.uint8)
    image[:, :8, 3] = 255
    upload = read_upload(file(Image.fromarray(image)), "x.png", GREY)
    assert torch.equal(upload.image[0, :, :8], torch.zeros(16, 8))
    assert torch.equal(upload.image[0, :, 8:], torch.ones(16, 8))
    assert upload.notes == ("transparent parts were laid on white",)
    image[..., 3] = 255
    assert read_upload(file(Image.fromarray(image)), "x.png", GREY).notes == ()


def test_of_an_animation_the_first_frame_is_taken_and_it_says_so() -> None:
    frames = [Image.new("L", (16, 16), level) for level in (255, 0, 90)]
    data = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    upload = read_upload(data, "x.gif", GREY)
    assert upload.notes == ("the first of several frames was taken",)
    assert torch.equal(upload.image, torch.ones(GREY))


def test_light_and_dark_can_be_swapped() -> None:
    data = file(Image.fromarray(PIXELS))
    plain, swapped = (read_upload(data, "x.png", COLOUR, invert) for invert in (False, True))
    torch.testing.assert_close(swapped.image, 1 - plain.image)
    assert swapped.notes == ("light and dark swapped",)


def bomb(width: int, height: int) -> bytes:
    """A PNG file whose header promises more pixels than its few bytes have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


GOOD = file(Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"x\.png is empty"),
        (b"not an image at all", r"x\.png is no image of a kind that is read here: JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"x\.png is no image of a kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"x\.png is no image of a kind"),
        (GOOD[: len(GOOD) // 2], r"x\.png is damaged: "),
        (GOOD[:30], r"x\.png is (damaged|no image)"),
        (bomb(8000, 8000), r"x\.png has 8000×8000 pixels; at most 25 million are taken"),
        (bomb(60000, 60000), r"x\.png has too many pixels; at most 25 million are taken"),
        (bytes(21 << 20), r"x\.png has 21 MB; at most 20 are taken"),
        (file(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"), r"x\.png has pixels of mode 'F', for which"),
    ],
    ids=["empty", "text", "svg", "eps", "half", "header", "large", "bomb", "megabytes", "float"],
)
def test_what_is_no_image_is_a_sentence(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        read_upload(data, "x.png", GREY)
    assert "\n" not in str(raised.value)


def tiff(tags: dict[int, int], pixels: bytes, pages: int = 1) -> bytes:
    """A grey TIFF file of 16×16 pixels, written by hand: as many pages, all with the same pixels."""
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, **tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    size = 2 + len(entries) + 4
    places = [8 + len(pixels) + page * size for page in range(1, pages)] + [0]
    directories = [struct.pack("<H", len(tags)) + entries + struct.pack("<I", place) for place in places]
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + b"".join(directories)


def painted(size: tuple[int, int], scans: int) -> bytes:
    """A progressive JPEG file that says its last few bytes again and again, each time for all pixels."""
    data = file(Image.new("L", size), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda"))
    return data[:-2] + data[last:-2] * scans + data[-2:]


def tile(side: int) -> bytes:
    """A small image in one huge tile, of zeros that deflate makes small."""
    press = zlib.compressobj(9)
    rows = [press.compress(bytes(side)) for _ in range(side)]
    pixels = b"".join([*rows, press.flush()])
    return tiff({259: 8, 322: side, 323: side, 324: 8, 325: len(pixels)}, pixels)


STRIP = {273: 8, 278: 16, 279: 256}


def test_a_tiled_file_and_one_of_pages_are_read() -> None:
    assert torch.equal(read_upload(tile(16), "x.tiff", GREY).image, torch.zeros(GREY))
    paged = read_upload(tiff(STRIP, bytes([255]) * 256, 3), "x.tiff", GREY)
    assert torch.equal(paged.image, torch.ones(GREY))
    assert paged.notes == ("the first of several frames was taken",)
    assert read_upload(painted((16, 16), 1000), "x.jpg", GREY).notes == ()


# Figures of the machine alone: processor time, and the memory of a process beyond what it had before.
_SECONDS, _MEGABYTES = 120, 600
_READ = """
import resource, sys, threading
from pathlib import Path
from dat_lightning.explore import read_upload
from dat_lightning.explore.uploads import MAX_MEGABYTES

resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))


def read(path):
    try:
        said = read_upload(path.read_bytes(), path.name, (3, 16, 16)).notes[-1]
    except ValueError as error:
        said = str(error)
    sys.stdout.write(f"{path.name}: {said}\\n")


Path("/proc/self/clear_refs").write_text("5")
before = peak()
threads = [threading.Thread(target=read, args=(Path(path),)) for path in sys.argv[2:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("MB", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it")
def test_hostile_files_take_neither_memory_nor_time(tmp_path: Path) -> None:
    """All at once, as from a dozen visitors, in a process of their own."""
    scaled, refused = "cropped and scaled from 5000×4990", "at most 25 million are taken"
    large = file(Image.new("RGB", (5000, 4990)), "TIFF", compression="tiff_deflate")
    hostile: dict[str, tuple[bytes, str]] = {
        **{f"large{n}.tiff": (large, scaled) for n in range(12)},
        "larger.tiff": (file(Image.new("1", (7000, 7000)), "TIFF", compression="group4"), refused),
        "tile.tiff": (tile(6000), "has 6000×6000 pixels; at most 25 million are taken"),
        "pages.tiff": (tiff(STRIP, bytes(256), 150_000), "the first of several frames was taken"),
        "scans.jpg": (painted((5000, 4990), 10_000), "paints 5000×4990 pixels 10006 times, which takes too long"),
    }
    for name, (data, _) in hostile.items():
        assert len(data) < MAX_MEGABYTES << 20
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", _READ, str(_SECONDS), *(str(tmp_path / name) for name in hostile)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for name, (_, words) in hostile.items():
        assert any(line.startswith(f"{name}: ") and words in line for line in said), (name, said)
    assert int(said[-1].removeprefix("MB ")) < _MEGABYTES


def test_networks_of_other_channels_take_no_files() -> None:
    with pytest.raises(ValueError, match="this network takes 4 channels"):
        read_upload(GOOD, "x.png", (4, 16, 16))
