"""Weights and runs from files, ours and other people's, read without running code from them; and runs written whole."""

from dat_lightning.checkpoints.atomic import AtomicCheckpointIO
from dat_lightning.checkpoints.layouts import energy_model_weights
from dat_lightning.checkpoints.loading import LoadedWeights, load_weights
from dat_lightning.checkpoints.pickles import StandIn
from dat_lightning.checkpoints.reading import read_checkpoint
from dat_lightning.checkpoints.runs import (
    DamagedCheckpointError,
    Wanted,
    can_resume,
    checkpoints_in,
    know_as_whole,
    newest_whole,
    offer,
    peek,
    read_run,
    shapes_of,
    step_of,
)
from dat_lightning.checkpoints.stamp import changed_settings, check_stamp, run_of, stamp

__all__ = [
    "AtomicCheckpointIO",
    "DamagedCheckpointError",
    "LoadedWeights",
    "StandIn",
    "Wanted",
    "can_resume",
    "changed_settings",
    "check_stamp",
    "checkpoints_in",
    "energy_model_weights",
    "know_as_whole",
    "load_weights",
    "newest_whole",
    "offer",
    "peek",
    "read_checkpoint",
    "read_run",
    "run_of",
    "shapes_of",
    "stamp",
    "step_of",
]
