"""Images in Parquet files that are written here; nothing is fetched."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dat_lightning import CorruptImageError, HuggingFaceImages
from dat_lightning.core.errors import InputError
from tests.data.copies import assert_a_copy_reads
from tests.data.parquet import needs_datasets, png, write_parquet

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = (np.arange(20) % 3).tolist()
NAMES = ("cat", "dog", "newt")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets", reason=needs_datasets)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write(path: Path) -> Path:
    """Writes the images into two files, in the order of their names."""
    for part, places in (("0", slice(0, 12)), ("1", slice(12, 20))):
        write_parquet(path / f"train-{part}.parquet", IMAGES[places], NAMES, "img", label=LABELS[places])
    return path


@pytest.mark.parametrize("files", ["{}", "{}/train-*.parquet", "{}/*"])
def test_images_and_labels_are_those_of_the_files_in_their_order(files: str, tmp_path: Path) -> None:
    files = files.format(write(tmp_path / "data"))
    images = HuggingFaceImages(files, image="img", label="label")
    assert len(images) == 20
    assert images.classes == NAMES
    assert images.labels is not None
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == LABELS
    for i in range(20):
        image, label = images[i]  # type: ignore[misc]
        assert (image.mode, label, type(label)) == ("RGB", LABELS[i], int)
        assert np.array_equal(np.asarray(image), IMAGES[i])
    assert images.name(13) == f"{files} train row 13"
    for wrong in (-1, 20):
        for use in (images.__getitem__, images.name):
            with pytest.raises(IndexError):
                use(wrong)


def test_without_a_label_column_entries_are_images_alone(tmp_path: Path) -> None:
    images = HuggingFaceImages([str(write(tmp_path) / "train-1.parquet")], image="img")
    assert (images.labels, images.classes, len(images)) == (None, None, 8)
    assert np.array_equal(np.asarray(images[2]), IMAGES[14])


def test_a_slice_of_a_split_has_its_labels(tmp_path: Path) -> None:
    images = HuggingFaceImages(str(write(tmp_path)), split="train[15:]", image="img", label="label")
    assert images.labels is not None
    assert images.labels.tolist() == LABELS[15:]
    assert np.array_equal(np.asarray(images[0][0]), IMAGES[15])  # type: ignore[index]


def test_bytes_of_images_and_paths_to_them_will_do(tmp_path: Path) -> None:
    """As other programs than datasets write them."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "3.png").write_bytes(png(IMAGES[3]))
    columns = {
        "bytes": [png(image) for image in IMAGES[:4]],
        "struct": [*({"bytes": png(image), "path": "x"} for image in IMAGES[:3]), {"bytes": None, "path": "PATH"}],
        "y": arrow.array([0, 1, 2, 1], arrow.int8()),
    }
    columns["struct"][3]["path"] = str(tmp_path / "3.png")
    parquet.write_table(arrow.table(columns), tmp_path / "plain.parquet")
    for image in ("bytes", "struct"):
        images = HuggingFaceImages(str(tmp_path / "plain.parquet"), image=image, label="y")
        assert [entry[1] for entry in map(images.__getitem__, range(4))] == [0, 1, 2, 1]  # type: ignore[index]
        for i in range(4):
            assert np.array_equal(np.asarray(images[i][0]), IMAGES[i])  # type: ignore[index]
        assert images.classes is None


def test_a_copy_in_a_loader_process_maps_the_file_anew(tmp_path: Path) -> None:
    big = np.random.default_rng(1).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)  # 120 kB
    images = HuggingFaceImages(str(write_parquet(tmp_path / "big.parquet", big)))
    assert_a_copy_reads(images, big, 33, 5000)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = png(IMAGES[0])
    rows = [content, content[:50], b"no image", None]
    parquet.write_table(arrow.table({"image": arrow.array(rows, arrow.binary())}), tmp_path / "a.parquet")
    images = HuggingFaceImages(str(tmp_path / "a.parquet"))
    images[0]
    for index, reason in ((1, ""), (2, "it is none of JPEG"), (3, "column 'image' is empty there")):
        with pytest.raises(CorruptImageError, match=f"a.parquet train row {index} is not a readable image: {reason}"):
            images[index]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "test"}, r'data: Unknown split "test". Should be one of \[\'train\'\]'),
        ({"image": "image"}, r"data has no column 'image'; its columns are \['img', 'label'\]"),
        ({"label": "y"}, r"data has no column 'y'; its columns are"),
        ({"image": "label"}, r"column 'label' must hold images or the bytes of image files, got ClassLabel"),
        ({"label": "img"}, r"column 'img' must hold class indices, integers, got Image"),
        ({"repo": "uoft-cs/cifar10"}, r"give either files or repo, got files '.*data' and repo 'uoft-cs/cifar10'"),
        ({"files": None}, r"give either files or repo, got files None and repo None"),
        ({"files": []}, r"files must name at least one Parquet file, got none"),
    ],
)
def test_a_wrong_argument_is_named(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    files = str(write(tmp_path / "data"))
    with pytest.raises(InputError, match=message):
        HuggingFaceImages(**{"files": files, "image": "img", **kwargs})


def test_labels_that_are_missing_or_hidden_are_named(tmp_path: Path) -> None:
    for labels, message in (([0, None], "is empty in 1 rows of 'train'"), ([1, -1], "must not be negative, got -1")):
        path = write_parquet(tmp_path / f"{labels[1]}.parquet", IMAGES[:2], label=labels)
        with pytest.raises(InputError, match=f"parquet: column 'label' {message}"):
            HuggingFaceImages(str(path), label="label")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    for files in ("nowhere", "*.parquet", "a.parquet"):
        with pytest.raises(FileNotFoundError, match=rf"no Parquet file at {tmp_path}/.*; expected a file, a folder"):
            HuggingFaceImages(str(tmp_path / files))
    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a.parquet: .*Parquet"):
        HuggingFaceImages(str(path))


def test_a_changed_file_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    assert len(HuggingFaceImages(str(path))) == 20
    write_parquet(path, IMAGES[5:])
    images = HuggingFaceImages(str(path))
    assert len(images) == 15
    assert np.array_equal(np.asarray(images[0]), IMAGES[5])


def test_a_name_on_the_hub_is_asked_for_with_its_part_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    given = list[dict[str, Any]]()
    path = write_parquet(tmp_path / "a.parquet", IMAGES, NAMES, label=LABELS)

    def load_dataset(**kwargs: Any) -> Any:
        given.append(kwargs)
        return datasets.Dataset.from_parquet(str(path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images = HuggingFaceImages(repo="someone/pets", split="test", label="label", subset="small", revision="v1")
    assert given == [{"path": "someone/pets", "name": "small", "revision": "v1", "split": "test", "cache_dir": None}]
    assert images.name(0) == "someone/pets test row 0"
    assert images.classes == NAMES


def test_a_hub_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ConnectionError, match="could not reach the Hugging Face Hub for 'someone/pets'"):
        HuggingFaceImages(repo="someone/pets")


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return load(name, *args)

    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        InputError, match=r"HuggingFaceImages needs the package datasets: pip install 'dat-lightning\[hf\]'"
    ):
        HuggingFaceImages(str(path))
