"""The count of images that could not be read: a few are skipped, too many stop the run."""

import logging
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import get_worker_info

from dat_lightning.core.errors import InputError
from dat_lightning.data.draws import DrawStream, Transform
from dat_lightning.data.entries import SizedDataset

logger = logging.getLogger(__name__)

# Loaded images below which a share means little: two bad files among the first ten are no two in ten.
_MIN_LOADED = 1000


class SkippedImages:
    """Counts images that were skipped because they are corrupt, and logs each once, with its path.

    Args:
        max_share: Largest share of loaded images that may be skipped, in [0, 1]; 0 allows none.

    Attributes:
        count: Images skipped so far by this process, once for every time one was met.
        loaded: Images loaded so far.

    Raises:
        InputError: If the share is outside [0, 1].
    """

    def __init__(self, max_share: float = 0.01) -> None:
        if not 0 <= max_share <= 1:
            raise InputError(f"max_skipped_share must lie in [0, 1], got {max_share}")
        self.max_share = max_share
        self.count = 0
        self.loaded = 0
        self._known: set[str] = set()

    def update(self, messages: Sequence[str], loaded: int = 0) -> None:
        """Adds the messages of skipped images, and the number of images that were loaded.

        Raises:
            InputError: If more than the allowed share was skipped, which counts from a thousand loaded images on.
        """
        self.loaded += loaded
        self.count += len(messages)
        for message in messages:
            if message not in self._known:
                self._known.add(message)
                logger.warning("skipped an image (%d different ones so far): %s", len(self._known), message)
        allowed = self.max_share * max(self.loaded, _MIN_LOADED)
        if messages and self.count > allowed:
            raise InputError(
                f"{self.count} of {self.loaded} loaded images could not be read, more than data.max_skipped_share"
                f" {self.max_share:g} allows; the last one: {messages[-1]}"
            )


class CountedStream(DrawStream):
    """Counts each draw at once; draws of loader processes, whose counters are copies, are for :meth:`count`.

    Args:
        dataset: See :class:`DrawStream`, as for the next three.
        transform: Likewise.
        seed: Likewise.
        name: Likewise.
        counter: Gets every draw, and every corrupt image.
    """

    def __init__(
        self, dataset: SizedDataset, transform: Transform, seed: int, name: str, counter: SkippedImages
    ) -> None:
        super().__init__(dataset, transform, seed, name)
        self.counter = counter

    def __call__(self, draw: int) -> tuple[Tensor, int | None]:
        """Returns image and label of a draw.

        Raises:
            InputError: If too many images were corrupt so far.
        """
        entry = super().__call__(draw)
        if get_worker_info() is None:
            self.count(self.take_skipped())
        return entry

    def count(self, messages: Sequence[str]) -> None:
        """Counts a draw, perhaps of another process, and why images were skipped on the way to it.

        Raises:
            InputError: If too many images were corrupt so far.
        """
        self.counter.update(messages, loaded=1)
