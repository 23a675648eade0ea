"""PGDSampler and the callbacks that consume its samples."""

from dat_lightning.sampling.memorisation import Memorisation
from dat_lightning.sampling.pgd_sampler import PGDSampler, SampleConsumer
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan
from dat_lightning.sampling.sample_grid import SampleGrid
from dat_lightning.sampling.sample_metrics import FrechetDistance, SampleMetrics
from dat_lightning.sampling.sample_writer import SampleWriter

__all__ = [
    "FrechetDistance",
    "Memorisation",
    "PGDSampler",
    "SampleBatch",
    "SampleConsumer",
    "SampleGrid",
    "SampleMetrics",
    "SampleWriter",
    "SamplingPlan",
]
