"""What evaluation measures with: feature extractors."""

from dat_lightning.metrics.classifier_features import ClassifierFeatures
from dat_lightning.metrics.features import DigitsFeatures, TorchFidelityFeatures

__all__ = ["ClassifierFeatures", "DigitsFeatures", "TorchFidelityFeatures"]
