"""Images in folders: with one folder per class, or in any tree without labels."""

import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from dat_lightning.core.errors import InputError
from dat_lightning.data.images import check_index, read_image


class LabelledFolder(Dataset[tuple[Image.Image, int]]):
    """Images with labels in the layout ``root/<class>/**/*``, as torchvision's ImageFolder reads it.

    A class's index is its folder's place among the sorted names, and images are sorted by folder, then by name. Unlike
    torchvision, hidden files and folders (such as ``.ipynb_checkpoints``) are left out.

    Args:
        root: The folder of class folders.
        classes: Names of the class folders to use, in the order of their indices; all if ``None``.

    Attributes:
        classes: Names of the classes by index.
        labels: Class index of each image, int64.

    Raises:
        FileNotFoundError: If the root, a class folder, or every image of a class is missing.
        InputError: If the root is a file, or ``classes`` is empty or repeats a name.
    """

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None) -> None:
        self.root = _existing_folder(root)
        found = sorted(name for name, folder, _ in _entries(self.root) if folder)
        if not found:
            raise FileNotFoundError(f"{self.root} has no class folders; expected images at {self.root}/<class>/*")
        self.classes = _chosen_classes(self.root, found, classes)
        paths: list[str] = []
        sizes = []
        for name in self.classes:
            below = [f"{name}/{path}" for path in _scan(self.root / name)]
            sizes.append(len(below))
            paths += below
        empty = [name for name, size in zip(self.classes, sizes, strict=True) if size == 0]
        if empty:
            raise FileNotFoundError(
                f"{len(empty)} class folders in {self.root} have no images, the first: {empty[:5]}; expected files with"
                f" the endings {', '.join(IMG_EXTENSIONS)}"
            )
        self.labels = np.repeat(np.arange(len(sizes)), sizes)
        self._paths = _Paths(paths)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Returns image ``index`` as RGB, and its label.

        Raises:
            CorruptImageError: If the file cannot be read.
        """
        return read_image(self.name(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns the path of image ``index``."""
        check_index(index, len(self))
        return f"{self.root}/{self._paths[index]}"


class ImageFolder(Dataset[Image.Image]):
    """All images below a folder, without labels, sorted by folder, then by name; hidden ones are left out.

    Args:
        root: The folder.
        exclude: Text files that list images to leave out: one path per line, relative to ``root``; blank lines and
            lines that begin with ``#`` mean nothing. Lines that match no image give a warning.
        skip_folders: Names of folders directly below ``root`` to leave out, such as the classes of ImageNet that
            CIFAR-10 has too.

    Raises:
        FileNotFoundError: If the root or a list is missing, or no images are left.
        InputError: If the root is a file.
        InputError: If ``exclude`` or ``skip_folders`` is one name instead of several.
    """

    def __init__(self, root: str | Path, exclude: Sequence[str | Path] = (), skip_folders: Sequence[str] = ()) -> None:
        for argument, value in (("exclude", exclude), ("skip_folders", skip_folders)):
            if isinstance(value, (str, Path)):
                raise InputError(f"{argument} must be a list of names, got {value!r}")
        self.root = _existing_folder(root)
        lists = {Path(file): _listed_paths(Path(file).expanduser()) for file in exclude}
        excluded = set[str]().union(*lists.values())
        found = set[str]()
        paths = []
        for path in _scan(self.root, skip_folders):
            if path in excluded:
                found.add(path)
            else:
                paths.append(path)
        if not paths:
            raise FileNotFoundError(
                f"no images below {self.root} (left out: {len(found)} by exclude, the folders {list(skip_folders)});"
                f" expected files with the endings {', '.join(IMG_EXTENSIONS)}"
            )
        self._warn_of_unmatched(lists, found, skip_folders)
        self._paths = _Paths(paths)

    def _warn_of_unmatched(self, lists: dict[Path, set[str]], found: set[str], skip_folders: Sequence[str]) -> None:
        for file, listed in lists.items():
            unmatched = sorted(p for p in listed - found if p.partition("/")[0] not in skip_folders)
            if unmatched:
                warnings.warn(
                    f"{len(unmatched)} of {len(listed)} paths in {file} match no image below {self.root}, the first:"
                    f" {unmatched[0]!r}",
                    stacklevel=3,
                )
        missing = [name for name in skip_folders if not (self.root / name).is_dir()]
        if missing:
            warnings.warn(
                f"{len(missing)} of {len(skip_folders)} skip_folders are not in {self.root}, the first: {missing[0]!r}",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Image.Image:
        """Returns image ``index`` as RGB.

        Raises:
            CorruptImageError: If the file cannot be read.
        """
        return read_image(self.name(index))

    def name(self, index: int) -> str:
        """Returns the path of image ``index``."""
        check_index(index, len(self))
        return f"{self.root}/{self._paths[index]}"


class _Paths:
    """Many paths in two arrays: forked workers would copy a list of strings bit by bit, by counting references."""

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]].tobytes())


def _existing_folder(root: str | Path) -> Path:
    root = Path(root).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"no folder at {root}; expected one with images")
    if not root.is_dir():
        raise InputError(f"{root} is a file; expected a folder with images")
    return root


def _chosen_classes(root: Path, found: Collection[str], chosen: Sequence[str] | None) -> tuple[str, ...]:
    if chosen is None:
        return tuple(found)
    if isinstance(chosen, str) or not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"classes must be different names of folders in {root}, got {chosen!r}")
    missing = [name for name in chosen if name not in found]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(chosen)} classes have no folder in {root}: {missing[:5]}")
    return tuple(chosen)


def _listed_paths(file: Path) -> set[str]:
    """The paths in an exclusion list, in normal form."""
    if not file.is_file():
        raise FileNotFoundError(f"exclude names {file}, which is no file; expected a text file with a path per line")
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    return {os.path.normpath(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")}


def _entries(folder: str | Path) -> Iterator[tuple[str, bool, bool]]:
    """Names in a folder that are not hidden, each with: is it a folder, is it a link."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                # The folder's listing says what an entry is; the file itself is looked at for links alone.
                link = entry.is_symlink()
                is_folder = Path(entry.path).is_dir() if link else entry.is_dir()
                # A link into nothing counts as a file, so that reading it says what is missing.
                if is_folder or link or entry.is_file():
                    yield entry.name, is_folder, link


def _scan(root: Path, skip_folders: Collection[str] = ()) -> list[str]:
    """The images below a folder, relative to it, sorted by folder and then by name; links that lead back end there."""
    images: dict[str, list[str]] = {}
    top = os.path.realpath(root)
    # Each with its real place and the real places of the folders that lead to it.
    waiting: list[tuple[str, str, tuple[str, ...]]] = [("", top, (top,))]
    while waiting:
        relative, place, above = waiting.pop()
        files = []
        for name, folder, link in _entries(place):
            path = f"{relative}/{name}" if relative else name
            if not folder:
                if name.lower().endswith(IMG_EXTENSIONS):
                    files.append(path)
            elif relative or name not in skip_folders:
                below = os.path.realpath(f"{place}/{name}") if link else f"{place}/{name}"
                if below not in above:
                    waiting.append((path, below, (*above, below)))
        images[relative] = sorted(files)
    return [path for _, files in sorted(images.items()) for path in files]
