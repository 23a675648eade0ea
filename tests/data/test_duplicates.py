import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from dat_lightning.data import PairedDataModule, hash_search
from dat_lightning.data.duplicates import contact_sheet, data_section, exclude_duplicates, main
from dat_lightning.data.hash_search import DuplicatePair, near_duplicates
from dat_lightning.data.image_hashes import (
    FeatureHasher,
    ImageHashes,
    feature_hashes,
    mirrored_hashes,
    perceptual_hash,
    perceptual_hashes,
)
from dat_lightning.data.images import exclusion_entry
from dat_lightning.data.pixels import CorruptImageError

# The search.


def random_hashes(count: int, words: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, words), dtype=np.uint64)


def flipped(row: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """A hash with the given bits changed."""
    words = [int(word) for word in row]
    for bit in bits:
        words[bit // 64] ^= 1 << bit % 64
    return np.array(words, dtype=np.uint64)


def brute_force(ood: np.ndarray, reference: np.ndarray, max_distance: int) -> list[tuple[int, int, int]]:
    """All pairs compared, bit by bit in Python's integers."""
    found = [
        (sum(bin(int(v) ^ int(w)).count("1") for v, w in zip(a, b, strict=True)), i, j)
        for i, a in enumerate(ood)
        for j, b in enumerate(reference)
    ]
    return [(i, j, distance) for distance, i, j in sorted(found) if distance <= max_distance]


def hashes_of(values: np.ndarray) -> ImageHashes:
    return ImageHashes(values, np.arange(len(values)))


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("max_distance", [0, 1, 3, 4, 6, 7, 8, 11])
@pytest.mark.parametrize("more", ["ood", "reference"])
def test_the_search_finds_what_comparing_all_finds(
    words: int, max_distance: int, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours at every distance, in every distribution over the bands; blocks so small that there are many."""
    monkeypatch.setattr(hash_search, "_MAX_ENTRIES", 700)
    monkeypatch.setattr(hash_search, "_MAX_QUERIES", 64)
    monkeypatch.setattr(hash_search, "_MAX_PAIRS", 50)
    few, generator = random_hashes(20, words), np.random.default_rng(1)
    planted = [flipped(few[k % 20], generator.permutation(64 * words)[: k % 15].tolist()) for k in range(120)]
    # All bits in one band, and as even over the bands as can be.
    planted += [flipped(few[k], range(16 * k, 16 * k + d)) for k in range(4 * words) for d in range(1, 13)]
    planted += [flipped(few[d], [16 * (k % (4 * words)) + k // (4 * words) for k in range(d)]) for d in range(1, 13)]
    many = np.concatenate([random_hashes(100, words, seed=2), np.stack(planted)])
    ood, reference = (many, few) if more == "ood" else (few, many)
    expected = brute_force(ood, reference, max_distance)
    assert [tuple(p) for p in near_duplicates(hashes_of(ood), hashes_of(reference), max_distance)] == expected
    assert {distance for *_, distance in expected} == set(range(max_distance + 1))


@settings(max_examples=30, deadline=None)
@given(
    count=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    max_distance=st.integers(0, 40),
    step=st.integers(1, 2**60),
)
def test_the_search_agrees_on_hashes_that_crowd(count: tuple[int, int], max_distance: int, step: int) -> None:
    a, b = ((np.arange(n, dtype=np.uint64) * np.uint64(step) >> np.uint64(3))[:, None] for n in count)
    expected = brute_force(a, b, max_distance)
    assert [tuple(p) for p in near_duplicates(hashes_of(a), hashes_of(b), max_distance)] == expected


def test_pairs_name_places_in_the_data_sets() -> None:
    """Corrupt images have no hash, so that rows and places differ."""
    values = random_hashes(3)
    ood, reference = ImageHashes(values, np.array([4, 7, 9])), ImageHashes(values[1:], np.array([10, 20]))
    assert near_duplicates(ood, reference, 0) == [DuplicatePair(7, 10, 0), DuplicatePair(9, 20, 0)]


def test_searches_that_cannot_be_are_refused() -> None:
    one, two = hashes_of(random_hashes(2)), hashes_of(random_hashes(2, words=2))
    with pytest.raises(ValueError, match="hashes of one length, got 64 and 128 bits"):
        near_duplicates(one, two, 3)
    for distance in (-1, 64):
        with pytest.raises(ValueError, match=rf"max_distance must lie in 0 … 63, got {distance}"):
            near_duplicates(one, one, distance)


# Hashes.


def photographs(side: int = 200) -> list[Image.Image]:
    """Ten parts of scikit-learn's two photographs."""
    parts = []
    for photograph in load_sample_images().images:
        image = Image.fromarray(photograph)
        corners = [(0, 0), (220, 0), (440, 0), (0, 220), (220, 220)]
        parts += [image.crop((x, y, x + side, y + side)) for x, y in corners]
    return parts


def bits_between(a: Any, b: Any) -> int:
    difference = int(perceptual_hash(a)[0]) ^ int(perceptual_hash(b)[0])
    return bin(difference).count("1")


def compressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


CHANGES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "compressed": (compressed, 4),
    "smaller": (lambda image: image.resize((50, 50), Image.Resampling.BICUBIC), 3),
    "darker": (lambda image: ImageEnhance.Brightness(image).enhance(0.9), 3),
    "less contrast": (lambda image: ImageEnhance.Contrast(image).enhance(0.5), 3),
    "grey": (lambda image: image.convert("L"), 2),
    "a pixel less": (lambda image: image.crop((1, 1, 199, 199)), 4),
    "other colours": (lambda image: image.convert("P", palette=Image.Palette.ADAPTIVE), 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_near_duplicates_share_most_bits(change: str) -> None:
    make, most = CHANGES[change]
    assert max(bits_between(image, make(image)) for image in photographs()) <= most


def test_different_pictures_differ_in_many_bits() -> None:
    parts = photographs()
    distances = [bits_between(a, b) for k, a in enumerate(parts) for b in parts[:k]]
    assert min(distances) >= 14
    assert np.mean(distances) == pytest.approx(32, abs=4)


def test_bits_are_signs_of_cosines() -> None:
    """An image that is one cosine sets the bit of its frequency alone; an inverted one none."""
    rows = np.arange(32) + 0.5
    seen = set()
    for u, v in [(0, 1), (1, 0), (1, 1), (2, 3), (0, 8), (7, 2)]:
        wave = np.outer(np.cos(math.pi * u * rows / 32), np.cos(math.pi * v * rows / 32))
        image = torch.tensor(0.5 + 0.4 * wave, dtype=torch.float64)[None]
        (word,) = perceptual_hash(image)
        assert bin(int(word)).count("1") == 1
        assert int(perceptual_hash(1 - image)[0]) == 0
        seen.add(int(word))
    assert len(seen) == 6
    # Too fine for the 64 lowest.
    fine = np.outer(np.cos(math.pi * 7 * rows / 32), np.cos(math.pi * 8 * rows / 32))
    assert int(perceptual_hash(torch.tensor(0.5 + 0.4 * fine)[None])[0]) == 0


@pytest.mark.parametrize("level", [0, 1, 77, 254, 255])
def test_images_of_one_colour_have_one_hash(level: int) -> None:
    for size in ((32, 32), (17, 45)):
        assert int(perceptual_hash(np.full((*size, 3), level, dtype=np.uint8))[0]) == 0


def test_all_kinds_of_images_have_the_same_hash() -> None:
    image = photographs()[0]
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [array, tensor, tensor.float() / 255, tensor.double() / 255]
    assert {int(perceptual_hash(kind)[0]) for kind in kinds} == {int(perceptual_hash(image)[0])}
    grey = np.asarray(image.convert("L"))
    assert int(perceptual_hash(grey)[0]) == int(perceptual_hash(torch.from_numpy(grey / 255)[None])[0])
    # A darker green counts more than a lighter red.
    colours, luma = np.zeros((32, 32, 3), np.uint8), np.full((32, 32), 60, np.uint8)
    colours[:16, :, 0], colours[16:, :, 1], luma[16:] = 200, 150, 88
    assert bits_between(colours, luma) == 0
    assert bits_between(colours, 255 - luma) > 0


def test_hashes_of_mirror_images_are_known() -> None:
    class Flipped(Pictures):
        def __getitem__(self, index: int) -> Image.Image:
            image: Image.Image = super().__getitem__(index)
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    images = photographs()
    of_mirrored, expected = perceptual_hashes(Flipped(images)), mirrored_hashes(perceptual_hashes(Pictures(images)))
    different = [
        bin(int(a) ^ int(b)).count("1") for a, b in zip(of_mirrored.hashes[:, 0], expected.hashes[:, 0], strict=True)
    ]
    assert max(different) <= 1
    twice = mirrored_hashes(expected)
    assert np.array_equal(twice.hashes, perceptual_hashes(Pictures(images)).hashes)


class Pictures:
    """Images in memory; those that are ``None`` are corrupt."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = list(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if self.images[index] is None:
            raise CorruptImageError(f"picture {index}", "it is damaged")
        return self.images[index]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_images_are_left_out_and_counted(num_workers: int) -> None:
    images = photographs()
    images[0] = images[4] = images[5] = None  # type: ignore[call-overload]
    labelled = [image if image is None else (image, 3) for image in images]
    result = perceptual_hashes(Pictures(labelled), batch_size=2, num_workers=num_workers)
    assert result.indices.tolist() == [1, 2, 3, 6, 7, 8, 9]
    assert result.num_skipped == 3
    assert np.array_equal(result.hashes, np.stack([perceptual_hash(image) for image in images if image is not None]))
    nothing = perceptual_hashes(Pictures([None]))
    assert (nothing.hashes.shape, nothing.num_skipped) == ((0, 1), 1)


class Colours(nn.Module):
    """Mean colour and its deviation, in a tuple as torch-fidelity's extractors give it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        x = images.float().flatten(2)
        return (self.dropout(torch.cat([x.mean(2), x.std(2)], dim=1)),)


def test_feature_hashes_measure_angles() -> None:
    """The share of different bits is the angle between centred features over π."""
    images = photographs(side=40)
    hasher = FeatureHasher(Colours(), Pictures(images), bits=4096, batch_size=3)
    result = hasher(Pictures(images))
    pixels = np.stack([np.asarray(image) for image in images]).reshape(10, -1, 3).astype(float)
    features = np.concatenate([pixels.mean(1), pixels.std(1, ddof=1)], axis=1)
    centred = features - features.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    angles = np.arccos((unit @ unit.T).clip(-1, 1)) / math.pi
    bits = np.unpackbits(result.hashes.view(np.uint8), axis=1)
    shares = (bits[:, None] != bits[None]).mean(2)
    assert np.abs(shares - angles).max() < 0.03  # a deviation is 0.008


def test_feature_hashes_of_two_data_sets_share_a_centre() -> None:
    images = photographs(side=40)
    whole, part = Pictures(images), Pictures(images[:4])
    expected = feature_hashes(whole, Colours(), bits=128)
    assert expected.hashes.shape == (10, 2)
    assert np.array_equal(feature_hashes(part, Colours(), 128, center_of=whole).hashes, expected.hashes[:4])
    assert not np.array_equal(feature_hashes(part, Colours(), 128).hashes, expected.hashes[:4])


def test_feature_hashes_bring_images_to_one_size() -> None:
    images = [*photographs(side=40), photographs(side=90)[0], None]
    hasher = FeatureHasher(Colours(), Pictures(images), bits=64, image_size=20)
    result = hasher(Pictures(images))
    assert (len(result.hashes), result.num_skipped) == (11, 1)


def test_feature_hashes_that_cannot_be_are_refused() -> None:
    for bits in (0, 100):
        with pytest.raises(ValueError, match=f"bits must be a positive multiple of 64, got {bits}"):
            FeatureHasher(Colours(), Pictures(photographs()), bits=bits)
    with pytest.raises(ValueError, match="none of 2 reference images can be read"):
        FeatureHasher(Colours(), Pictures([None, None]))


# The program.


class Files(Pictures):
    """PNG files of a folder, named by their paths in it."""

    def __init__(self, root: str) -> None:
        self.paths = sorted(Path(root).glob("*/*.png"))
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        try:
            return Image.open(self.paths[index]).convert("RGB")
        except OSError as error:
            raise CorruptImageError(str(self.paths[index]), "it is damaged") from error

    def exclusion_entry(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()


class FolderPair(PairedDataModule):
    """In-distribution images in one folder, OOD images of two splits in others."""

    def __init__(self, root: str, train: str = "id", tolerance: float = 0.0) -> None:
        super().__init__()
        self.root = root
        self.train = train
        self.tolerance = tolerance

    def in_distribution(self, split: Literal["train", "val", "test"]) -> Any:
        files = Files(f"{self.root}/{self.train if split == 'train' else split}")
        return [(files[k], 0) for k in range(len(files))]

    def out_of_distribution(self, split: Literal["train", "held_out"]) -> Any:
        return Files(f"{self.root}/{split}")

    def transform(self, stream: str) -> Any:
        raise NotImplementedError

    def evaluation_transform(self) -> Any:
        raise NotImplementedError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Folders of photographs, of which two OOD images and one held-out one are near-duplicates; one is damaged."""
    parts = photographs(side=64)
    mirror = parts[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    held_out = {"b/darker.png": ImageEnhance.Brightness(parts[3]).enhance(0.9), "b/other.png": parts[8]}
    folders: dict[str, dict[str, Image.Image]] = {
        "id": {f"x/{k}.png": parts[k] for k in range(4)},
        "test": {"x/9.png": parts[9]},
        "train": {"a/mirror.png": mirror, "a/ü same.png": parts[0], "b/new.png": parts[7], "b/tested.png": parts[9]},
        "held_out": held_out,
    }
    for folder, images in folders.items():
        for name, image in images.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    (tmp_path / "train" / "b" / "damaged.png").write_bytes(b"no image")
    data = {"class_path": f"{__name__}.FolderPair", "init_args": {"root": str(tmp_path), "tolerance": "1e-3"}}
    model = {"class_path": "no.such.Model"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 1, "model": model, "data": data}), encoding="utf-8")
    return path


def listed(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_program_writes_the_list(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    path, sheet = tmp_path / "lists" / "exclude.txt", tmp_path / "pairs.png"
    main(["--config", str(config), "--output", str(path), "--sheet", str(sheet), "--num_workers", str(num_workers)])
    assert listed(path) == ["a/mirror.png", "a/ü same.png", "b/darker.png"]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "OOD train: 2 of 5 images are near-duplicates",
        "OOD held_out: 1 of 2 images are near-duplicates",
        "skipped because they are corrupt: 1 images",
    ]
    with Image.open(sheet) as image:
        assert image.width > 2 * 96


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mirrored", "false"], ["a/ü same.png", "b/darker.png"]),
        (["--ood_splits", "[held_out]"], ["b/darker.png"]),
        (["--reference_splits", "[test]"], ["b/tested.png"]),
        (["--reference_splits", "[train, test]"], ["a/mirror.png", "a/ü same.png", "b/tested.png", "b/darker.png"]),
        (["--data.init_args.train", "test"], ["b/tested.png"]),
        (
            ["--method", "features", "--extractor", f"{__name__}.Colours", "--bits", "512", "--max_distance", "2"],
            ["a/mirror.png", "a/ü same.png"],  # brightness is a feature of this extractor
        ),
    ],
)
def test_arguments_say_what_is_compared(
    arguments: list[str], expected: list[str], config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "exclude.txt"
    main(["--config", str(config), "--output", str(path), *arguments])
    assert listed(path) == expected


def test_only_the_data_section_is_read(config: Path, tmp_path: Path) -> None:
    contents = yaml.safe_load(config.read_text(encoding="utf-8"))
    below = tmp_path / "below.yaml"
    below.write_text(yaml.safe_dump({"fit": contents}), encoding="utf-8")
    assert data_section(below) == data_section(config) == contents["data"]


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "which is no file"), ("model: {}", "has no section data"), ("data: 3", "has no section data")],
)
def test_a_config_without_data_is_refused(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(path), "--output", str(tmp_path / "list.txt")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_list_that_exists_is_not_overwritten(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text("kept\n", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"exclude\.txt, which exists"):
        main(["--config", str(config), "--output", str(path)])
    assert path.read_text(encoding="utf-8") == "kept\n"


def test_what_cannot_be_compared_is_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output = FolderPair(str(tmp_path)), str(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="method 'features' needs an extractor"):
        exclude_duplicates(data, output, method="features")
    monkeypatch.setattr(FolderPair, "out_of_distribution", lambda self, split: None)
    with pytest.raises(ValueError, match=r"FolderPair has no out-of-distribution images in the splits \['train'"):
        exclude_duplicates(data, output)


def test_images_without_a_name_are_listed_by_index() -> None:
    assert exclusion_entry(Pictures(photographs()), 3) == "3"
    view: Any = torch.utils.data.Subset(cast(Any, Pictures(photographs())), [5])
    with pytest.raises(TypeError, match="Subset is a view of another data set and has no exclusion_entry"):
        exclusion_entry(view, 0)


def test_the_sheet_has_a_row_for_each_distance() -> None:
    def plain(level: int) -> np.ndarray:
        return np.full((4, 4, 3), level, dtype=np.uint8)

    ood = Pictures([plain(10), torch.full((1, 8, 8), 20 / 255), plain(30)])
    reference = Pictures([(Image.fromarray(plain(110)), 1), (plain(120), 2)])
    pairs = [DuplicatePair(0, 0, 2), DuplicatePair(1, 1, 2), DuplicatePair(2, 1, 5)]
    pixels = np.asarray(contact_sheet(pairs, ood, reference, per_distance=2, side=24))
    margin, width, height = 16, 51, 27

    def at(row: int, column: int) -> tuple[int, int]:
        y, x = row * height + 12, margin + column * width + 12
        return int(pixels[y, x, 0]), int(pixels[y, x + 24, 0])

    assert pixels.shape == (2 * height, margin + 2 * width, 3)
    assert [at(0, 0), at(0, 1), at(1, 0), at(1, 1)] == [(10, 110), (20, 120), (30, 120), (255, 255)]


def test_python_m_shows_its_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["duplicates", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in ("config", "output", "max_distance", "mirrored", "sheet", "extractor"))


def test_a_later_config_wins(config: Path, tmp_path: Path) -> None:
    """As for dat-lightning: a fragment names what differs and no class."""
    fragment, path = tmp_path / "fragment.yaml", tmp_path / "list.txt"
    fragment.write_text(yaml.safe_dump({"data": {"init_args": {"root": str(tmp_path / "none")}}}), encoding="utf-8")
    with pytest.raises(ValueError, match="no out-of-distribution images"):
        main(["--config", str(config), "--config", str(fragment), "--output", str(path)])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump({"data": {"init_args": {"root": str(tmp_path)}}}), encoding="utf-8")
    files = [part for file in (config, fragment, again) for part in ("--config", str(file))]
    main([*files, "--output", str(path)])
    assert listed(path) == ["a/mirror.png", "a/ü same.png", "b/darker.png"]
