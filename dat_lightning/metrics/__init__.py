"""What evaluation measures with: feature extractors."""

from dat_lightning.metrics.features import DigitsFeatures, TorchFidelityFeatures

__all__ = ["DigitsFeatures", "TorchFidelityFeatures"]
