"""PyTorch Lightning modules for Dual Adversarial Training: a robust classifier and a generator in one network."""

from dat_lightning.backbones import SmallResNet, WideResNet
from dat_lightning.callbacks import (
    Diagnostics,
    ExponentialMovingAverage,
    FrechetDistance,
    PGDSampler,
    SampleBatch,
    SampleConsumer,
    SampleGrid,
    SampleWriter,
    SamplingPlan,
)
from dat_lightning.core import AUCCurriculum, EnergyModel, ThreatModel, ascend, ascend_snapshots, unbounded_ascent
from dat_lightning.data import DigitsDataModule, PairedDataModule
from dat_lightning.metrics import DigitsFeatures, TorchFidelityFeatures
from dat_lightning.modules import DualAdversarialModule, EnergyModule, RobustClassifierModule
from dat_lightning.version import __version__

__all__ = [
    "AUCCurriculum",
    "Diagnostics",
    "DigitsDataModule",
    "DigitsFeatures",
    "DualAdversarialModule",
    "EnergyModel",
    "EnergyModule",
    "ExponentialMovingAverage",
    "FrechetDistance",
    "PGDSampler",
    "PairedDataModule",
    "RobustClassifierModule",
    "SampleBatch",
    "SampleConsumer",
    "SampleGrid",
    "SampleWriter",
    "SamplingPlan",
    "SmallResNet",
    "ThreatModel",
    "TorchFidelityFeatures",
    "WideResNet",
    "__version__",
    "ascend",
    "ascend_snapshots",
    "unbounded_ascent",
]
