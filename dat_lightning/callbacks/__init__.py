"""Lightning callbacks: averaged weights, generation and its consumers, and the watch over a run."""

from dat_lightning.callbacks.autoattack import AutoAttack
from dat_lightning.callbacks.calibration import Calibration
from dat_lightning.callbacks.counterfactuals import Counterfactuals
from dat_lightning.callbacks.diagnostics import Diagnostics
from dat_lightning.callbacks.divergence import DivergenceGuard
from dat_lightning.callbacks.ema import ExponentialMovingAverage
from dat_lightning.callbacks.energy_statistics import EnergyStatistics
from dat_lightning.callbacks.evaluation_report import EvaluationReport
from dat_lightning.callbacks.evaluator import Evaluator
from dat_lightning.callbacks.frechet import FrechetDistance
from dat_lightning.callbacks.memorisation import Memorisation
from dat_lightning.callbacks.ood_detection import OODDetection
from dat_lightning.callbacks.pgd_sampler import PGDSampler, SampleBatch, SampleConsumer, SamplingPlan
from dat_lightning.callbacks.post_mortem import PostMortem, load_post_mortem
from dat_lightning.callbacks.robustness import RobustAccuracy
from dat_lightning.callbacks.sample_grid import SampleGrid
from dat_lightning.callbacks.sample_metrics import SampleMetrics
from dat_lightning.callbacks.sample_writer import SampleWriter
from dat_lightning.callbacks.signal_checkpoint import SignalCheckpoint, StoppedBySignal
from dat_lightning.callbacks.signatures import TrainingFailureError
from dat_lightning.core.figures import Figure

__all__ = [
    "AutoAttack",
    "Calibration",
    "Counterfactuals",
    "Diagnostics",
    "DivergenceGuard",
    "EnergyStatistics",
    "EvaluationReport",
    "Evaluator",
    "ExponentialMovingAverage",
    "Figure",
    "FrechetDistance",
    "Memorisation",
    "OODDetection",
    "PGDSampler",
    "PostMortem",
    "RobustAccuracy",
    "SampleBatch",
    "SampleConsumer",
    "SampleGrid",
    "SampleMetrics",
    "SampleWriter",
    "SamplingPlan",
    "SignalCheckpoint",
    "StoppedBySignal",
    "TrainingFailureError",
    "load_post_mortem",
]
