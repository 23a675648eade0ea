import errno
import io
import os
import pickle
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dat_lightning.data.entries import image_name
from dat_lightning.data.images import ImageSubset, RecordFile, Unlabelled, check_index, read_image
from dat_lightning.data.pixels import CorruptImageError

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


class Named(Dataset[tuple[int, int]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, int]:
        return 100 + index, index

    def name(self, index: int) -> str:
        return f"picture {index}"


class Plain(Dataset[int]):
    name = "not a method"

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return 100 + index


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_of_sixteen_bit_grey(levels: np.ndarray) -> bytes:
    """By the specification of PNG: rows of big-endian samples, each row after a filter byte."""
    height, width = levels.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 0, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_ends(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_colours_are_read_as_they_are_whatever_the_file_is_called(tmp_path: Path, kind: str) -> None:
    path = with_ends(tmp_path / "picture.jpg", encoded(Image.fromarray(COLOURS), kind))
    image = read_image(str(path))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), COLOURS)
    # Nothing is left to be decoded later.
    path.unlink()
    assert image.getpixel((0, 0)) == tuple(COLOURS[0, 0])


def test_jpeg_and_webp_are_read_up_to_their_loss(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    for kind in ("JPEG", "WEBP"):
        image = read_image(with_ends(tmp_path / kind, encoded(Image.fromarray(smooth), kind, quality=95)))
        assert image.mode == "RGB"
        assert abs(np.asarray(image).astype(int) - smooth).mean() < 4


def test_grey_is_repeated_and_one_bit_is_black_and_white(tmp_path: Path) -> None:
    grey = COLOURS[..., 0]
    image = read_image(with_ends(tmp_path / "grey.png", encoded(Image.fromarray(grey), "PNG")))
    assert np.array_equal(np.asarray(image), np.stack([grey] * 3, axis=-1))
    bits = grey > 127
    image = read_image(with_ends(tmp_path / "bits.png", encoded(Image.fromarray(bits), "PNG")))
    assert np.array_equal(np.asarray(image), np.stack([bits * 255] * 3, axis=-1))


def test_transparency_is_dropped_and_not_blended(tmp_path: Path) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7, 1), dtype=np.uint8)
    see_through = Image.fromarray(np.concatenate([COLOURS, alpha], axis=-1))
    image = read_image(with_ends(tmp_path / "alpha.png", encoded(see_through, "PNG")))
    assert np.array_equal(np.asarray(image), COLOURS)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(64))])
def test_palettes_give_their_colours_without_a_warning(tmp_path: Path, transparency: int | bytes | None) -> None:
    colours = np.random.default_rng(2).integers(0, 256, (64, 3), dtype=np.uint8)
    places = np.random.default_rng(3).integers(0, 64, (6, 4), dtype=np.uint8)
    palette = Image.fromarray(places)
    palette.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    image = read_image(with_ends(tmp_path / "palette.png", encoded(palette, "PNG", **options)))
    assert np.array_equal(np.asarray(image), colours[places])


def test_cmyk_is_converted(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    image = read_image(with_ends(tmp_path / "cyan.jpg", encoded(cyan, "JPEG", quality=100)))
    assert image.mode == "RGB"
    assert abs(np.asarray(image).astype(int) - [0, 255, 255]).max() <= 3


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path: Path) -> None:
    levels = np.append(np.arange(0, 65536, 97), 65535)[:676].reshape(26, 26)
    levels[0, :4] = [0, 128, 129, 65535]
    path = with_ends(tmp_path / "deep.png", png_of_sixteen_bit_grey(levels))
    expected = np.array([[round(int(v) / 65535 * 255) for v in row] for row in levels])
    assert np.array_equal(np.asarray(read_image(path)), np.stack([expected] * 3, axis=-1))
    assert expected.max() == 255
    tiff = with_ends(tmp_path / "deep.tif", encoded(Image.fromarray(levels.astype(np.uint16)), "TIFF"))
    assert np.array_equal(np.asarray(read_image(tiff))[..., 1], expected)
    text = b"P5 26 26 65535\n" + levels.astype(">u2").tobytes()
    assert np.array_equal(np.asarray(read_image(with_ends(tmp_path / "deep.pgm", text)))[..., 2], expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_an_agreed_white_are_refused(tmp_path: Path, dtype: type) -> None:
    path = with_ends(tmp_path / "odd.tif", encoded(Image.fromarray(COLOURS[..., 0].astype(dtype)), "TIFF"))
    with pytest.raises(CorruptImageError, match="no agreed white"):
        read_image(path)


def test_orientation_in_exif_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = with_ends(tmp_path / "turned.png", encoded(Image.fromarray(COLOURS), "PNG", exif=exif))
    with Image.open(path) as image:
        assert image.getexif()[0x0112] == 6
    assert np.array_equal(np.asarray(read_image(path)), COLOURS)


def test_of_several_frames_the_first_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = with_ends(tmp_path / "film.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert read_image(path).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "Is a directory"),
        (lambda p: p.write_bytes(b""), "it is none of JPEG, PNG"),
        (lambda p: p.write_text("no image"), "it is none of JPEG, PNG"),
        (lambda p: p.write_bytes(encoded(Image.fromarray(COLOURS), "PCX")), "it is none of JPEG, PNG"),
        (lambda p: p.write_bytes(encoded(Image.fromarray(COLOURS), "EPS")), "it is none of JPEG, PNG"),
        (lambda p: p.write_bytes(encoded(Image.fromarray(COLOURS), "PNG")[:-30]), "image file is truncated"),
        (lambda p: p.symlink_to(p), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_image_is_named_with_its_reason(tmp_path: Path, make: Callable[[Path], Any], reason: str) -> None:
    path = tmp_path / "bad.png"
    make(path)
    with pytest.raises(CorruptImageError, match=reason) as caught:
        read_image(path)
    assert caught.value.name == str(path)
    assert str(caught.value).startswith(f"{path} is not a readable image: {reason}")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    with pytest.raises(CorruptImageError, match="bomb"):
        read_image(with_ends(tmp_path / "bomb.png", bomb))


@lru_cache(maxsize=1)
def seeds_of_damage() -> list[bytes]:
    rng = np.random.default_rng(5)
    noisy = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8))
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ]
    images = [encoded(noisy, kind, **options) for kind, options in kinds]
    return [*images, encoded(noisy.convert("P"), "PNG"), encoded(noisy.convert("1"), "BMP")]


@settings(
    max_examples=800, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_the_one_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(seeds_of_damage())))
    for _ in range(data.draw(st.integers(0, 4))):
        # Headers, where most goes wrong, are hit more often.
        last = data.draw(st.sampled_from([40, len(content) - 1]))
        content[data.draw(st.integers(0, min(last, len(content) - 1)))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, 2 * len(content))) or 1 :]
    path = with_ends(tmp_path / "damaged", bytes(content))
    try:
        image = read_image(path)
    except CorruptImageError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert image.mode == "RGB"
        assert min(image.size) >= 1
        assert len(image.tobytes()) == 3 * image.width * image.height


@pytest.mark.parametrize("kind", [OSError, SyntaxError, EOFError, zlib.error, KeyError, OverflowError, MemoryError])
def test_whatever_a_decoder_raises_becomes_the_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(self: Image.Image) -> None:
        raise kind("within the decoder")

    path = with_ends(tmp_path / "a.png", encoded(Image.fromarray(COLOURS), "PNG"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(CorruptImageError, match="within the decoder"):
        read_image(path)


class Bad(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise CorruptImageError("cat.png", "it is a dog")


def test_the_error_keeps_its_type_and_message_through_pickles_and_workers() -> None:
    error = pickle.loads(pickle.dumps(CorruptImageError("cat.png", "it is a dog")))
    assert isinstance(error, CorruptImageError)
    assert (error.name, str(error)) == ("cat.png", "cat.png is not a readable image: it is a dog")
    with pytest.raises(CorruptImageError, match=r"cat\.png is not a readable image: it is a dog"):
        next(iter(DataLoader(Bad(), num_workers=1, batch_size=None)))


@pytest.mark.parametrize("indices", [[7, 0, 7, 9], range(1, 9, 3), np.array([4, 2], dtype=np.int16), range(9, -1, -3)])
def test_a_subset_has_the_entries_and_names_of_its_indices(indices: Any) -> None:
    subset = ImageSubset(Named(), indices)
    assert [subset[i] for i in range(len(subset))] == [(100 + i, i) for i in indices]
    assert [subset.name(i) for i in range(len(subset))] == [f"picture {i}" for i in indices]
    for wrong in (-1, len(indices)):
        for use in (subset.__getitem__, subset.name):
            with pytest.raises(IndexError, match=rf"image {wrong} is outside 0 … {len(indices) - 1}"):
                use(wrong)


def test_a_subset_of_nothing_is_empty() -> None:
    nothing: list[Any] = [[], range(0), np.empty(0, dtype=int)]
    assert [len(ImageSubset(Named(), indices)) for indices in nothing] == [0, 0, 0]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 10], "indices must lie in 0 … 9, got 0 … 10"),
        ([-1, 3], "indices must lie in 0 … 9, got -1 … 3"),
        (range(5, 12), "got 5 … 11"),
        (range(9, -2, -1), "got -1 … 9"),
        ([[1, 2]], r"one row of integers, got int64 of shape \(1, 2\)"),
        ([0.5], "integers, got float64"),
        ([True, False], "integers, got bool"),
    ],
)
def test_indices_that_are_none_are_refused(indices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSubset(Named(), indices)


def test_a_range_stays_a_range_and_costs_nothing() -> None:
    class Endless(Plain):
        def __len__(self) -> int:
            return 10**12

    subset = ImageSubset(Endless(), range(5, 10**12, 7))
    assert subset[10**9] == 100 + 5 + 7 * 10**9
    assert isinstance(subset.indices, range)


def test_names_come_from_the_data_set_or_else_from_its_type() -> None:
    assert image_name(Named(), 3) == "picture 3"
    assert image_name(Plain(), 3) == "Plain entry 3"
    assert ImageSubset(Plain(), [8]).name(0) == "Plain entry 8"
    assert Unlabelled(Plain()).name(2) == "Plain entry 2"
    assert ImageSubset(Unlabelled(ImageSubset(Named(), [5, 6])), [1]).name(0) == "picture 6"


def test_unlabelled_images_are_those_of_the_data_set() -> None:
    for dataset in (Named(), Plain()):
        images = Unlabelled(dataset)
        assert [images[i] for i in range(len(images))] == list(range(100, 110))
        for use in (images.__getitem__, images.name):
            with pytest.raises(IndexError):
                use(10)


def test_check_index_takes_what_a_data_set_has() -> None:
    check_index(0, 1)
    check_index(4, 5)
    with pytest.raises(IndexError):
        check_index(0, 0)


def test_records_are_read_from_their_place_and_a_short_file_is_noticed(tmp_path: Path) -> None:
    path = with_ends(tmp_path / "records", bytes(range(100)))
    records = RecordFile(path, 7, offset=3)
    assert records.read(0) == bytes(range(3, 10))
    assert records.read(5) == bytes(range(38, 45))
    with pytest.raises(EOFError, match="shorter"):
        records.read(13)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        RecordFile(path, 7).read(0)


def test_a_record_file_opens_at_the_first_read_and_closes_with_its_object(tmp_path: Path) -> None:
    path = with_ends(tmp_path / "records", bytes(20))

    def open_files() -> int:
        return sum(Path(f"/proc/self/fd/{fd}").resolve() == path for fd in os.listdir("/proc/self/fd"))  # noqa: PTH208

    if not Path("/proc/self/fd").exists():
        pytest.skip("lists open files through /proc")
    records = RecordFile(path, 4)
    assert open_files() == 0
    for i in range(5):
        records.read(i)
    assert open_files() == 1
    again = pickle.loads(pickle.dumps(records))
    del records
    assert open_files() == 0
    # What is pickled is not the open file, which another process does not have.
    assert again.read(2) == bytes(4)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_fault_of_the_process_is_not_called_a_corrupt_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, "no more of it")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="no more of it") as error:
        read_image(tmp_path / "a.png")
    assert not isinstance(error.value, ValueError)


def test_a_file_server_that_is_away_for_a_moment_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "a.png")
    original, left = Image.open, [2]
    pauses: list[float] = []

    def unsteady(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "stale file handle")
        return original(*args, **kwargs)

    monkeypatch.setattr(Image, "open", unsteady)
    monkeypatch.setattr("dat_lightning.data.images.time.sleep", pauses.append)
    assert read_image(tmp_path / "a.png").size == (3, 2)
    assert pauses == [0.5, 2.0]
    left[0] = 100
    with pytest.raises(CorruptImageError, match="stale file handle"):
        read_image(tmp_path / "a.png")
    assert left[0] == 96
