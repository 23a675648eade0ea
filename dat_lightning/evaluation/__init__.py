"""Evaluators of a classifier: robustness, calibration, OOD detection, counterfactuals, editing, energy, density."""

from dat_lightning.evaluation.autoattack import AutoAttack
from dat_lightning.evaluation.calibration import Calibration
from dat_lightning.evaluation.counterfactuals import Counterfactuals
from dat_lightning.evaluation.editing import Editing
from dat_lightning.evaluation.energy_statistics import EnergyStatistics
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.evaluation.label_agreement import LabelAgreement
from dat_lightning.evaluation.landscape import Landscape
from dat_lightning.evaluation.ood_detection import OODDetection
from dat_lightning.evaluation.ood_images import OODEvaluator
from dat_lightning.evaluation.ood_scores import auroc, detection_scores, false_positive_rates
from dat_lightning.evaluation.real_images import RealImages
from dat_lightning.evaluation.relative_density import KnownDensity, RelativeDensity, rank_correlation
from dat_lightning.evaluation.reliability import calibration_error, fit_temperature, reliability
from dat_lightning.evaluation.restorations import Denoising, Inpainting, Restoration, SuperResolution
from dat_lightning.evaluation.robustness import RobustAccuracy
from dat_lightning.evaluation.sample_support import SampleSupport

__all__ = [
    "AutoAttack",
    "Calibration",
    "Counterfactuals",
    "Denoising",
    "Editing",
    "EnergyStatistics",
    "Evaluator",
    "Inpainting",
    "KnownDensity",
    "LabelAgreement",
    "Landscape",
    "OODDetection",
    "OODEvaluator",
    "RealImages",
    "RelativeDensity",
    "Restoration",
    "RobustAccuracy",
    "SampleSupport",
    "SuperResolution",
    "auroc",
    "calibration_error",
    "detection_scores",
    "false_positive_rates",
    "fit_temperature",
    "rank_correlation",
    "reliability",
]
