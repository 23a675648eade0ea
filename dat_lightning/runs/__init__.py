"""Runs that survive: signals, resume, checkpoints that are written whole or not at all."""

from dat_lightning.runs.atomic import AtomicCheckpointIO
from dat_lightning.runs.checkpoints import (
    Requirements,
    can_resume,
    checkpoints_in,
    name_another,
    newest_whole,
    read_run_checkpoint,
    read_without_tensors,
    shapes_of,
    step_of,
)
from dat_lightning.runs.signal_checkpoint import SignalCheckpoint, StoppedBySignal
from dat_lightning.weights.archives import DamagedCheckpointError

__all__ = [
    "AtomicCheckpointIO",
    "DamagedCheckpointError",
    "Requirements",
    "SignalCheckpoint",
    "StoppedBySignal",
    "can_resume",
    "checkpoints_in",
    "name_another",
    "newest_whole",
    "read_run_checkpoint",
    "read_without_tensors",
    "shapes_of",
    "step_of",
]
