import hashlib
import pickle
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from dat_lightning.data.cifar import CIFARImages

Name = Literal["cifar10", "cifar100"]
FOLDERS: dict[Name, str] = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
SOURCES: dict[Name, Any] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
CLASSES: dict[Name, list[str]] = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": [f"class {k}" for k in range(100)],
}
PER_FILE = 4


def contents(name: Name) -> dict[str, dict[str, Any]]:
    """The published files in small: rows of 3 072 bytes, all red, then green, then blue, row by row."""
    rng = np.random.default_rng(len(name))
    data = ["test_batch", *(f"data_batch_{k}" for k in range(1, 6))] if name == "cifar10" else ["train", "test"]
    files: dict[str, dict[str, Any]] = {}
    for file in data:
        rows = rng.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        labels = rng.integers(0, len(CLASSES[name]), PER_FILE).tolist()
        if name == "cifar10":
            files[file] = {"batch_label": file, "labels": labels, "data": rows}
        else:
            files[file] = {"coarse_labels": [0] * PER_FILE, "fine_labels": labels, "data": rows}
    if name == "cifar10":
        files["batches.meta"] = {"label_names": CLASSES[name], "num_vis": 3072}
    else:
        files["meta"] = {"fine_label_names": CLASSES[name], "coarse_label_names": ["all"]}
    return files


def write_files(root: Path, name: Name, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Writes the files and makes torchvision expect their checksums; the checks themselves stay as they are."""
    files, source = contents(name), SOURCES[name]
    folder = root / FOLDERS[name]
    folder.mkdir(parents=True)
    checksums = {}
    for file, content in files.items():
        data = pickle.dumps(content, protocol=2)
        (folder / file).write_bytes(data)
        checksums[file] = hashlib.md5(data).hexdigest()
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[file, checksums[file]] for file, _ in getattr(source, part)])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": checksums[source.meta["filename"]]})
    return files


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("train", [True, False])
def test_the_published_files_give_their_images_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Name, train: bool
) -> None:
    files = write_files(tmp_path, name, monkeypatch)
    images = CIFARImages(name, str(tmp_path), train)
    if name == "cifar10":
        used, key = ([f"data_batch_{k}" for k in range(1, 6)] if train else ["test_batch"]), "labels"
    else:
        used, key = (["train"] if train else ["test"]), "fine_labels"
    labels = [label for file in used for label in files[file][key]]
    rows = np.concatenate([files[file]["data"] for file in used])
    assert len(images) == len(used) * PER_FILE
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == labels
    assert list(images.classes) == CLASSES[name]
    for i in range(len(images)):
        image, label = images[i]
        assert (image.mode, image.size, label) == ("RGB", (32, 32), labels[i])
        assert type(label) is int
        for x, y in ((0, 0), (5, 3), (31, 30)):
            assert image.getpixel((x, y)) == tuple(int(rows[i, 1024 * c + 32 * y + x]) for c in range(3))
    assert images.name(2) == f"{name} {'train' if train else 'test'} image 2"
    for wrong in (-1, len(images)):
        for use in (images.__getitem__, images.name):
            with pytest.raises(IndexError):
                use(wrong)
    again = pickle.loads(pickle.dumps(images))
    assert np.array_equal(np.asarray(again[1][0]), np.asarray(images[1][0]))


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "cifar10", monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_3").unlink()
    expected = f"data_batch_3 missing in {folder}; `download: true` fetches .*cifar-10-python.tar.gz .* in {tmp_path}"
    with pytest.raises(FileNotFoundError, match=expected):
        CIFARImages("cifar10", tmp_path, train=False)
    with pytest.raises(FileNotFoundError, match=r"train, test, meta missing in .*cifar-100-python"):
        CIFARImages("cifar100", tmp_path / "nowhere", train=True)
    with pytest.raises(FileNotFoundError, match="cifar-10-python"):
        CIFARImages("cifar10", folder / "test_batch", train=True)


@pytest.mark.parametrize("file", ["test_batch", "batches.meta"])
def test_changed_files_are_named_and_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    write_files(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / file
    for content in (pickle.dumps(Evil()), path.read_bytes()[:-10], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{file} in .*cifar-10-batches-py differ from the published files"):
            CIFARImages("cifar10", tmp_path, train=False)
    assert not (tmp_path / "executed").exists()


def test_classes_that_are_left_out_leave_the_others_numbered_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, "cifar10", monkeypatch)
    whole = CIFARImages("cifar10", tmp_path, train=True)
    some = CIFARImages("cifar10", tmp_path, train=True, skip_classes=["cat", "truck", "airplane"])
    assert some.classes == ("automobile", "bird", "deer", "dog", "frog", "horse", "ship")
    kept = [i for i in range(len(whole)) if whole.classes[whole[i][1]] not in ("cat", "truck", "airplane")]
    assert 0 < len(kept) == len(some) < len(whole)
    for place, i in enumerate(kept):
        assert some.name(place) == whole.name(i) == f"cifar10 train image {i}"
        assert some.classes[some[place][1]] == whole.classes[whole[i][1]]
        assert np.array_equal(np.asarray(some[place][0]), np.asarray(whole[i][0]))
    assert some.labels.tolist() == [some[place][1] for place in range(len(some))]


@pytest.mark.parametrize(
    ("skip_classes", "message"),
    [
        (["cat", "trucks"], r"skip_classes has 'trucks', which is no class of cifar10; near it is 'truck'"),
        (["sofa"], r"has 'sofa', which is no class of cifar10; its classes are airplane, automobile, bird, …"),
        ("cat", r"skip_classes must be a list of names, got 'cat'"),
        (CLASSES["cifar10"], r"skip_classes leaves none of the 10 classes of cifar10"),
    ],
)
def test_classes_that_there_are_not_cannot_be_left_out(
    skip_classes: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, "cifar10", monkeypatch)
    with pytest.raises(ValueError, match=message):
        CIFARImages("cifar10", tmp_path, train=True, skip_classes=skip_classes)


def test_download_fetches_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = list[tuple[str, Path]]()

    def fetch(url: str, root: Path, filename: str, md5: str) -> None:
        fetched.append((url, Path(root)))
        write_files(Path(root), "cifar100", monkeypatch)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    for _ in range(2):
        assert len(CIFARImages("cifar100", tmp_path, train=True, download=True)) == PER_FILE
    assert fetched == [(CIFAR100.url, tmp_path)]


def test_a_file_that_cannot_be_read_is_no_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        CIFARImages("cifar10", tmp_path, train=True)


def test_a_failed_download_names_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, root: Path, filename: str, md5: str) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(ConnectionError, match=f"could not download {CIFAR10.url} to {tmp_path}: .*no route to host"):
        CIFARImages("cifar10", tmp_path, train=True, download=True)


def test_a_download_of_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, root: Path, filename: str, md5: str) -> None:
        write_files(Path(root), "cifar10", monkeypatch)
        (Path(root) / "cifar-10-batches-py" / "data_batch_5").write_bytes(b"a login page")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    with pytest.raises(ValueError, match=r"data_batch_5 in .* differ from the published files"):
        CIFARImages("cifar10", tmp_path, train=True, download=True)


def test_other_names_are_refused(tmp_path: Path) -> None:
    wrong: Any = "cifar20"
    with pytest.raises(ValueError, match=r"name must be one of \['cifar10', 'cifar100'\], got 'cifar20'"):
        CIFARImages(wrong, tmp_path, train=True)
