"""The DataModule's training images as evaluation sees them: what samples are compared with, shared by all ranks."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dat_lightning.core.errors import InputError
from dat_lightning.data.batches import check_pixels
from dat_lightning.results.gathering import all_ranks
from dat_lightning.results.progress import is_silent

_logger = logging.getLogger(__name__)


def reference_data(trainer: Trainer, need: str) -> Any:
    """Returns what the DataModule's ``reference_data()`` gives: ``dataset``, ``transform``, and batches by indices.

    Args:
        trainer: Has the DataModule.
        need: Who needs it, and what else would do; begins the error's message.

    Raises:
        InputError: If the DataModule cannot say.
    """
    data = getattr(trainer.datamodule, "reference_data", None)  # type: ignore[attr-defined]
    if not callable(data):
        raise InputError(f"{need} use a DataModule with reference_data(), as PairedDataModule has it")
    return data()


class ReferenceImages:
    """This rank's share of the reference images, read in batches by the DataModule's number of loader processes.

    Rank r has every image i with i mod world size = r; a rank may have none. Corrupt images are left out, and named in
    a line of the log.

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
        self._skipped: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._skipped = []
        mine = range(self.trainer.global_rank, len(self.data.dataset), self.trainer.world_size)
        batches = [mine[first : first + self.batch_size] for first in range(0, len(mine), self.batch_size)]
        workers: int = getattr(self.trainer.datamodule, "num_workers", 0)  # type: ignore[attr-defined]
        # A generator of its own: a loader draws a number when an iteration begins, and would move those of training.
        loader = DataLoader(
            self.data, batch_size=None, sampler=batches, num_workers=workers, generator=torch.Generator()
        )
        title = f"{self.who}: training images"
        for batch in tqdm(loader, desc=title, leave=False, disable=is_silent(self.trainer)):
            self._skipped += batch.get("skipped", ())
            check_pixels(batch["x"], "the images of reference_data()")
            yield batch
        if self._skipped:
            _logger.warning(
                "%s skipped %d training images, the first: %s", self.who, len(self._skipped), self._skipped[0]
            )

    def num_skipped(self) -> int:
        """Returns how many images were corrupt on all ranks; every rank must call it, after it has read its share.

        What is made of images with gaps must not be cached: a disk that fails today may be whole tomorrow.
        """
        return sum(all_ranks(len(self._skipped)))
