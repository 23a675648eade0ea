"""Lightning callbacks: averaged weights, generation and its consumers, and the watch over a run."""

from dat_lightning.callbacks.diagnostics import Diagnostics, TrainingFailureError
from dat_lightning.callbacks.ema import ExponentialMovingAverage
from dat_lightning.callbacks.frechet import FrechetDistance
from dat_lightning.callbacks.pgd_sampler import PGDSampler, SampleBatch, SampleConsumer, SamplingPlan
from dat_lightning.callbacks.sample_grid import SampleGrid
from dat_lightning.callbacks.sample_writer import SampleWriter

__all__ = [
    "Diagnostics",
    "ExponentialMovingAverage",
    "FrechetDistance",
    "PGDSampler",
    "SampleBatch",
    "SampleConsumer",
    "SampleGrid",
    "SampleWriter",
    "SamplingPlan",
    "TrainingFailureError",
]
