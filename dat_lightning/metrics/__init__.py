"""What evaluation measures with: feature extractors, and figures of features."""

from dat_lightning.metrics.calibration import Reliability, fit_temperature, reliability
from dat_lightning.metrics.classifier_features import ClassifierFeatures
from dat_lightning.metrics.features import DigitsFeatures, TorchFidelityFeatures
from dat_lightning.metrics.fidelity import FidelitySettings, Metric, Reference, fidelity_scores
from dat_lightning.metrics.layers import DigitsLayers, TorchFidelityLayers
from dat_lightning.metrics.neighbours import nearest_neighbours
from dat_lightning.metrics.ood import auroc, detection_scores, false_positive_rate

__all__ = [
    "ClassifierFeatures",
    "DigitsFeatures",
    "DigitsLayers",
    "FidelitySettings",
    "Metric",
    "Reference",
    "Reliability",
    "TorchFidelityFeatures",
    "TorchFidelityLayers",
    "auroc",
    "detection_scores",
    "false_positive_rate",
    "fidelity_scores",
    "fit_temperature",
    "nearest_neighbours",
    "reliability",
]
