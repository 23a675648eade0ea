"""Images in Parquet files, on disk or on the Hugging Face Hub, through the package ``datasets``."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dat_lightning.core.errors import InputError
from dat_lightning.data.arrays import checked_labels
from dat_lightning.data.images import check_index, decode_image, read_image
from dat_lightning.data.pixels import CorruptImageError


class HuggingFaceImages(Dataset[Image.Image | tuple[Image.Image, int]]):
    """One split of a data set of the Hugging Face Hub, or of Parquet files that you have.

    ``datasets`` keeps a copy in Arrow's format in its cache, which is mapped into memory and not loaded; a copy of this
    object in a loader process maps it anew. Images are decoded one by one, to RGB with eight bits.

    Args:
        files: Parquet files: paths, folders that are searched, or patterns such as ``data/train-*.parquet``; or
        repo: a name on the Hub such as ``uoft-cs/cifar10``.
        split: Which part, also a slice such as ``train[:90%]``. Files alone are the split ``train``.
        image: Column of the images: of the type Image, or bytes of image files.
        label: Column of the class indices; without one, entries are images alone.
        subset: Which part of ``repo``, if it has several configurations.
        revision: Which version of ``repo``: a branch, tag or commit.
        cache_dir: Folder for the copies, by default that of ``datasets`` (``HF_HOME`` moves it).

    Attributes:
        labels: Class index of each image, int64; ``None`` without labels.
        classes: Names of the classes by index, where the column has them.

    Raises:
        FileNotFoundError: If there is no such file, or no such data set on the Hub.
        ConnectionError: If the Hub cannot be reached.
        InputError: If ``datasets`` is not installed, not just one of ``files`` and ``repo`` is given, a file is
            damaged, or a split or column is missing or of another kind.
    """

    def __init__(
        self,
        files: str | Sequence[str] | None = None,
        repo: str | None = None,
        split: str = "train",
        image: str = "image",
        label: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        if (files is None) == (repo is None):
            raise InputError(f"give either files or repo, got files {files!r} and repo {repo!r}")
        if repo is None:
            given = [files] if isinstance(files, str) else [*(files or ())]
            self.source = ", ".join(given)
            arguments: dict[str, Any] = {"path": "parquet", "data_files": _found(given)}
        else:
            self.source = repo
            arguments = {"path": repo, "name": subset, "revision": revision}
        self.split = split
        self.image = image
        self.label = label
        datasets = _required()
        data = _loaded(datasets, self.source, {**arguments, "split": split, "cache_dir": cache_dir})
        missing = [column for column in (image, label) if column is not None and column not in data.features]
        if missing:
            raise InputError(f"{self.source} has no column {missing[0]!r}; its columns are {[*data.features]}")
        self.labels: np.ndarray | None = None
        self.classes: tuple[str, ...] | None = None
        if label is not None:
            self.labels, self.classes = self._labels(datasets, data, label)
        self._data = self._encoded_images(datasets, data.select_columns([image]))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Image.Image | tuple[Image.Image, int]:
        """Returns image ``index`` as RGB, and its label if there are labels.

        Raises:
            CorruptImageError: If it is missing or cannot be decoded.
        """
        check_index(index, len(self))
        image = self._decoded(self._data[index][self.image], self.name(index))
        return image if self.labels is None else (image, int(self.labels[index]))

    def name(self, index: int) -> str:
        """Returns source, split and row of image ``index``."""
        check_index(index, len(self))
        return f"{self.source} {self.split} row {index}"

    def _decoded(self, value: Any, name: str) -> Image.Image:
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is not None:
            return decode_image(content, name)
        if path is None:
            raise CorruptImageError(name, f"column {self.image!r} is empty there")
        return read_image(path)

    def _labels(self, datasets: ModuleType, data: Any, label: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
        """Labels, and names of the classes if the column has them."""
        kind = data.features[label]
        if not isinstance(kind, datasets.ClassLabel) and "int" not in str(getattr(kind, "dtype", None)):
            raise InputError(f"{self.source}: column {label!r} must hold class indices, integers, got {kind}")
        names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
        column = data.select_columns([label]).with_format("arrow")[:].column(label)
        if column.null_count:
            raise InputError(f"{self.source}: column {label!r} is empty in {column.null_count} rows of {self.split!r}")
        return checked_labels(np.asarray(column.to_numpy()), f"{self.source}: column {label!r}"), names

    def _encoded_images(self, datasets: ModuleType, data: Any) -> Any:
        """The data set, whose images are the bytes of files, or paths."""
        kind = data.features[self.image]
        if isinstance(kind, datasets.Image):
            return data.cast_column(self.image, datasets.Image(decode=False))
        if getattr(kind, "dtype", None) not in ("binary", "large_binary") and not (
            isinstance(kind, dict) and {*kind} == {"bytes", "path"}
        ):
            raise InputError(
                f"{self.source}: column {self.image!r} must hold images or the bytes of image files, got {kind}"
            )
        return data


def _required() -> ModuleType:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError("HuggingFaceImages needs the package datasets: pip install 'dat-lightning[hf]'") from error
    module: ModuleType = datasets
    return module


def _found(given: Sequence[str]) -> list[str]:
    """The files that paths, folders and patterns name, sorted."""
    found = set[Path]()
    for text in given:
        path = Path(text).expanduser()
        if path.is_dir():
            matches = [*path.rglob("*.parquet")]
        elif path.is_file():
            matches = [path]
        else:
            anchor = Path(path.anchor)
            matches = [*anchor.glob(str(path.relative_to(anchor)))] if "*" in text else []
        if not matches:
            raise FileNotFoundError(
                f"no Parquet file at {text}; expected a file, a folder or a pattern such as *.parquet"
            )
        found.update(matches)
    if not found:
        raise InputError("files must name at least one Parquet file, got none")
    return [str(path) for path in sorted(found)]


def _loaded(datasets: ModuleType, source: str, arguments: dict[str, Any]) -> Any:
    """The split, from the cache if it is there."""
    try:
        return datasets.load_dataset(**arguments)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the Hugging Face Hub has no data set {source!r} that you may read: {error}"
        ) from error
    except ConnectionError as error:
        raise ConnectionError(f"could not reach the Hugging Face Hub for {source!r}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise InputError(f"{source} cannot be read: {error.__cause__ or error}") from error
    except ValueError as error:  # an unknown split or configuration, of which the message lists those that there are
        raise InputError(f"{source}: {error}") from error
