import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dat_lightning import ArrayImages, CorruptImageError
from dat_lightning.core.errors import InputError
from tests.data.copies import assert_a_copy_reads

NUM_IMAGES = 30
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 6, 5, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, NUM_IMAGES).astype(np.uint8)


def saved(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "300K_random_images.npy", IMAGES)


def test_images_are_those_of_the_array_without_labels(file: Path) -> None:
    images = ArrayImages(str(file))
    assert len(images) == NUM_IMAGES
    assert images.labels is None
    for i in range(NUM_IMAGES):
        image: Any = images[i]
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), IMAGES[i])
    assert images.name(7) == f"{file} image 7"
    for wrong in (-1, NUM_IMAGES):
        for use in (images.__getitem__, images.name):
            with pytest.raises(IndexError, match=rf"image {wrong} is outside 0 … 29"):
                use(wrong)


def test_labels_come_from_a_file_of_their_own(file: Path, tmp_path: Path) -> None:
    images = ArrayImages(file, labels=saved(tmp_path / "labels.npy", LABELS))
    assert images.labels is not None
    assert images.labels.dtype == np.int64
    entries: list[Any] = [images[i] for i in range(NUM_IMAGES)]
    assert [label for _, label in entries] == LABELS.tolist()
    assert all(type(label) is int for _, label in entries)
    assert all(np.array_equal(np.asarray(image), IMAGES[i]) for i, (image, _) in enumerate(entries))


def test_labels_may_have_names(file: Path, tmp_path: Path) -> None:
    labels = saved(tmp_path / "labels.npy", LABELS)
    assert ArrayImages(file, labels).classes is None
    names = [f"class {i}" for i in range(10)]
    assert ArrayImages(file, labels, names).classes == tuple(names)
    with pytest.raises(InputError, match=rf"labels.npy has the label {LABELS.max()}, but there are 2 classes: "):
        ArrayImages(file, labels, names[:2])


@pytest.mark.parametrize("array", [IMAGES[..., 0], IMAGES[..., :1]], ids=["without channels", "one channel"])
def test_grey_images_stay_grey(tmp_path: Path, array: np.ndarray) -> None:
    image: Any = ArrayImages(saved(tmp_path / "grey.npy", array))[4]
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), IMAGES[4, ..., 0])


def test_a_header_of_the_second_version_is_read(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.lib.format.write_array(content, IMAGES, version=(2, 0))
    (tmp_path / "images.npy").write_bytes(content.getvalue())
    assert np.array_equal(np.asarray(ArrayImages(tmp_path / "images.npy")[29]), IMAGES[29])


def test_a_copy_in_a_loader_process_opens_the_file_anew(file: Path) -> None:
    """Images are 90 bytes; a million of them would not enter the copy either."""
    assert_a_copy_reads(ArrayImages(file), IMAGES, 3, 1000)


def test_a_file_that_shrinks_or_goes_makes_corrupt_images(file: Path) -> None:
    images = ArrayImages(file)
    images[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    images[NUM_IMAGES - 2]
    with pytest.raises(CorruptImageError, match=r"300K_random_images.npy image 29 is not .*become shorter"):
        images[NUM_IMAGES - 1]
    file.unlink()
    with pytest.raises(CorruptImageError, match=r"image 3 is not .*No such file"):
        pickle.loads(pickle.dumps(images))[3]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            IMAGES.astype(np.float32),
            r"must be uint8 of shape \(N, H, W, 3\), .*, got float32 of shape \(30, 6, 5, 3\)$",
        ),
        (IMAGES[0, 0], r"got uint8 of shape \(5, 3\)$"),
        (IMAGES[..., :2], r"got uint8 of shape \(30, 6, 5, 2\)$"),
        (IMAGES[:0], r"got uint8 of shape \(0, 6, 5, 3\)$"),
        (IMAGES.transpose(0, 3, 1, 2).copy(), r"\(30, 3, 6, 5\); channels come last: np.transpose"),
        (np.asfortranarray(IMAGES), r"is in Fortran order; save it again"),
        (np.array([{}]), r"got object of shape \(1,\)"),
    ],
)
def test_an_array_of_another_kind_is_named(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = tmp_path / "images.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=f"^{path} .*{message}"):
        ArrayImages(path)


def test_an_incomplete_damaged_or_missing_file_is_named(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for changed, message in (
        (content[:-100], r"has 2600 bytes of images, but its shape .* needs 2700: .*incomplete"),
        (content + b"x", r"has 2701 bytes of images, .*: other data follow"),
        (content[:40], r"is not a readable .npy file"),
        (b"<html>not found</html>", r"is not a readable .npy file"),
        (b"", r"is not a readable .npy file"),
    ):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=f"^{file} {message}"):
            ArrayImages(file)
    with pytest.raises(FileNotFoundError, match=rf"no file at {tmp_path}/no.npy; expected a .npy of images"):
        ArrayImages(tmp_path / "no.npy")


def test_labels_that_do_not_fit_are_named(file: Path, tmp_path: Path) -> None:
    for labels, message in (
        (LABELS[:-1], r"images.npy has 30 images, but .*labels.npy has 29 labels"),
        (LABELS.astype(float), r"labels.npy must be integers of shape \(N,\), got float64 of shape \(30,\)"),
        (LABELS[:, None], r"got uint8 of shape \(30, 1\)"),
        (LABELS.astype(int) - 10, r"labels.npy must not be negative, got -10"),
    ):
        with pytest.raises(ValueError, match=message):
            ArrayImages(file, saved(tmp_path / "labels.npy", labels))
    (tmp_path / "labels.npy").write_bytes(pickle.dumps(LABELS))
    with pytest.raises(ValueError, match=r"labels.npy is not a readable .npy file of labels"):
        ArrayImages(file, tmp_path / "labels.npy")
    with pytest.raises(FileNotFoundError, match=r"expected a .npy of labels"):
        ArrayImages(file, tmp_path / "none.npy")
