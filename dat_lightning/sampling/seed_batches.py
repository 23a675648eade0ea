"""Held-out seeds in batches: loader processes read the next one while the chain of the last one climbs."""

import itertools
import pickle
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.multiprocessing
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dat_lightning.data.batches import check_pixels, stacked
from dat_lightning.data.entries import image_of

Seeds = Callable[[int], Any]
"""Index of a sample → seed (C, H, W) in [0, 1], alone or in a pair with a label; a pure function of the index."""

_WHAT = "the images of held_out_seeds()"


class SeedBatches:
    """The seeds of each batch of samples, (N, C, H, W), with dtype and device of the network.

    Loader processes read the next batch while one is worked on. Each reads a share of every batch, so that no more than
    one batch waits in memory, however many processes there are. A seed is the same whoever reads it.

    Args:
        seeds: See :data:`Seeds`.
        batches: Indices of the samples of each batch.
        like: Names dtype and device.
        num_workers: Number of loader processes; 0 reads each batch in this process when it is asked for.

    Attributes:
        first: Seed 0 as it was read, which shows the shape.

    Raises:
        InputError: If the first seed is no image in [0, 1]; when a batch is taken, if one of its seeds is none.
    """

    def __init__(self, seeds: Seeds, batches: Sequence[Sequence[int]], like: Tensor, num_workers: int = 0) -> None:
        self.seeds = seeds
        self.batches = batches
        self.like = like
        self.num_workers = num_workers
        self.first = stacked([image_of(seeds(0))], _WHAT)[0]
        check_pixels(self.first, _WHAT)

    def __iter__(self) -> Generator[Tensor, None, None]:
        reader = _Reader(self.seeds)
        workers = self._possible_workers(reader)
        shares = [_shares(batch, workers) for batch in self.batches]
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=[share for batch in shares for share in batch],
            num_workers=workers,
            # One share for each process: what they hold together is the next batch.
            prefetch_factor=1 if workers else None,
            pin_memory=self.like.is_cuda and self.first.device.type == "cpu",
            # Its own: a loader draws a number when an iteration begins, and would move those of training.
            generator=torch.Generator(),
        )
        read = iter(loader)
        try:
            for batch in shares:
                yield torch.cat([self._taken(part) for part in itertools.islice(read, len(batch))])
        finally:
            # torch ends processes when an iterator is deleted, which the traceback of an error puts off.
            getattr(read, "_shutdown_workers", lambda: None)()

    def _taken(self, images: Tensor) -> Tensor:
        """The seeds of a share where they are needed."""
        check_pixels(images, _WHAT)
        # From a device to the CPU, nobody would wait for the copy.
        return images.to(self.like, non_blocking=self.like.is_cuda)

    def _possible_workers(self, reader: "_Reader") -> int:
        """Number of loader processes that can be used and have something to do."""
        workers = min(self.num_workers, max((len(batch) for batch in self.batches), default=0))
        if workers == 0 or self.first.device.type != "cpu":
            # Seeds that are on a device already are not for another process.
            return 0
        method = torch.multiprocessing.get_start_method()
        error = None if method == "fork" else _pickling_error(reader)
        if error is None:
            return workers
        rank_zero_warn(
            f"held_out_seeds() of the DataModule gave {self.seeds!r}, which cannot be pickled ({error}), as its"
            f" num_workers={self.num_workers} needs where processes start by {method!r}: seeds are read in the main"
            " process, and generation waits for them; a function or a class at the top of a module can be pickled"
        )
        return 0


class _Reader(Dataset[Tensor]):
    """Seeds by their indices, (N, C, H, W)."""

    def __init__(self, seeds: Seeds) -> None:
        self.seeds = seeds

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return stacked([image_of(self.seeds(index)) for index in indices], _WHAT)


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def _pickling_error(thing: Any) -> str | None:
    try:
        pickle.Pickler(_Nowhere(), protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    except Exception as error:  # each type has its own way to say no
        return f"{type(error).__name__}: {error}"
    return None


def _shares(batch: Sequence[int], workers: int) -> list[Sequence[int]]:
    """The batch in as many equal parts as there are processes, one at least; none is empty."""
    count = max(1, min(workers, len(batch)))
    ends = [len(batch) * k // count for k in range(count + 1)]
    return [batch[first:last] for first, last in itertools.pairwise(ends)]
