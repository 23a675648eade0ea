"""What samples are compared with: the DataModule's training images as evaluation sees them, or files; one cache."""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dat_lightning.core.errors import InputError
from dat_lightning.data.batches import check_pixels
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.features.fidelity import FeatureCollector, Features, Metric, Reference
from dat_lightning.features.gaussian_stats import Gaussian
from dat_lightning.features.image_sets import read_images, read_set
from dat_lightning.features.layers import LayerReader, extract_features
from dat_lightning.results.digests import (
    digest,
    file_digest,
    identity,
    network_digest,
    network_identity,
    probe_images,
    reference_digest,
)
from dat_lightning.results.gathering import Values, all_ranks, on_rank_zero
from dat_lightning.results.progress import is_silent
from dat_lightning.weights.files import written_whole

_logger = logging.getLogger(__name__)

# Share of reference images that may be corrupt.
_MAX_SKIPPED_SHARE = 0.01


class ReferenceFeatures:
    """Finds what is known of reference images: from files, from a cache, or by reading the DataModule's.

    Args:
        reader: Reads features.
        metrics: What is to be measured.
        source: Folder of images, or ``.npz`` of images or statistics; ``None`` for the DataModule's.
        cache_dir: Where the latter are kept, under a key made of data, transform and extractor; by default
            ``$XDG_CACHE_HOME/dat_lightning`` or ``~/.cache/dat_lightning``.
        batch_size: Images per pass of the extractor.
        who: The callback that asks, for messages.
    """

    def __init__(
        self,
        reader: LayerReader,
        metrics: Sequence[Metric],
        source: Path | None,
        cache_dir: Path | None,
        batch_size: int,
        who: str,
    ) -> None:
        self.reader = reader
        self.metrics = metrics
        self.source = source
        self.cache_dir = _default_cache_dir() if cache_dir is None else cache_dir
        self.batch_size = batch_size
        self.who = who

    @property
    def need(self) -> str:
        """Says what is needed, and what else would do."""
        return f"{self.who} needs reference images: name a folder or .npz as reference, or"

    def check(self, trainer: Trainer) -> None:
        """Raises an InputError if there can be no reference."""
        if self.source is None and tuple(self.metrics) != ("isc",):
            require_reference_data(trainer, self.need)

    def find(self, trainer: Trainer, pl_module: LightningModule) -> Reference:
        """Returns it; every rank must call it, and gets the same.

        Raises:
            InputError: If there are no images, a feature is NaN or infinite, or too many images are corrupt.
        """
        if tuple(self.metrics) == ("isc",):
            return Reference()
        if self.source is not None:
            return self._from_files(self.source, trainer, pl_module.device)
        return self._from_data(reference_data(trainer, self.need), trainer, pl_module.device)

    def _from_files(self, path: Path, trainer: Trainer, device: torch.device) -> Reference:
        images, gaussian = read_set(path)
        known = Features(gaussian=gaussian)
        if images is not None and (gaussian is None or {"kid", "prc"} & set(self.metrics)):
            collector = FeatureCollector(self.metrics, device, is_reference=True)
            share = range(trainer.global_rank, len(images), trainer.world_size)
            for batch in read_images(images, self.reader, share, device, self.batch_size, silent=is_silent(trainer)):
                collector.add(batch)
            known = collector.collected(f"{path} has no images")
        seen = on_rank_zero(trainer, lambda: file_digest(path))
        count = 0 if images is None else len(images)
        # Statistics that come with the images are those of their authors.
        return Reference(count, gaussian or known.gaussian, known.features, name=str(path), digest=seen)

    def _from_data(self, data: Any, trainer: Trainer, device: torch.device) -> Reference:
        name = f"the {len(data.dataset)} images of the DataModule's reference_data()"
        seen = on_rank_zero(trainer, lambda: reference_digest(data))
        # Moments in any case, so that one file serves every metric.
        collector = FeatureCollector((*self.metrics, "fid"), device, is_reference=True)
        path = self.cache_dir / f"reference-{reference_key(seen, data, self.reader)}.npz"
        # Caches may differ between machines; what rank zero found counts.
        known = on_rank_zero(trainer, lambda: _read_cache(path, collector))
        if known is None:
            images = ReferenceImages(trainer, data, self.batch_size, self.who)
            for batch in images:
                layers = self.reader.read(to_uint8_rgb(batch["x"].to(device)))
                collector.add({"index": batch["index"], **layers})
            known = collector.collected("reference_data() of the DataModule gave no image")
            if images.num_skipped() == 0 and trainer.is_global_zero:
                _write_cache(path, known)
        return Reference(known.num_images, known.gaussian, known.features, name=name, digest=seen)


def reference_key(seen: str, data: Any, reader: LayerReader) -> str:
    """Returns a key that changes with the data, the transform or the extractor.

    Names and weights of transform and extractor enter, and so does what they make of sixteen of the images: settings
    that neither shows, such as the body of a function, change that.

    Args:
        seen: The digest of the data and its transform.
        data: Has ``dataset`` and ``transform``, as the DataModule's ``reference_data()``.
        reader: Reads features.
    """
    pixels = to_uint8_rgb(probe_images(data)).to(_device(reader.extractor))
    features = reader.read(pixels)["features"].cpu()
    # A device's last bits do not make another extractor.
    means = [f"{value:.3e}" for value in features.double().mean(1).tolist()]
    return digest([seen, network_digest(reader.extractor), f"{reader.feature_layer} {tuple(features.shape)}", *means])[
        :32
    ]


def _read_cache(path: Path, wanted: FeatureCollector) -> Features | None:
    """What a file of the cache has; ``None`` if there is none, it is damaged, or lacks what is wanted."""
    try:
        # NumPy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            names = (["mu", "sigma"] if wanted.with_moments else []) + wanted.kept
            if not set(names) <= set(file.files):
                return None
            arrays = {name: torch.from_numpy(file[name]) for name in names}
            count = int(file["count"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        rank_zero_warn(f"{path} is not a readable .npz: {error}; computing it anew")
        return None
    wrong = [name for name, array in arrays.items() if not bool(array.isfinite().all())]
    if wrong:
        rank_zero_warn(f"{path} has NaN or infinity in {', '.join(wrong)}; computing it anew")
        return None
    gaussian = Gaussian(arrays["mu"], arrays["sigma"], count) if wanted.with_moments else None
    return Features(count, gaussian, arrays.get("features"))


def _write_cache(path: Path, known: Features) -> None:
    arrays: dict[str, Any] = {"count": np.array(known.num_images)}
    if known.gaussian is not None:
        arrays |= {"mu": known.gaussian.mean.cpu().numpy(), "sigma": known.gaussian.covariance.cpu().numpy()}
    if known.features is not None:
        arrays["features"] = known.features.numpy()
    with written_whole(path) as file:
        np.savez(file, **arrays)


def _default_cache_dir() -> Path:
    """The folder for what may be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dat_lightning"


def _device(module: nn.Module) -> torch.device:
    """Where a module's tensors live."""
    tensor: Tensor | None = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def reference_data(trainer: Trainer, need: str) -> Any:
    """Returns what the DataModule's ``reference_data()`` gives: ``dataset``, ``transform``, and batches by indices.

    Args:
        trainer: Has the DataModule.
        need: Who needs it, and what else would do; begins the error's message.

    Raises:
        InputError: If the DataModule cannot say.
    """
    require_reference_data(trainer, need)
    return trainer.datamodule.reference_data()  # type: ignore[attr-defined]


def require_reference_data(trainer: Trainer, need: str) -> None:
    """Raises an InputError that begins with ``need`` unless the DataModule has ``reference_data()``."""
    if not callable(getattr(trainer.datamodule, "reference_data", None)):  # type: ignore[attr-defined]
        raise InputError(f"{need} use a DataModule with reference_data(), as PairedDataModule has it")


class ReferenceImages:
    """This rank's share of the reference images, read in batches by the DataModule's number of loader processes.

    Rank r has every image i with i mod world size = r; a rank may have none. Corrupt images are left out.

    Args:
        trainer: Knows rank and DataModule.
        data: See :func:`reference_data`.
        batch_size: Images per batch.
        who: The callback that reads, for messages.
    """

    def __init__(self, trainer: Trainer, data: Any, batch_size: int, who: str) -> None:
        self.trainer = trainer
        self.data = data
        self.batch_size = batch_size
        self.who = who
        self._num_skipped = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._num_skipped = 0
        mine = range(self.trainer.global_rank, len(self.data.dataset), self.trainer.world_size)
        batches = [mine[first : first + self.batch_size] for first in range(0, len(mine), self.batch_size)]
        workers: int = getattr(self.trainer.datamodule, "num_workers", 0)  # type: ignore[attr-defined]
        # A generator of its own: a loader draws a number when an iteration begins, and would move those of training.
        loader = DataLoader(
            self.data, batch_size=None, sampler=batches, num_workers=workers, generator=torch.Generator()
        )
        title = f"{self.who}: training images"
        shown = tqdm(loader, desc=title, leave=False, disable=is_silent(self.trainer))
        for indices, batch in zip(batches, shown, strict=True):
            self._num_skipped += len(indices) - len(batch["x"])
            check_pixels(batch["x"], "the images of reference_data()")
            yield batch
        if self._num_skipped:
            _logger.warning("%s left out %d training images that cannot be read", self.who, self._num_skipped)

    def num_skipped(self) -> int:
        """Returns how many images were corrupt on all ranks; every rank must call it, after it has read its share.

        What is made of images with gaps must not be cached: a disk that fails today may be whole tomorrow.

        Raises:
            InputError: If they are so many that these are other reference images.
        """
        count: int = sum(all_ranks(self._num_skipped))
        if count > _MAX_SKIPPED_SHARE * len(self.data.dataset):
            raise InputError(
                f"{self.who}: {count} of {len(self.data.dataset)} reference images could not be read; more than"
                f" {_MAX_SKIPPED_SHARE:.0%} make it another reference"
            )
        return count


def training_settings(trainer: Trainer, extractor: nn.Module, who: str) -> dict[str, str]:
    """Returns extractor and training images as settings of what is measured by :func:`training_features`."""
    data = reference_data(trainer, f"{who} compares with training images:")
    seen = on_rank_zero(trainer, lambda: reference_digest(data))
    return {"extractor": network_identity(extractor), "reference": identity("training images", seen)}


def training_features(
    trainer: Trainer, pl_module: LightningModule, extractor: nn.Module, batch_size: int, who: str
) -> Iterator[Values]:
    """Yields ``features`` (N, D), float32 on the CPU, with ``y`` and ``index`` (N,) of this rank's training images.

    Rank r has every image i with i mod world size = r; a rank may have none.

    Args:
        trainer: Has the DataModule.
        pl_module: Names the device.
        extractor: Maps uint8 images (N, 3, H, W) to features.
        batch_size: Images per pass.
        who: The callback that asks, for messages.
    """
    data = reference_data(trainer, f"{who} compares with training images:")
    for batch in ReferenceImages(trainer, data, batch_size, who):
        features = extract_features(extractor, batch["x"].to(pl_module.device))
        yield {"index": batch["index"], "y": batch["y"], "features": features.cpu()}
