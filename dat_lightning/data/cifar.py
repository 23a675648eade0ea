"""CIFAR-10 and CIFAR-100."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from dat_lightning.core.errors import InputError
from dat_lightning.data.images import check_index

_SOURCES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class CIFARImages(Dataset[tuple[Image.Image, int]]):
    """The 50 000 training or 10 000 test images of CIFAR-10 or CIFAR-100, 32×32, with labels.

    torchvision reads the published files, which are pickles; it compares their checksums first, so that nothing but
    their known content is unpickled.

    Args:
        name: Which of the two.
        root: The folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        train: Training images, or else test images.
        download: Whether to fetch the files if they are not there.
        skip_classes: Names of classes whose images are left out, such as those of CIFAR-100 that show what CIFAR-10's
            do. The others are numbered anew, in the same order.

    Attributes:
        classes: Names of the classes by index.
        labels: Class index of each image, int64.

    Raises:
        FileNotFoundError: If a file is missing and not to be downloaded.
        ConnectionError: If the download fails.
        InputError: If a file is damaged, ``name`` is unknown, or ``skip_classes`` has another name or all of them.
    """

    def __init__(
        self,
        name: Literal["cifar10", "cifar100"],
        root: str | Path,
        train: bool,
        download: bool = False,
        skip_classes: Sequence[str] = (),
    ) -> None:
        if name not in _SOURCES:
            raise InputError(f"name must be one of {list(_SOURCES)}, got {name!r}")
        root = Path(root).expanduser()
        source = _SOURCES[name]
        try:
            with _one_at_a_time(root) if download else nullcontext():
                data = source(root, train=train, download=download)
        except RuntimeError:
            _check_files(root, source)
            raise
        except OSError as error:
            if not download:
                raise
            raise ConnectionError(f"could not download {source.url} to {root}: {error}") from error
        self.part = f"{name} {'train' if train else 'test'}"
        _check_names(skip_classes, data.classes, name)
        self.classes = tuple(c for c in data.classes if c not in skip_classes)
        numbers = np.array([c not in skip_classes for c in data.classes]).cumsum() - 1
        labels = np.asarray(data.targets, dtype=np.int64)
        # Numbers in the published files, by which images are named.
        self._numbers = np.flatnonzero(~np.isin(labels, [data.classes.index(c) for c in skip_classes]))
        self.labels = numbers[labels[self._numbers]]
        self._pixels = np.ascontiguousarray(data.data[self._numbers] if skip_classes else data.data)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Returns image ``index`` as RGB, and its label."""
        check_index(index, len(self))
        return Image.fromarray(self._pixels[index]), int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns data set, part and number of image ``index`` in the published files."""
        check_index(index, len(self))
        return f"{self.part} image {self._numbers[index]}"


def _check_names(skip_classes: Sequence[str], classes: Sequence[str], name: str) -> None:
    """Raises an InputError unless some classes are left over from those of the data set."""
    if isinstance(skip_classes, str):
        raise InputError(f"skip_classes must be a list of names, got {skip_classes!r}")
    for unknown in (c for c in skip_classes if c not in classes):
        near = difflib.get_close_matches(str(unknown), classes, 1)
        hint = f"near it is {near[0]!r}" if near else f"its classes are {', '.join(classes[:3])}, …"
        raise InputError(f"skip_classes has {unknown!r}, which is no class of {name}; {hint}")
    if len({*skip_classes}) == len(classes):
        raise InputError(f"skip_classes leaves none of the {len(classes)} classes of {name}")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lets one of several processes download, and the others find what it got."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    with (folder / ".download.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_files(root: Path, source: type[CIFAR10]) -> None:
    """Raises an error that says what is wrong, where torchvision would say that something is."""
    files = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    folder = root / source.base_folder
    missing = [name for name, _ in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} missing in {folder}; `download: true` fetches {source.url} (170 MB), or unpack that"
            f" file in {root}"
        )
    damaged = [name for name, checksum in files if not check_integrity(folder / name, checksum)]
    if damaged:
        raise InputError(
            f"{', '.join(damaged)} in {folder} differ from the published files (MD5); delete them and fetch"
            f" {source.url} again"
        )
