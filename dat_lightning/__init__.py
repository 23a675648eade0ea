"""PyTorch Lightning modules for Dual Adversarial Training: a robust classifier and a generator in one network.

Names are loaded when they are asked for: a published model needs no training stack, and this file no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dat_lightning.version import __version__

__all__ = [
    "ATEBMModule",
    "AUCCurriculum",
    "ArrayImages",
    "Ascent",
    "AtomicCheckpointIO",
    "AutoAttack",
    "CIFARImages",
    "Calibration",
    "ClassifierFeatures",
    "CorruptImageError",
    "Counterfactuals",
    "DATRatioModule",
    "Diagnostics",
    "DigitsDataModule",
    "DigitsFeatures",
    "DivergenceGuard",
    "DualAdversarialModule",
    "EnergyModel",
    "EnergyModule",
    "EnergyStatistics",
    "EvaluationReport",
    "Evaluator",
    "ExponentialMovingAverage",
    "Figure",
    "FrechetDistance",
    "GeneratedImages",
    "HuggingFaceImages",
    "ImageDataModule",
    "ImageFolder",
    "JEMModule",
    "LabelledFolder",
    "Langevin",
    "Measurement",
    "Memorisation",
    "Momentum",
    "OODDetection",
    "PGDSampler",
    "PairedDataModule",
    "PixelAdam",
    "RATIOModule",
    "RandomLength",
    "RobustAccuracy",
    "RobustClassifierModule",
    "SampleBatch",
    "SampleConsumer",
    "SampleGrid",
    "SampleMetrics",
    "SampleWriter",
    "SamplingPlan",
    "SignalCheckpoint",
    "SmallResNet",
    "Steepest",
    "ThreatModel",
    "TinyImages",
    "TorchFidelityFeatures",
    "TorchFidelityLayers",
    "TradesModule",
    "UniformNoise",
    "Unlabelled",
    "UpdateRule",
    "WideResNet",
    "__version__",
    "architecture_of",
    "ascend",
    "build_architecture",
    "convnext_convstem",
    "load_post_mortem",
    "pretrained",
    "register_architecture",
    "resnet50",
    "timm_model",
    "unbounded_ascent",
    "wide_resnet50_2",
    "wide_resnet50_4",
]

# The room that each name comes from.
_ROOMS = {
    "SmallResNet": "backbones",
    "WideResNet": "backbones",
    "architecture_of": "backbones",
    "build_architecture": "backbones",
    "convnext_convstem": "backbones",
    "register_architecture": "backbones",
    "resnet50": "backbones",
    "timm_model": "backbones",
    "wide_resnet50_2": "backbones",
    "wide_resnet50_4": "backbones",
    "AUCCurriculum": "core",
    "Ascent": "core",
    "Langevin": "core",
    "Momentum": "core",
    "PixelAdam": "core",
    "RandomLength": "core",
    "Steepest": "core",
    "ThreatModel": "core",
    "UpdateRule": "core",
    "ascend": "core",
    "unbounded_ascent": "core",
    "ArrayImages": "data",
    "CIFARImages": "data",
    "CorruptImageError": "data",
    "DigitsDataModule": "data",
    "GeneratedImages": "data",
    "HuggingFaceImages": "data",
    "ImageDataModule": "data",
    "ImageFolder": "data",
    "LabelledFolder": "data",
    "PairedDataModule": "data",
    "TinyImages": "data",
    "UniformNoise": "data",
    "Unlabelled": "data",
    "AutoAttack": "evaluation",
    "Calibration": "evaluation",
    "Counterfactuals": "evaluation",
    "EnergyStatistics": "evaluation",
    "Evaluator": "evaluation",
    "OODDetection": "evaluation",
    "RobustAccuracy": "evaluation",
    "ClassifierFeatures": "features",
    "DigitsFeatures": "features",
    "TorchFidelityFeatures": "features",
    "TorchFidelityLayers": "features",
    "ATEBMModule": "modules",
    "DATRatioModule": "modules",
    "DualAdversarialModule": "modules",
    "EnergyModule": "modules",
    "JEMModule": "modules",
    "RATIOModule": "modules",
    "RobustClassifierModule": "modules",
    "TradesModule": "modules",
    "EvaluationReport": "pages",
    "Figure": "results",
    "Measurement": "results",
    "AtomicCheckpointIO": "runs",
    "SignalCheckpoint": "runs",
    "FrechetDistance": "sampling",
    "Memorisation": "sampling",
    "PGDSampler": "sampling",
    "SampleBatch": "sampling",
    "SampleConsumer": "sampling",
    "SampleGrid": "sampling",
    "SampleMetrics": "sampling",
    "SampleWriter": "sampling",
    "SamplingPlan": "sampling",
    "Diagnostics": "training",
    "DivergenceGuard": "training",
    "ExponentialMovingAverage": "training",
    "load_post_mortem": "training",
    "EnergyModel": "weights",
    "pretrained": "weights",
}

if TYPE_CHECKING:  # the same for type checkers, editors and the reference
    from dat_lightning.backbones import (
        SmallResNet,
        WideResNet,
        architecture_of,
        build_architecture,
        convnext_convstem,
        register_architecture,
        resnet50,
        timm_model,
        wide_resnet50_2,
        wide_resnet50_4,
    )
    from dat_lightning.core import (
        Ascent,
        AUCCurriculum,
        Langevin,
        Momentum,
        PixelAdam,
        RandomLength,
        Steepest,
        ThreatModel,
        UpdateRule,
        ascend,
        unbounded_ascent,
    )
    from dat_lightning.data import (
        ArrayImages,
        CIFARImages,
        CorruptImageError,
        DigitsDataModule,
        GeneratedImages,
        HuggingFaceImages,
        ImageDataModule,
        ImageFolder,
        LabelledFolder,
        PairedDataModule,
        TinyImages,
        UniformNoise,
        Unlabelled,
    )
    from dat_lightning.evaluation import (
        AutoAttack,
        Calibration,
        Counterfactuals,
        EnergyStatistics,
        Evaluator,
        OODDetection,
        RobustAccuracy,
    )
    from dat_lightning.features import ClassifierFeatures, DigitsFeatures, TorchFidelityFeatures, TorchFidelityLayers
    from dat_lightning.modules import (
        ATEBMModule,
        DATRatioModule,
        DualAdversarialModule,
        EnergyModule,
        JEMModule,
        RATIOModule,
        RobustClassifierModule,
        TradesModule,
    )
    from dat_lightning.pages import EvaluationReport
    from dat_lightning.results import Figure, Measurement
    from dat_lightning.runs import AtomicCheckpointIO, SignalCheckpoint
    from dat_lightning.sampling import (
        FrechetDistance,
        Memorisation,
        PGDSampler,
        SampleBatch,
        SampleConsumer,
        SampleGrid,
        SampleMetrics,
        SampleWriter,
        SamplingPlan,
    )
    from dat_lightning.training import Diagnostics, DivergenceGuard, ExponentialMovingAverage, load_post_mortem
    from dat_lightning.weights import EnergyModel, pretrained
else:  # hidden from type checkers, to whom any name would exist otherwise

    def __getattr__(name: str) -> object:
        if name in _ROOMS:
            value = getattr(import_module(f"dat_lightning.{_ROOMS[name]}"), name)
        elif name in _ROOMS.values():
            value = import_module(f"dat_lightning.{name}")
        else:
            raise AttributeError(f"module 'dat_lightning' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
