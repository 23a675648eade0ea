"""Callbacks that look after training: averaged weights, the guard against divergence, diagnostics."""

from dat_lightning.training.diagnostics import Diagnostics
from dat_lightning.training.divergence import DivergenceGuard
from dat_lightning.training.ema import ExponentialMovingAverage
from dat_lightning.training.post_mortem import PostMortem, load_post_mortem
from dat_lightning.training.signatures import TrainingFailureError

__all__ = [
    "Diagnostics",
    "DivergenceGuard",
    "ExponentialMovingAverage",
    "PostMortem",
    "TrainingFailureError",
    "load_post_mortem",
]
