"""Weights and runs from files, ours and other people's, read without running code from them; and runs written whole."""

from dat_lightning.checkpoints.atomic import AtomicCheckpointIO
from dat_lightning.checkpoints.layouts import energy_model_weights
from dat_lightning.checkpoints.loading import LoadedWeights, load_weights
from dat_lightning.checkpoints.pickles import StandIn
from dat_lightning.checkpoints.reading import read_checkpoint
from dat_lightning.checkpoints.runs import (
    DamagedCheckpointError,
    can_resume,
    checkpoints_in,
    newest_whole,
    offer,
    read_run,
)
from dat_lightning.checkpoints.stamp import check_stamp, stamp

__all__ = [
    "AtomicCheckpointIO",
    "DamagedCheckpointError",
    "LoadedWeights",
    "StandIn",
    "can_resume",
    "check_stamp",
    "checkpoints_in",
    "energy_model_weights",
    "load_weights",
    "newest_whole",
    "offer",
    "read_checkpoint",
    "read_run",
    "stamp",
]
