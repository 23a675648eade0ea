"""Callbacks that look after training: averaged weights, the guard against divergence, diagnostics."""

from dat_lightning.core.errors import TrainingFailureError
from dat_lightning.training.diagnostics import Diagnostics
from dat_lightning.training.divergence import DivergenceGuard
from dat_lightning.training.ema import ExponentialMovingAverage
from dat_lightning.training.post_mortem import PostMortem, load_post_mortem

__all__ = [
    "Diagnostics",
    "DivergenceGuard",
    "ExponentialMovingAverage",
    "PostMortem",
    "TrainingFailureError",
    "load_post_mortem",
]
