import os
import pickle
import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from dat_lightning.data.folders import ImageFolder, LabelledFolder
from dat_lightning.data.pixels import CorruptImageError


def colour_of(path: str) -> tuple[int, int, int]:
    digest = sum((k + 1) * ord(letter) for k, letter in enumerate(path))
    return digest % 251, digest % 241, digest % 239


def make_images(root: Path, *paths: str) -> Path:
    """Puts a lossless image of a colour of its own at each path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), colour_of(path)).save(root / path, "PNG")
    return root


def paths_of(folder: LabelledFolder | ImageFolder) -> list[str]:
    return [os.path.relpath(folder.name(i), folder.root) for i in range(len(folder))]


TREE = [
    "cat/b.png",
    "cat/a.JPEG",
    "cat/deep/er/0.jpg",
    "cat/deep/9.webp",
    "cat/deep-1/5.png",
    "cat/deep.png",
    "Dog/10.png",
    "Dog/9.png",
    "ähre/x.Tif",
    "n02/1.bmp",
    "n02/ünï code.pgm",
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = make_images(tmp_path / "tree", *TREE)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "png").write_text("no ending")
    (root / "top.txt").write_text("no class")
    return root


def test_classes_files_labels_and_their_order_are_torchvision_s(tree: Path) -> None:
    ours, theirs = LabelledFolder(tree), TorchvisionFolder(tree)
    assert list(ours.classes) == theirs.classes
    assert ours.labels.dtype == np.int64
    assert [(ours.name(i), int(ours.labels[i])) for i in range(len(ours))] == theirs.samples
    assert len(ours) == len(TREE)


def test_entries_are_the_images_with_their_labels(tree: Path) -> None:
    folder = LabelledFolder(str(tree))
    # Written out: names sorted by code point, so that capitals come first and umlauts last.
    index_of = {"Dog": 0, "cat": 1, "n02": 2, "ähre": 3}
    for i, path in enumerate(paths_of(folder)):
        image, label = folder[i]
        assert image.mode == "RGB"
        assert image.getpixel((1, 1)) == colour_of(path)
        assert type(label) is int
        assert label == index_of[path.split("/")[0]]
    for wrong in (-1, len(folder)):
        for use in (folder.__getitem__, folder.name):
            with pytest.raises(IndexError):
                use(wrong)


def test_chosen_classes_have_the_indices_of_their_order(tree: Path) -> None:
    folder = LabelledFolder(tree, ["n02", "Dog"])
    assert folder.classes == ("n02", "Dog")
    assert list(zip(paths_of(folder), folder.labels.tolist(), strict=True)) == [
        ("n02/1.bmp", 0),
        ("n02/ünï code.pgm", 0),
        ("Dog/10.png", 1),
        ("Dog/9.png", 1),
    ]


def test_a_folder_of_all_endings_has_every_one(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"a/{ending[1:]}{ending}" for ending in IMG_EXTENSIONS))
    make_images(tmp_path, "a/other.gif", "a/other.png.txt")
    assert len(LabelledFolder(tmp_path)) == len(ImageFolder(tmp_path)) == len(IMG_EXTENSIONS)


def test_unlabelled_images_are_sorted_by_folder_and_then_by_name(tree: Path) -> None:
    make_images(tree, "top.png")
    folder = ImageFolder(tree)
    assert paths_of(folder) == [
        "top.png",
        "Dog/10.png",
        "Dog/9.png",
        "cat/a.JPEG",
        "cat/b.png",
        "cat/deep.png",
        "cat/deep/9.webp",
        "cat/deep-1/5.png",
        "cat/deep/er/0.jpg",
        "n02/1.bmp",
        "n02/ünï code.pgm",
        "ähre/x.Tif",
    ]
    assert [folder[i].getpixel((0, 0)) for i in range(len(folder))] == [colour_of(p) for p in paths_of(folder)]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    make_images(tmp_path, "a/1.png", "a/._1.png", "a/.cache/2.png", ".hidden/3.png")
    labelled = LabelledFolder(tmp_path)
    assert labelled.classes == ("a",)
    assert paths_of(labelled) == paths_of(ImageFolder(tmp_path)) == ["a/1.png"]


@pytest.mark.timeout(20)
def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    elsewhere = make_images(tmp_path / "elsewhere", "far/1.png", "2.png")
    root = make_images(tmp_path / "root", "a/0.png", "b/3.png")
    (root / "a" / "linked").symlink_to(elsewhere / "far")
    (root / "a" / "4.png").symlink_to(elsewhere / "2.png")
    (root / "a" / "5.png").symlink_to(elsewhere / "nothing.png")
    (root / "c").symlink_to(elsewhere, target_is_directory=True)
    (root / "b" / "6.png").symlink_to("6.png")
    # Back to itself, to the root, and to each other.
    (root / "a" / "self").symlink_to(".")
    (elsewhere / "far" / "back").symlink_to(root)
    (root / "b" / "to_a").symlink_to("../a")
    (root / "a" / "to_b").symlink_to("../b")
    folder = LabelledFolder(root)
    everything = ImageFolder(root)
    assert folder.classes == ("a", "b", "c")
    paths = paths_of(folder)
    assert len(set(paths)) == len(paths)
    assert {"a/0.png", "a/4.png", "a/linked/1.png", "b/3.png", "c/2.png", "c/far/1.png", "b/to_a/0.png"} <= set(paths)
    assert not any("self" in path or "to_a/to_b" in path or "to_b/to_a" in path for path in paths)
    assert not any("back" in path for path in paths_of(everything))
    assert folder[paths.index("a/4.png")][0].getpixel((0, 0)) == colour_of("2.png")
    # A link into nothing is no silent gap.
    for path, reason in (("a/5.png", "No such file"), ("b/6.png", "symbolic links")):
        with pytest.raises(CorruptImageError, match=reason):
            folder[paths.index(path)]


def test_a_linked_root_and_a_pipe_do_no_harm(tmp_path: Path) -> None:
    make_images(tmp_path / "real", "a/1.png")
    os.mkfifo(tmp_path / "real" / "a" / "pipe.png")
    (tmp_path / "link").symlink_to("real")
    folder = LabelledFolder(tmp_path / "link")
    assert [folder.name(i) for i in range(len(folder))] == [str(tmp_path / "link/a/1.png")]


def test_names_that_are_no_unicode_are_found(tmp_path: Path) -> None:
    make_images(tmp_path, "a/1.png")
    try:
        os.rename(tmp_path / "a" / "1.png", os.fsencode(tmp_path) + b"/a/\xff\xe9.png")  # noqa: PTH104
    except OSError:
        pytest.skip("the file system wants Unicode")
    assert LabelledFolder(tmp_path)[0][0].getpixel((0, 0)) == ImageFolder(tmp_path)[0].getpixel((0, 0))


def test_no_file_is_looked_at_while_scanning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path, *(f"{c}/{i}.png" for c in "abc" for i in range(20)))
    calls = list[Any]()

    def recorded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, **arguments: Any) -> Any:
            calls.append(path)
            return real(path, **arguments)

        return call

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    assert len(LabelledFolder(tmp_path)) == len(ImageFolder(tmp_path)) == 60
    assert not [path for path in calls if str(path).endswith(".png")]


def test_lists_and_folder_names_leave_images_out(tree: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.txt"
    first.write_text("# those that CIFAR has\n\n./cat/a.JPEG\n  cat//deep/9.webp  \n", encoding="utf-8-sig")
    second = tmp_path / "second.txt"
    second.write_text("n02/ünï code.pgm\r\ncat/a.JPEG\r\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = ImageFolder(tree, [first, str(second)], skip_folders=["Dog", "ähre"])
    assert paths_of(folder) == ["cat/b.png", "cat/deep.png", "cat/deep-1/5.png", "cat/deep/er/0.jpg", "n02/1.bmp"]


def test_skip_folders_means_those_at_the_top_alone(tmp_path: Path) -> None:
    make_images(tmp_path, "a/1.png", "b/a/2.png")
    assert paths_of(ImageFolder(tmp_path, skip_folders=["a"])) == ["b/a/2.png"]


def test_lines_and_folders_that_match_nothing_are_counted_in_a_warning(tree: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("cat/a.JPEG\ncat/a.jpeg\nzebra/1.png\nDog/77.png\n")
    with pytest.warns(UserWarning, match=r"2 of 4 paths in .*list.txt match no image below .*tree.*: 'cat/a.jpeg'"):
        folder = ImageFolder(tree, [listed], skip_folders=["Dog"])
    assert "cat/a.JPEG" not in paths_of(folder)
    with pytest.warns(UserWarning, match=r"1 of 2 skip_folders are not in .*tree.*: 'n03'"):
        ImageFolder(tree, skip_folders=["n03", "n02"])


@pytest.mark.parametrize("kind", [LabelledFolder, ImageFolder])
def test_what_is_missing_at_the_root_is_named(tmp_path: Path, kind: type[LabelledFolder | ImageFolder]) -> None:
    with pytest.raises(FileNotFoundError, match=f"no folder at {tmp_path}/none"):
        kind(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/file is a file; expected a folder"):
        kind(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/empty"):
        kind(tmp_path / "empty")


def test_empty_and_unknown_classes_are_named(tree: Path) -> None:
    (tree / "void" / "inner").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"1 class folders in .*tree have no images, the first: \['void'\]"):
        LabelledFolder(tree)
    with pytest.raises(FileNotFoundError, match=r"1 of 2 classes have no folder in .*tree: \['Cat'\]"):
        LabelledFolder(tree, ["cat", "Cat"])
    wrong: list[Any] = [[], "cat", ["cat", "cat"]]
    for classes in wrong:
        with pytest.raises(ValueError, match="classes must be different names of folders"):
            LabelledFolder(tree, classes)
    # Only names of folders directly below the root are classes.
    with pytest.raises(FileNotFoundError, match="1 of 1 classes"):
        LabelledFolder(tree, ["../tree/cat"])


def test_wrong_exclusions_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"exclude names {tmp_path}/none.txt"):
        ImageFolder(tree, [tmp_path / "none.txt"])
    with pytest.raises(ValueError, match=r"exclude must be a list of names, got 'a\.txt'"):
        ImageFolder(tree, "a.txt")
    with pytest.raises(ValueError, match="skip_folders must be a list of names, got 'cat'"):
        ImageFolder(tree, skip_folders="cat")
    with pytest.raises(FileNotFoundError, match=r"no images below .* the folders \['Dog', 'cat', 'n02', 'ähre'\]"):
        ImageFolder(tree, skip_folders=["Dog", "cat", "n02", "ähre"])


def test_a_damaged_image_is_named_by_its_path(tree: Path) -> None:
    (tree / "Dog" / "9.png").write_bytes(b"\x89PNG")
    for folder in (LabelledFolder(tree), ImageFolder(tree)):
        index = paths_of(folder).index("Dog/9.png")
        with pytest.raises(CorruptImageError, match=f"{tree}/Dog/9.png is not a readable image"):
            folder[index]


def test_paths_cost_a_few_bytes_and_no_python_objects(tmp_path: Path) -> None:
    make_images(tmp_path, "a/0.png")
    for i in range(1, 2000):
        (tmp_path / "a" / f"{i}.png").symlink_to("0.png")
    folder = ImageFolder(tmp_path)
    assert len(pickle.dumps(folder)) < 2000 * (len("a/1234.png") + 8) + 2000
    again = pickle.loads(pickle.dumps(folder))
    assert paths_of(again) == paths_of(folder) == sorted(f"a/{i}.png" for i in range(2000))
    assert len(list(pickletools.genops(pickle.dumps(folder)))) < 200
