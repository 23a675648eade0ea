import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dat_lightning.data.pixels import CorruptImageError
from dat_lightning.data.tiny_images import TinyImages

NUM_RECORDS = 300


def pictures() -> np.ndarray:
    """Images (N, row, column, channel)."""
    return np.random.default_rng(0).integers(0, 256, (NUM_RECORDS, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The format as MATLAB writes it: each 32×32×3 array with its first axis running fastest."""
    path = tmp_path_factory.mktemp("tiny") / "tiny_images.bin"
    path.write_bytes(b"".join(picture.flatten(order="F").tobytes() for picture in pictures()))
    return path


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(map(str, lines)))
    return path


def records_of(images: TinyImages) -> list[int]:
    """Which record each image is, found by its pixels."""
    number_of = {picture.tobytes(): k for k, picture in enumerate(pictures())}
    return [number_of[images[i].tobytes()] for i in range(len(images))]


def test_records_are_rgb_images_in_column_major_order(file: Path) -> None:
    images = TinyImages(str(file))
    assert len(images) == NUM_RECORDS
    for k in (0, 1, 177, NUM_RECORDS - 1):
        image = images[k]
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert np.array_equal(np.asarray(image), pictures()[k])
    # Once more by hand: red of row 3, column 5 is byte 5 · 32 + 3 of its record.
    red, green, blue = (file.read_bytes()[7 * 3072 + channel * 1024 + 5 * 32 + 3] for channel in range(3))
    assert images[7].getpixel((5, 3)) == (red, green, blue)


@pytest.mark.parametrize("first_record", [0, 1])
def test_lists_are_merged_and_counted_from_the_first_record(
    file: Path, tmp_path: Path, first_record: Literal[0, 1]
) -> None:
    one = write(tmp_path / "one.txt", "# duplicates", "", 17, f"  {first_record} ", 5, 17)
    two = tmp_path / "two.npy"
    np.save(two, np.array([NUM_RECORDS - 1 + first_record, 6, 5], dtype=np.uint16))
    images = TinyImages(file, [one, str(two)], first_record)
    left_out = {17 - first_record, 0, 5 - first_record, NUM_RECORDS - 1, 6 - first_record}
    kept = [k for k in range(NUM_RECORDS) if k not in left_out]
    assert len(images) == len(kept)
    assert records_of(images) == kept
    assert [images.name(i) for i in (0, 40)] == [f"{file} record {kept[i] + first_record}" for i in (0, 40)]


def test_many_and_random_exclusions_agree_with_a_plain_list(file: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for share in (0.02, 0.5, 0.97):
        left_out = np.flatnonzero(rng.random(NUM_RECORDS) < share)
        images = TinyImages(file, [write(tmp_path / "list.txt", *rng.permutation(left_out))])
        assert records_of(images) == sorted(set(range(NUM_RECORDS)) - set(left_out.tolist()))


def test_an_empty_list_leaves_all(file: Path, tmp_path: Path) -> None:
    assert len(TinyImages(file, [write(tmp_path / "empty.txt", "# nothing")])) == NUM_RECORDS


def test_indices_outside_the_images_are_refused(file: Path, tmp_path: Path) -> None:
    images = TinyImages(file, [write(tmp_path / "list.txt", 3)])
    for wrong in (-1, NUM_RECORDS - 1):
        for use in (images.__getitem__, images.name):
            with pytest.raises(IndexError, match=rf"image {wrong} is outside 0 … {NUM_RECORDS - 2}"):
                use(wrong)


@pytest.mark.parametrize(
    ("lines", "first_record", "message"),
    [
        ([3, "x7", 2], 0, "line 2: expected a record number, got 'x7'"),
        (["", "1.5"], 0, "line 2: expected a record number, got '1.5'"),
        ([10**30], 0, "line 1: expected a record number, got '1000"),
        ([0, 5, 300], 0, r"line 3: record 300 is outside 0 … 299 \(first_record=0\)"),
        (["#", -1], 0, "line 2: record -1 is outside 0 … 299"),
        ([300, 0], 1, r"line 2: record 0 is outside 1 … 300 \(first_record=1\)"),
    ],
)
def test_entries_that_are_no_records_are_named_with_their_line(
    file: Path, tmp_path: Path, lines: list[Any], first_record: Literal[0, 1], message: str
) -> None:
    listed = write(tmp_path / "list.txt", *lines)
    with pytest.raises(ValueError, match=f"{listed}, {message}"):
        TinyImages(file, [listed], first_record)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([1.0, 2.0]), "must hold one row of integers, got float64"),
        (np.array([[1, 2]]), r"must hold one row of integers, got int64 of shape \(1, 2\)"),
        (np.array([None, 1]), "not a readable .npy file of integers"),
        (np.array([5, 300]), "entry 1: record 300 is outside 0 … 299"),
        (np.array([2**64 - 1], dtype=np.uint64), "entry 0: record 18446744073709551615 is outside"),
        (b"no array", "not a readable .npy file of integers"),
        (b"PK\x03\x04 like a zip", "not a readable .npy file of integers"),
    ],
)
def test_arrays_that_are_no_list_are_named(
    file: Path, tmp_path: Path, content: np.ndarray | bytes, message: str
) -> None:
    listed = tmp_path / "list.npy"
    if isinstance(content, bytes):
        listed.write_bytes(content)
    else:
        np.save(listed, content)
    with pytest.raises(ValueError, match=f"{listed}.*{message}"):
        TinyImages(file, [listed])


def test_wrong_files_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no file at {tmp_path}; expected tiny_images.bin"):
        TinyImages(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"exclude names {tmp_path}/none.txt"):
        TinyImages(file, [tmp_path / "none.txt"])
    for size in (0, 3071, 3 * 3072 + 1):
        short = tmp_path / "short.bin"
        short.write_bytes(bytes(size))
        with pytest.raises(ValueError, match=f"{short} has {size} bytes, expected a multiple of 3072"):
            TinyImages(short)
    with pytest.raises(ValueError, match="exclude must be a list of paths, got 'cifar10'"):
        TinyImages(file, "cifar10")
    wrong: Any = 2
    with pytest.raises(ValueError, match="first_record must be 0 or 1, got 2"):
        TinyImages(file, first_record=wrong)
    with pytest.raises(ValueError, match=f"exclude leaves none of the {NUM_RECORDS} images"):
        TinyImages(file, [write(tmp_path / "all.txt", *range(NUM_RECORDS))])


def test_a_file_that_shrinks_or_goes_gives_a_corrupt_image(tmp_path: Path) -> None:
    path = tmp_path / "tiny.bin"
    path.write_bytes(bytes(4 * 3072))
    images, unread = TinyImages(path), TinyImages(path)
    images[3]
    os.truncate(path, 3 * 3072 + 5)
    images[2]
    with pytest.raises(
        CorruptImageError, match=f"{path} record 3 is not a readable image: the file has become shorter"
    ):
        images[3]
    path.unlink()
    with pytest.raises(CorruptImageError, match=f"{path} record 0 is not a readable image: .*No such file"):
        unread[0]


def array_of(image: Any) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same_images(file: Path, tmp_path: Path, method: str) -> None:
    images = TinyImages(file, [write(tmp_path / "list.txt", 0)])
    images[0]  # opened here before the workers start
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert [a.tobytes() for a in pool.map(images.__getitem__, [0, 5, 298])] == [
            pictures()[k].tobytes() for k in (1, 6, 299)
        ]
    if method == "fork":
        # Two workers that share an open file do not disturb each other.
        loader = DataLoader(images, batch_size=None, num_workers=2, collate_fn=array_of)
        assert np.array_equal(np.stack(list(loader)), pictures()[1:])


def test_the_pickle_holds_no_image(file: Path) -> None:
    images = TinyImages(file)
    images[0]
    content = pickle.dumps(images)
    assert len(content) < 1000
    assert np.array_equal(np.asarray(pickle.loads(content)[250]), pictures()[250])


def test_the_size_of_the_real_file_costs_nothing(tmp_path: Path) -> None:
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("measures memory through /proc")
    path, num_records = tmp_path / "tiny_images.bin", 79_302_017
    path.touch()
    try:
        os.truncate(path, num_records * 3072)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    last = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with path.open("r+b") as file:
        file.seek((num_records - 1) * 3072)
        file.write(last.flatten(order="F").tobytes())
    listed = tmp_path / "list.npy"
    np.save(listed, np.arange(1, 79_000_000, 500))
    before = int(status.read_text().split()[1])
    images = TinyImages(path, [listed])
    assert len(images) == num_records - 158_000
    assert images.name(len(images) - 1) == f"{path} record 79302016"
    assert np.array_equal(np.asarray(images[len(images) - 1]), last)
    assert not np.asarray(images[len(images) // 2]).any()
    grown = (int(status.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE")
    assert grown < 50e6
