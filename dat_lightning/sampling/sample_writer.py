"""Generated samples as files: PNG folders and the ``.npz`` of the ADM evaluator."""

import os
import shutil
import zipfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.lib.format import open_memmap
from PIL import Image
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.sampling.pgd_sampler import SampleConsumer
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan, Stage, checked_stages

# Batches whose files may still be written while the next ones are generated.
_MAX_WAITING = 4


class SampleWriter(SampleConsumer):
    """Writes every generated sample, as bytes by the sampler's ``rounding``.

    ``png`` writes ``{dirpath}/png/{class:04d}/{index:06d}.png``, which ImageFolder reads, and torch-fidelity's program
    with ``--samples-find-deep``.
    ``npz`` writes ``{dirpath}/samples.npz`` with ``arr_0`` (uint8, N×H×W×3, in the order of the indices) and ``arr_1``
    (labels, int64, N), which the ADM evaluator reads. Ranks write their own files into the folder, which they have
    to share, and rank zero puts the ``.npz`` together without holding it in memory. An older set in the folder is
    replaced, also one that was interrupted: then a :class:`~dat_lightning.PGDSampler` with a ``dirpath`` hands out what
    it has kept, and all files are written again. Other files stay. Threads write, while the next batch is generated.

    One snapshot is written, by default the longest chain's, which need not be the best one: name the ``num_steps`` that
    :class:`~dat_lightning.sampling.SampleMetrics` logs as ``sample_steps``.

    Args:
        dirpath: Folder of this set.
        formats: Which of the two.
        num_steps: Step count of the snapshot to write; by default the longest chain of the sampler's sweep.
        stages: The evaluations that write.

    Raises:
        InputError: If a format is unknown; when sampling starts, if the sampler takes no snapshot at ``num_steps``.
        OSError: With a later batch or at the end, if a file cannot be written.
    """

    def __init__(
        self,
        dirpath: str = "samples",
        formats: Sequence[Literal["png", "npz"]] = ("png", "npz"),
        num_steps: int | None = None,
        stages: Sequence[Stage] = ("predict",),
    ) -> None:
        if not formats or set(formats) - {"png", "npz"}:
            raise InputError(f"formats must be 'png', 'npz' or both, got {list(formats)}")
        self.dirpath = Path(dirpath)
        self.formats = tuple(formats)
        self.num_steps = num_steps
        self.stages = checked_stages(stages)
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: deque[list[Future[None]]] = deque()

    @property
    @override
    def logged_names(self) -> set[str]:
        """None at all."""
        return set()

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Prepares the folder."""
        plan.check_snapshot("SampleWriter", self.num_steps)
        if trainer.is_global_zero:
            shutil.rmtree(self.dirpath / "shards", ignore_errors=True)
            (self.dirpath / "shards").mkdir(parents=True)
            for name in ("samples.npz", "samples.tmp"):
                (self.dirpath / name).unlink(missing_ok=True)
            for path in (self.dirpath / "png").glob("[0-9]*/[0-9]*.png"):
                path.unlink()
        trainer.strategy.barrier("SampleWriter.start")

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Writes this batch's images."""
        steps = self.plan.num_steps[-1] if self.num_steps is None else self.num_steps
        pixels = to_uint8_rgb(batch.images[steps], self.plan.rounding).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        labels, indices = batch.labels.cpu().numpy(), batch.indices.cpu().numpy()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "SampleWriter")
        writing: list[Future[None]] = []
        if "png" in self.formats:
            for label in set(labels.tolist()):
                (self.dirpath / "png" / f"{label:04d}").mkdir(parents=True, exist_ok=True)
            for index, label, image in zip(indices.tolist(), labels.tolist(), pixels, strict=True):
                path = self.dirpath / "png" / f"{label:04d}" / f"{index:06d}.png"
                writing.append(self._threads.submit(Image.fromarray(image).save, path))
        if "npz" in self.formats:
            path = self.dirpath / "shards" / f"{indices[0]:06d}.npz"
            writing.append(self._threads.submit(np.savez, path, images=pixels, labels=labels, indices=indices))
        self._waiting.append(writing)
        self._finish(_MAX_WAITING)

    def _finish(self, leave: int) -> None:
        """Waits until at most ``leave`` batches are still being written; raises what went wrong."""
        while len(self._waiting) > leave:
            for future in self._waiting.popleft():
                future.result()

    def _stop(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._threads = None
        self._waiting.clear()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stops writing."""
        self._stop()

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the shards together, on rank zero."""
        self._finish(0)
        self._stop()
        trainer.strategy.barrier("SampleWriter.end")
        if trainer.is_global_zero:
            if "npz" in self.formats:
                merge_shards(self.dirpath / "shards", self.dirpath / "samples.npz", self.plan.num_samples)
            shutil.rmtree(self.dirpath / "shards")
        trainer.strategy.barrier("SampleWriter.merged")


def merge_shards(folder: Path, target: Path, num_samples: int) -> None:
    """Writes the ``.npz`` that the shards in a folder make up, without holding more than a shard in memory.

    Raises:
        InputError: If the shards hold another number of samples than expected.
    """
    shards = sorted(folder.glob("*.npz"))
    labels = np.full(num_samples, -1, dtype=np.int64)
    images: np.memmap[tuple[int, ...], np.dtype[np.uint8]] | None = None
    for path in shards:
        with np.load(path) as shard:
            pixels = shard["images"]
            if images is None:
                shape = (num_samples, *pixels.shape[1:])
                images = open_memmap(folder / "arr_0.npy", mode="w+", dtype=np.uint8, shape=shape)
            images[shard["indices"]] = pixels
            labels[shard["indices"]] = shard["labels"]
    if images is None or (labels < 0).any():
        missing = int((labels < 0).sum())
        raise InputError(f"{missing} of {num_samples} samples are missing in {folder}: do all ranks share this folder?")
    images.flush()
    np.save(folder / "arr_1.npy", labels)
    temporary = target.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name in ("arr_0.npy", "arr_1.npy"):
            archive.write(folder / name, name)
    temporary.replace(target)
