"""Feature extractors, a reader of digits, and statistics of features: moments, Fréchet distance, KID, IS, precision."""

from dat_lightning.features.classifier_features import ClassifierFeatures, ClassifierJudge
from dat_lightning.features.digits_judge import DigitsJudge
from dat_lightning.features.extractors import DigitsFeatures, TorchFidelityFeatures
from dat_lightning.features.fidelity import FidelitySettings, Metric, Reference, fidelity_scores
from dat_lightning.features.gaussian_stats import FeatureMoments, Gaussian, frechet_distance
from dat_lightning.features.layers import DigitsLayers, TorchFidelityLayers
from dat_lightning.features.neighbours import nearest_neighbours

__all__ = [
    "ClassifierFeatures",
    "ClassifierJudge",
    "DigitsFeatures",
    "DigitsJudge",
    "DigitsLayers",
    "FeatureMoments",
    "FidelitySettings",
    "Gaussian",
    "Metric",
    "Reference",
    "TorchFidelityFeatures",
    "TorchFidelityLayers",
    "fidelity_scores",
    "frechet_distance",
    "nearest_neighbours",
]
