"""Runs that survive: signals, resume, checkpoints that are written whole or not at all."""

from dat_lightning.runs.atomic import AtomicCheckpointIO
from dat_lightning.runs.checkpoints import (
    Wanted,
    can_resume,
    checkpoints_in,
    newest_whole,
    offer,
    peek,
    read_run,
    shapes_of,
    step_of,
)
from dat_lightning.runs.signal_checkpoint import SignalCheckpoint, StoppedBySignal
from dat_lightning.weights.archives import DamagedCheckpointError, know_as_whole

__all__ = [
    "AtomicCheckpointIO",
    "DamagedCheckpointError",
    "SignalCheckpoint",
    "StoppedBySignal",
    "Wanted",
    "can_resume",
    "checkpoints_in",
    "know_as_whole",
    "newest_whole",
    "offer",
    "peek",
    "read_run",
    "shapes_of",
    "step_of",
]
