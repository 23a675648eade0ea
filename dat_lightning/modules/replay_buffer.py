"""A buffer of images that chains go on from: each rank has its share, a checkpoint the whole."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.modules.base import EnergyModule
from dat_lightning.modules.checks import check_entry, check_entry_shape
from dat_lightning.modules.ranks import gathered, number_of_ranks


class ReplayBufferModule(EnergyModule):
    """Keeps images from step to step, each rank its share of them, on its device; a checkpoint has the whole.

    A subclass sets :attr:`buffer_size`, and says by :meth:`first_images` what the buffer begins as.

    Attributes:
        buffer_size: Images in the buffer, over all ranks.
        replay_buffer: This rank's share (N, C, H, W), places rank, rank + ranks, … of the whole; ``None`` before the
            first step.
    """

    buffer_size: int
    # No buffer of nn.Module's: those are averaged, sent from rank zero to all, and part of files of weights.
    replay_buffer: Tensor | None = None
    _restored_buffer: Tensor | None = None
    _collected_buffer: Tensor | None = None

    def first_images(self, places: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Returns what the buffer begins as at the given places of the whole, (N, *shape)."""
        raise NotImplementedError

    @override
    def on_fit_start(self) -> None:
        """Loads the initial weights; a run that does not go on from a checkpoint begins with another buffer."""
        super().on_fit_start()
        self._collected_buffer = None  # of a validation that failed
        if self.trainer.ckpt_path is None:
            self.replay_buffer = self._restored_buffer = None

    @override
    def on_validation_start(self) -> None:
        """Loads the initial weights, and collects the buffer: a signal in validation has rank zero alone save."""
        super().on_validation_start()
        self._collected_buffer = self._gathered() if self.trainer.state.fn == "fit" else None

    @override
    def on_validation_end(self) -> None:
        """Gives the collected buffer's memory back."""
        self._collected_buffer = None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the whole buffer, unless it is a file of weights alone; every rank takes part."""
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            collected = self._collected_buffer
            checkpoint["replay_buffer"] = self._gathered() if collected is None else collected

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the whole buffer where training goes on; the next step keeps this rank's share of it."""
        super().on_load_checkpoint(checkpoint)
        if self._is_fitting():
            self.replay_buffer, self._restored_buffer = None, checkpoint.get("replay_buffer")

    def check_entries(self, contents: Mapping[str, Any]) -> None:
        """Raises an InputError if a checkpoint's buffer is none of images."""
        check_entry("replay_buffer", contents.get("replay_buffer"), "N", "C", "H", "W", allow_nan=True)

    def _buffer_of(self, x: Tensor) -> Tensor:
        """This rank's share of the buffer, made or taken from a checkpoint at the first step."""
        if self.replay_buffer is None:
            rank, ranks, whole = self.global_rank, number_of_ranks(), self._restored_buffer
            if self.buffer_size % ranks or (whole is not None and len(whole) != self.buffer_size):
                kept = "" if whole is None else f", and be {len(whole)} as in the checkpoint"
                raise InputError(
                    f"buffer_size must be a multiple of the number of processes, {ranks}{kept}; got {self.buffer_size}"
                )
            places, shape = range(rank, self.buffer_size, ranks), tuple(x.shape[1:])
            if whole is not None:
                check_entry_shape("replay_buffer", whole, self.buffer_size, *shape)
            share = self.first_images(places, shape) if whole is None else whole[rank::ranks]
            self.replay_buffer, self._restored_buffer = share.to(x, copy=True), None
        return self.replay_buffer

    def _gathered(self) -> Tensor | None:
        if self.replay_buffer is None:
            return self._restored_buffer
        return gathered(self.replay_buffer).transpose(0, 1).flatten(0, 1).cpu()
