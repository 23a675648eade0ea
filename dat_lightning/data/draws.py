"""Data order and augmentation as pure functions of (seed, draw number): the basis of exact resume on any rank count."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import RandomPermutation, stream_seed
from dat_lightning.data.batches import stacked
from dat_lightning.data.entries import ReadableImages, SizedDataset, image_of

Transform = Callable[[Any], Tensor]
"""Maps a raw image to a float tensor (C, H, W) in [0, 1]; randomness comes from torch's global generator."""


# Unreadable images in a row before a stream gives up: a folder that is gone, not a few bad files.
_MAX_REPLACEMENTS = 100


class DrawSource(Protocol):
    """Draws by their numbers: a :class:`DrawStream`, or what mixes several."""

    def __call__(self, draw: int, /) -> tuple[Tensor, int | None]:
        """Returns image (C, H, W) in [0, 1] and label, ``None`` where the data set has no labels."""

    @property
    def size(self) -> int:
        """Number of images that are drawn from."""


class DrawStream:
    """An endless, reshuffled, augmented view of a data set.

    Draw n is entry perm(n mod N) of pass n // N, with a new permutation each pass, and its augmentation is seeded by n.
    Nothing else enters: not the worker, nor the rank, nor what consumed random numbers before. In place of a corrupt
    image comes another one, chosen by n as well.

    Args:
        dataset: The images; an entry is an image or an (image, label) pair.
        transform: The augmentation.
        seed: Seed of the run.
        name: Name of the stream, so that two streams over one data set differ.
        max_skipped_share: Share of images that may be corrupt, see :class:`~dat_lightning.data.entries.ReadableImages`;
            by default any.

    Raises:
        InputError: If the data set is empty; on a draw, if too many images are corrupt, or a hundred in a row.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        transform: Transform,
        seed: int,
        name: str,
        max_skipped_share: float = 1.0,
    ) -> None:
        if len(dataset) == 0:
            raise InputError(f"the data set of the {name!r} stream is empty")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.name = name
        self.images = ReadableImages(dataset, max_skipped_share)
        self._pass = -1

    def index(self, draw: int) -> int:
        """Returns which entry of the data set draw ``draw`` is."""
        number, position = divmod(draw, len(self.dataset))
        if number != self._pass:
            self._pass, self._order = (
                number,
                RandomPermutation(len(self.dataset), self.seed, self.name, "order", number),
            )
        return self._order[position]

    def __call__(self, draw: int) -> tuple[Tensor, int | None]:
        """Returns image (C, H, W) in [0, 1] and label, ``None`` where the data set has no labels."""
        index, entry = self._entry(draw)
        with self._random_numbers_of(draw):
            return self.images.transformed(index, entry, self.transform)

    def unaugmented(self, draw: int) -> Any:
        """Returns the image of a draw as its data set has it."""
        return image_of(self._entry(draw)[1])

    def replayed(self, draw: int, image: Any) -> Tensor:
        """Returns another image, augmented as that of the draw is."""
        with self._random_numbers_of(draw):
            return self.transform(image)

    @property
    def size(self) -> int:
        """Number of images in a pass."""
        return len(self.dataset)

    @contextmanager
    def _random_numbers_of(self, draw: int) -> Iterator[None]:
        """Gives torch's generator the state of a draw's augmentation, and its own back."""
        state = torch.get_rng_state()
        # The CPU generator alone: torch.manual_seed would reset those of all devices.
        torch.default_generator.manual_seed(stream_seed(self.seed, self.name, "augmentation", draw))
        try:
            yield
        finally:
            torch.set_rng_state(state)

    def _entry(self, draw: int) -> tuple[int, Any]:
        """Place and content of the data set's entry of a draw."""
        index = self.index(draw)
        for attempt in range(_MAX_REPLACEMENTS):
            entry = self.images.read(index)
            if entry is not None:
                return index, entry
            index = stream_seed(self.seed, self.name, "replacement", draw, attempt) % len(self.dataset)
        raise InputError(
            f"the images of the {self.name!r} stream cannot be read: {_MAX_REPLACEMENTS} in a row failed, the last one"
            f" because {self.images.last}"
        )


class OrderedStream(DrawStream):
    """An endless view of a data set in its own order: draw n is entry n mod N; see :class:`DrawStream` for the rest."""

    @override
    def index(self, draw: int) -> int:
        """Returns which entry of the data set draw ``draw`` is."""
        return draw % len(self.dataset)


class PairedDraws(Dataset[dict[str, Any]]):
    """Whole training batches by their draw numbers, from several streams at once.

    Args:
        streams: Name → stream; stream ``gen`` gives the keys ``x_gen`` and, if its data set has labels, ``y_gen``.
    """

    def __init__(self, streams: Mapping[str, DrawSource]) -> None:
        self.streams = streams

    def __getitem__(self, draws: Sequence[int]) -> dict[str, Any]:
        """Returns the batch of the given draws, with their numbers under ``draw``."""
        batch: dict[str, Any] = {"draw": torch.as_tensor(draws)}
        for name, stream in self.streams.items():
            images, labels = zip(*(stream(draw) for draw in draws), strict=True)
            batch[f"x_{name}"] = stacked(images, f"the images of the {name!r} stream")
            if labels[0] is not None:
                batch[f"y_{name}"] = torch.tensor(labels)
        return batch


class DrawBatches(DistributedSampler[list[int]]):
    """Yields this rank's part of each global batch of draws: global batch b is draws b·B … b·B+B−1.

    A subclass of DistributedSampler, because Lightning leaves those alone.

    Args:
        batch_size: Global batch size B.
        num_batches: Batches in an epoch.
        position: Returns the number of draws consumed so far; asked whenever an iteration starts.
        rank: This process.
        world_size: Number of processes.

    Raises:
        InputError: If the ranks cannot share the batch evenly.
    """

    def __init__(
        self, batch_size: int, num_batches: int, position: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise InputError(
                f"batch_size is the global batch size and must be divisible by the number of processes {world_size},"
                f" got {batch_size}; the nearest that is: {max(1, round(batch_size / world_size)) * world_size}"
            )
        super().__init__(range(num_batches), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.position = position

    def __iter__(self) -> Iterator[list[int]]:
        start, share = self.position(), self.batch_size // self.num_replicas
        for batch in range(self.num_batches):
            first = start + batch * self.batch_size + self.rank * share
            yield list(range(first, first + share))

    def __len__(self) -> int:
        return self.num_batches


class EvaluationBatches(Dataset[dict[str, Any]]):
    """Whole evaluation batches by their indices: keys ``x`` (N, C, H, W), ``index`` (N,) and, with labels, ``y`` (N,).

    Corrupt images are left out.

    Args:
        dataset: The images; an entry is an image or an (image, label) pair.
        transform: Maps an image to a tensor (C, H, W) in [0, 1].
        max_skipped_share: Share of images that may be corrupt; by default any.

    Raises:
        InputError: On a batch, if all its images are corrupt, or too many have been.
    """

    def __init__(self, dataset: SizedDataset, transform: Transform, max_skipped_share: float = 1.0) -> None:
        self.dataset = dataset
        self.transform = transform
        self.images = ReadableImages(dataset, max_skipped_share)

    def read(self, indices: Sequence[int]) -> list[tuple[int, Tensor, int | None]]:
        """Returns index, image and label of those that can be read."""
        entries = ((index, self.images.read(index)) for index in indices)
        return [(i, *self.images.transformed(i, entry, self.transform)) for i, entry in entries if entry is not None]

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any]:
        found = self.read(indices)
        if not found:
            raise InputError(f"no image of an evaluation batch can be read: {self.images.last}")
        kept, images, labels = zip(*found, strict=True)
        batch: dict[str, Any] = {"x": stacked(images, "the evaluation images"), "index": torch.tensor(kept)}
        if None not in labels:
            batch["y"] = torch.tensor(labels)
        return batch


class ShardedBatches(DistributedSampler[list[int]]):
    """Yields this rank's share of a data set in batches: every example once over all ranks, no padding.

    All ranks get equally many batches, although shares may differ by an example: a wrapper that communicates in each
    forward pass would wait forever otherwise.

    Args:
        size: Number of examples.
        batch_size: Examples per batch and rank, at most; one more where ranks could not have equally many otherwise.
        rank: This process.
        world_size: Number of processes.

    Raises:
        InputError: If there are fewer examples than processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if size < world_size:
            raise InputError(f"{size} examples cannot be shared by {world_size} processes; use fewer processes")
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, size, world_size)
        smallest_share, largest_share = size // world_size, -(-size // world_size)
        # Never more batches than the smallest share has examples: no rank gets an empty one.
        self.num_batches = min(-(-largest_share // batch_size), smallest_share)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.num_batches):
            first, last = (len(self.indices) * k // self.num_batches for k in (batch, batch + 1))
            yield list(self.indices[first:last])

    def __len__(self) -> int:
        return self.num_batches


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A DataLoader over whole batches that tells Lightning that it can continue in mid-epoch.

    The position itself belongs to the DataModule, which the sampler asks; Lightning merely looks for these two methods
    before it warns that a run is not resumable.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing of its own, see above."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accepts what :meth:`state_dict` returns.

        Raises:
            InputError: If the state has entries, which another loader must have written.
        """
        if state:
            raise InputError(f"the data loader has no state of its own, got {sorted(state)}")
