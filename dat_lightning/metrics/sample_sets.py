"""Measures a set of images in files against another one: ``python -m dat_lightning.metrics.sample_sets --help``.

A set is a folder of images, or an ``.npz`` of the ADM evaluator's format: ``arr_0`` (uint8, N×H×W×3), and, if the
images have classes, ``arr_1`` (N). Folders are read in the order of their paths, and an ``.npz`` class by class, so
that both forms of what ``SampleWriter`` writes give the same figures. A reference may also be statistics (``mu`` and
``sigma``), for FID alone, or have both. The figures are JSON: on the terminal, or in a file.
"""

import argparse
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from dat_lightning.callbacks.evaluator import Figure, Values, gather
from dat_lightning.callbacks.frechet import read_statistics
from dat_lightning.callbacks.sample_metrics import by_class, make_figures
from dat_lightning.core.gaussian_stats import Gaussian
from dat_lightning.core.images import CorruptImageError
from dat_lightning.metrics.fidelity import (
    METRICS,
    DigitsLayers,
    FidelitySettings,
    LayerReader,
    Metric,
    Reference,
    TorchFidelityLayers,
    check_metrics,
    check_sizes,
    fidelity_scores,
)

_SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageSet(Protocol):
    """Images of a set, all of one size."""

    def __len__(self) -> int: ...

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Values]:
        """Yields ``index`` (N,), ``x`` (N, 3, H, W) as uint8 and, if there are classes, ``label`` (N,)."""
        ...


class FolderImages:
    """PNG and JPEG files of a folder and of those in it, in the order of their paths, as torch-fidelity sorts them.

    Args:
        folder: The folder.

    Raises:
        ValueError: If it has no images; on reading, if one has another size than the first.
        CorruptImageError: On reading, if an image is damaged.
    """

    def __init__(self, folder: Path) -> None:
        found = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
        # As text: paths compare part by part, and would put "a/x.png" before "a-b/x.png".
        self.paths = sorted(str(path) for path in found if path.suffix.lower() in _SUFFIXES)
        if not self.paths:
            raise ValueError(f"{folder} has no images: expected {', '.join(_SUFFIXES)} in it or in its folders")

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Values]:
        """Yields ``index`` (N,) and ``x`` (N, 3, H, W)."""
        height, width, _ = _pixels(self.paths[0]).shape
        for first in range(0, len(indices), batch_size):
            chosen = list(indices[first : first + batch_size])
            images = []
            for path in (self.paths[index] for index in chosen):
                images.append(_pixels(path))
                if images[-1].shape[:2] != (height, width):
                    raise ValueError(
                        f"{path} has {images[-1].shape[0]}×{images[-1].shape[1]} pixels, and {self.paths[0]} has"
                        f" {height}×{width}: images of a set must have one size"
                    )
            yield {"index": torch.tensor(chosen), "x": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)}


class ArrayImages:
    """Images of an ``.npz``: ``arr_0`` (uint8, N×H×W×3) and perhaps ``arr_1``, classes (N), read batch by batch.

    Args:
        path: The file.

    Raises:
        ValueError: If the entries are others, or there are no images; on reading, if the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _header(file)
            # Where the pixels begin.
            self._start = file.tell()
            wrong = len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran
            if wrong or min(shape) < 1:
                raise ValueError(f"{path}: arr_0 must be uint8 of shape (N, H, W, 3), got {dtype} of shape {shape}")
            self.shape: tuple[int, ...] = shape
            self.labels = self._labels(archive)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Values]:
        """Yields ``index`` (N,), ``x`` (N, 3, H, W) and, if there are classes, ``label`` (N,)."""
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            for first in range(0, len(indices), batch_size):
                chosen = torch.tensor(list(indices[first : first + batch_size]))
                try:
                    raw = b"".join(_read_at(file, self._start + index * size, size) for index in chosen.tolist())
                except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"{self.path}: arr_0 is damaged: {error}") from error
                x = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, *self.shape[1:])
                labels = {} if self.labels is None else {"label": self.labels[chosen]}
                yield {"index": chosen, "x": x.permute(0, 3, 1, 2), **labels}

    def _labels(self, archive: zipfile.ZipFile) -> Tensor | None:
        if "arr_1.npy" not in archive.namelist():
            return None
        with archive.open("arr_1.npy") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
        if labels.shape != self.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: arr_1 must be integers of shape ({self.shape[0]},), got {labels.dtype} of shape"
                f" {labels.shape}"
            )
        return torch.from_numpy(labels.astype(np.int64))


def read_set(path: Path) -> tuple[ImageSet | None, Gaussian | None]:
    """Returns the images and the statistics at a path, at least one of the two.

    Args:
        path: Folder of images, or ``.npz`` with ``arr_0``, with ``mu`` and ``sigma``, or with all three.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is neither, or its entries are wrong.
    """
    if path.is_dir():
        return FolderImages(path), None
    if not path.is_file():
        raise FileNotFoundError(f"no folder or .npz at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
        images = ArrayImages(path) if "arr_0.npy" in names else None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no folder, and not a readable .npz: {error}") from error
    gaussian = read_statistics(path) if {"mu.npy", "sigma.npy"} & names else None
    if images is None and gaussian is None:
        raise ValueError(f"{path} must have images (arr_0) or statistics (mu and sigma), got {sorted(names)}")
    return images, gaussian


def read_images(
    images: ImageSet,
    reader: LayerReader,
    indices: Sequence[int],
    device: torch.device,
    batch_size: int,
    with_logits: bool = False,
    silent: bool = False,
) -> list[Values]:
    """Returns features, and logits if asked for, of a set's images with the given indices, in batches."""
    values: list[Values] = []
    with tqdm(total=len(indices), desc="Reading images", unit="images", leave=False, disable=silent) as progress:
        for batch in images.batches(indices, batch_size):
            pixels = batch.pop("x")
            values.append({**batch, **reader.read(pixels.to(device), with_logits)})
            progress.update(len(pixels))
    return values


def measure_sample_set(
    samples: str | Path,
    reference: str | Path | None,
    extractor: nn.Module,
    metrics: Sequence[Metric] = METRICS,
    settings: FidelitySettings = FidelitySettings(),
    classifier: nn.Module | None = None,
    feature_layer: str | None = None,
    logit_layer: str | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    silent: bool = False,
) -> list[Figure]:
    """Returns figures of the images in files, as :class:`~dat_lightning.SampleMetrics` has them for generated ones.

    Args:
        samples: Folder of images, or ``.npz`` with ``arr_0``.
        reference: The same, or ``.npz`` with ``mu`` and ``sigma``; ``None`` if only the Inception score is wanted.
        extractor: Maps uint8 images (N, 3, H, W) to features (N, D), or to a tuple or a dictionary of layers.
        metrics: What to measure.
        settings: What the definitions leave open.
        classifier: Maps images in [0, 1] to logits; by default these are a layer of the extractor.
        feature_layer: Name of the layer with the features; by default the first.
        logit_layer: Name of the layer with the logits; by default ``logits_unbiased`` or ``logits``.
        batch_size: Images per pass.
        device: Where extractor and classifier are moved to.
        silent: Whether to show no progress.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If a set is empty, damaged or too small, or has only statistics where images are needed, or this
            machine has no such device.
    """
    metrics = check_metrics(metrics)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    where = _device(device)
    images, _ = read_set(Path(samples))
    if images is None:
        raise ValueError(f"samples={samples} has statistics alone; expected images")
    known, gaussian = (None, None) if reference is None else read_set(Path(reference))
    if reference is None and metrics != ("isc",):
        raise ValueError(f"reference must be given for {list(metrics)}: only 'isc' needs none")
    check_sizes(metrics, settings, len(images), None if known is None else len(known))
    for network in (extractor, classifier):
        if network is not None:
            network.to(where).eval()
    reader = LayerReader(extractor, classifier, feature_layer, logit_layer)

    def read(chosen: ImageSet, with_logits: bool) -> Values:
        parts = read_images(chosen, reader, range(len(chosen)), where, batch_size, with_logits, silent)
        return by_class(gather(parts))

    features: Tensor | None = None
    if known is not None and (gaussian is None or {"kid", "prc"} & set(metrics)) and metrics != ("isc",):
        features = read(known, False)["features"]
    against = Reference(str(reference), 0 if known is None else len(known), gaussian, features)
    scores = fidelity_scores(metrics, settings, read(images, "isc" in metrics), against)
    return make_figures(scores, settings, reader, against, len(images), f"from {samples}")


def main(args: Sequence[str] | None = None) -> None:
    """Measures what the command line names, and writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m dat_lightning.metrics.sample_sets", description=__doc__)
    parser.add_argument("--samples", required=True, help="folder of images, or .npz with arr_0")
    parser.add_argument("--reference", help="the same, or .npz with mu and sigma; not needed for isc alone")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help=f"some of {', '.join(METRICS)}")
    extractor_help = "digits, or the name of one of torch-fidelity's extractors"
    parser.add_argument("--extractor", default="inception-v3-compat", help=extractor_help)
    layers_help = "layers of torch-fidelity's extractor, that of the features first; Inception: 2048 logits_unbiased"
    parser.add_argument("--layers", nargs="+", help=layers_help)
    parser.add_argument("--weights-path", help="file with the extractor's weights, where there is no network")
    defaults = asdict(FidelitySettings())
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"by default {value}")
    parser.add_argument("--batch-size", type=int, default=64, help="images per pass")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--out", type=Path, help="JSON file; by default JSON goes to the terminal")
    given = parser.parse_args(args)
    settings = {name: getattr(given, name) for name in defaults}
    try:
        figures = measure_sample_set(
            given.samples,
            given.reference,
            _extractor(given.extractor, given.layers, given.weights_path),
            given.metrics,
            FidelitySettings(**settings),
            batch_size=given.batch_size,
            device=given.device,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    text = json.dumps({"figures": [asdict(figure) for figure in figures]}, indent=2, ensure_ascii=False) + "\n"
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text, encoding="utf-8")


def _extractor(name: str, layers: Sequence[str] | None, weights: str | None) -> nn.Module:
    if name == "digits":
        return DigitsLayers()
    return TorchFidelityLayers(name, layers, weights) if layers else TorchFidelityLayers(name, weights_path=weights)


def _device(name: str) -> torch.device:
    try:
        # Something has to be put there: a name alone does not show whether the machine has it.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} is not to be used here: {str(error).splitlines()[0]}") from error


def _pixels(path: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image file as uint8 (H, W, 3)."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        raise CorruptImageError(path, str(error)) from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first index runs fastest, and type of the array in an open ``.npy``."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read_at(file: IO[bytes], position: int, size: int) -> bytes:
    if file.tell() != position:
        file.seek(position)
    found = file.read(size)
    if len(found) != size:
        raise EOFError("the file ends too early")
    return found


if __name__ == "__main__":
    main()
