import errno
import io
import os
import pickle
import shutil
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dat_lightning.data import generated
from dat_lightning.data.generated import GeneratedImages
from dat_lightning.data.pixels import CorruptImageError

NUM_IMAGES = 40
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 6, 5, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, NUM_IMAGES)


def save(path: Path, compressed: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **{"image": IMAGES, "label": LABELS, **arrays})
    return path


def cached(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_images_and_labels_are_those_of_the_arrays(tmp_path: Path, compressed: bool) -> None:
    path = save(tmp_path / "1m.npz", compressed)
    images = GeneratedImages(str(path))
    assert len(images) == NUM_IMAGES
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == LABELS.tolist()
    for i in range(NUM_IMAGES):
        image, label = images[i]
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), IMAGES[i])
        assert type(label) is int
        assert label == LABELS[i]
    assert images.name(7) == f"{path} image 7"
    for wrong in (-1, NUM_IMAGES):
        for use in (images.__getitem__, images.name):
            with pytest.raises(IndexError):
                use(wrong)


def test_an_uncompressed_file_is_read_in_place(tmp_path: Path) -> None:
    path = save(tmp_path / "1m.npz")
    images = GeneratedImages(path, cache_dir=tmp_path / "cache")
    images[0]
    assert os.listdir(tmp_path) == ["1m.npz"]  # noqa: PTH208


def test_members_may_come_in_any_order_with_others_and_with_long_headers(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"PK\x03\x04 made by hand"
        archive.writestr("label.npy", npy(LABELS.astype(np.uint8)), zipfile.ZIP_DEFLATED)
        archive.writestr("extra.npy", npy(np.arange(5)))
        # An extra field that the central directory repeats, and one written into the local header alone (zip64).
        member = zipfile.ZipInfo("image.npy")
        member.extra = b"\xfe\xca\x04\x00abcd"
        with archive.open(member, "w", force_zip64=True) as file:
            file.write(npy(IMAGES, version=(2, 0)))
    images = GeneratedImages(path)
    assert all(np.array_equal(np.asarray(images[i][0]), IMAGES[i]) for i in range(NUM_IMAGES))
    assert images.labels.tolist() == LABELS.tolist()


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def test_a_compressed_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = save(tmp_path / "1m.npz", compressed=True), tmp_path / "cache" / "deep"
    GeneratedImages(path, cache)
    (name,) = cached(cache)
    assert np.array_equal(np.load(cache / name), IMAGES)
    assert cached(tmp_path) == ["cache"]
    monkeypatch.setattr(shutil, "copyfileobj", lambda *a: pytest.fail("unpacked twice"))
    assert np.array_equal(np.asarray(GeneratedImages(path, cache)[3][0]), IMAGES[3])


def test_a_changed_original_and_a_cut_copy_are_unpacked_anew(tmp_path: Path) -> None:
    path = save(tmp_path / "1m.npz", compressed=True)
    GeneratedImages(path)
    (first,) = cached(tmp_path)
    os.truncate(tmp_path / first, 100)
    assert np.array_equal(np.asarray(GeneratedImages(path)[39][0]), IMAGES[39])
    # The same name and size at another time.
    save(path, compressed=True, image=IMAGES[::-1])
    os.utime(path, ns=(0, 10**18))
    assert np.array_equal(np.asarray(GeneratedImages(path)[0][0]), IMAGES[39])
    assert len(cached(tmp_path)) == 2


def test_of_two_at_once_one_unpacks_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "1m.npz", compressed=True)
    copies = list[int]()
    copy = shutil.copyfileobj

    def slow_copy(source: Any, target: Any, length: int) -> None:
        copies.append(1)
        target.write(source.read(100))
        target.flush()
        time.sleep(0.3)
        copy(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", slow_copy)
    results = list[bool]()

    def use() -> None:
        images = GeneratedImages(path)
        results.append(all(np.array_equal(np.asarray(images[i][0]), IMAGES[i]) for i in range(NUM_IMAGES)))

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 3
    assert len(copies) == 1
    assert [Path(name).suffix for name in cached(tmp_path)] == [".npy"]


def test_what_an_interrupted_process_left_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "1m.npz", compressed=True)
    copy = shutil.copyfileobj

    def interrupted(source: Any, target: Any, length: int) -> None:
        target.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        GeneratedImages(path)
    (left,) = cached(tmp_path)
    assert (tmp_path / left).stat().st_size == 0
    # As if the process had been killed.
    (tmp_path / left).write_bytes(b"half of it")
    monkeypatch.setattr(shutil, "copyfileobj", copy)
    assert np.array_equal(np.asarray(GeneratedImages(path)[5][0]), IMAGES[5])
    assert [Path(name).suffix for name in cached(tmp_path)] == [".npy"]


def test_a_full_disk_is_told_with_the_size_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "1m.npz", compressed=True)
    size = len(npy(IMAGES))
    expected = f"could not unpack 'image' of {path}, {size} bytes, to {tmp_path}: No space left .* cache_dir"

    class Usage:
        free = size - 1

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage())
        with pytest.raises(OSError, match=expected):
            GeneratedImages(path)
        Usage.free = size
        GeneratedImages(path, tmp_path / "enough")

    def fill(source: Any, target: Any, length: int) -> None:
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fill)
    with pytest.raises(OSError, match=expected) as caught:
        GeneratedImages(path)
    assert caught.value.errno == errno.ENOSPC
    assert sum(p.stat().st_size for p in tmp_path.glob("*.part")) == 0


def test_a_cache_that_cannot_be_a_folder_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "1m.npz", compressed=True)
    with pytest.raises(OSError, match=f"could not unpack .* to {path}/cache: Not a directory"):
        GeneratedImages(path, path / "cache")


def test_damaged_compressed_images_are_noticed_by_their_checksum(tmp_path: Path) -> None:
    # Long enough for the damage to lie beyond what is read with the header.
    path = save(tmp_path / "1m.npz", True, image=np.repeat(IMAGES, 300, axis=0), label=np.repeat(LABELS, 300))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("image.npy")
        middle = info.header_offset + info.compress_size // 2
    content = bytearray(path.read_bytes())
    content[middle] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: 'image' is damaged"):
        GeneratedImages(path)
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"image": IMAGES / 255},
            r"'image' must be uint8 of shape \(N, H, W, 3\), got float64 of shape \(40, 6, 5, 3\)",
        ),
        ({"image": IMAGES.astype(np.int8)}, "'image' must be uint8 .* got int8"),
        ({"image": IMAGES.transpose(0, 3, 1, 2).copy()}, r"'image' must .* shape \(40, 3, 6, 5\)"),
        ({"image": IMAGES[0]}, r"'image' must .* shape \(6, 5, 3\)"),
        ({"image": IMAGES[:0], "label": LABELS[:0]}, r"'image' must .* shape \(0, 6, 5, 3\)"),
        ({"image": np.array([None] * 40)}, "'image' must be uint8 .* got object"),
        ({"image": np.asfortranarray(IMAGES)}, "'image' is in Fortran order"),
        ({"label": LABELS / 1}, r"'label' must be integers of shape \(N,\), got float64"),
        ({"label": LABELS > 4}, "'label' must be integers .* got bool"),
        ({"label": LABELS[:, None]}, r"'label' must be integers .* shape \(40, 1\)"),
        ({"label": np.array([None] * 40)}, "'label' cannot be read: Object arrays"),
        ({"label": LABELS - 5}, "'label' must not be negative, got -5"),
        ({"label": LABELS[1:]}, "has 40 entries in 'image', but 39 in 'label'"),
    ],
)
def test_arrays_of_another_kind_are_named(
    tmp_path: Path, compressed: bool, arrays: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "bad.npz", compressed, **arrays)
    with pytest.raises(ValueError, match=f"{path}:? {message}"):
        GeneratedImages(path)
    # Found out before anything is unpacked.
    assert cached(tmp_path) == []


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no file at {tmp_path}/none.npz"):
        GeneratedImages(tmp_path / "none.npz")
    path = tmp_path / "bad.npz"
    path.write_bytes(npy(IMAGES))
    with pytest.raises(ValueError, match=f"{path} is not a readable .npz file"):
        GeneratedImages(path)
    np.savez(path, images=IMAGES, label=LABELS)
    with pytest.raises(ValueError, match=rf"{path} lacks \['image'\].* got \['images', 'label'\]"):
        GeneratedImages(path)
    save(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{path} is not a readable .npz file"):
        GeneratedImages(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("label.npy", npy(LABELS))
        archive.writestr("image.npy", npy(IMAGES)[:-7])
    with pytest.raises(ValueError, match=r"'image' has 3593 bytes, but its shape is \(40, 6, 5, 3\)"):
        GeneratedImages(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("label.npy", npy(LABELS))
        archive.writestr("image.npy", b"no array")
    with pytest.raises(ValueError, match="'image' cannot be read"):
        GeneratedImages(path)


def test_a_file_that_shrinks_later_gives_a_corrupt_image(tmp_path: Path) -> None:
    path = save(tmp_path / "1m.npz")
    images = GeneratedImages(path)
    os.truncate(path, 1000)
    with pytest.raises(CorruptImageError, match=f"{path} image 39 is not a readable image"):
        images[39]


def test_pickles_hold_labels_but_no_images_and_workers_agree(tmp_path: Path) -> None:
    many = np.zeros((2000, 32, 32, 3), dtype=np.uint8)
    big = GeneratedImages(save(tmp_path / "big.npz", image=many, label=np.zeros(2000, dtype=int)))
    big[0]
    assert len(pickle.dumps(big)) < 2000 * 8 + 1000
    images = GeneratedImages(save(tmp_path / "small.npz", compressed=True))
    images[0]
    again = pickle.loads(pickle.dumps(images))
    assert np.array_equal(np.asarray(again[9][0]), IMAGES[9])
    loader = DataLoader(images, batch_size=None, num_workers=2, collate_fn=lambda entry: np.asarray(entry[0]))
    assert np.array_equal(np.stack(list(loader)), IMAGES)


def test_a_process_that_comes_just_too_late_leaves_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "1m.npz", compressed=True)
    GeneratedImages(path)
    (name,) = cached(tmp_path)
    with zipfile.ZipFile(path) as archive:
        generated._unpack(archive, tmp_path / name, (tmp_path / name).stat().st_size)
    assert cached(tmp_path) == [name]
