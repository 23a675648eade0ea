"""Networks from images to logits, and the registry by which files name them."""

from dat_lightning.backbones.architectures import architecture_of, build_architecture, register_architecture
from dat_lightning.backbones.convnext import ConvStem, convnext_convstem
from dat_lightning.backbones.perceptron import Perceptron
from dat_lightning.backbones.resnet import resnet50, timm_model, wide_resnet50_2, wide_resnet50_4
from dat_lightning.backbones.small import SmallResNet
from dat_lightning.backbones.wide_resnet import WideResNet

__all__ = [
    "ConvStem",
    "Perceptron",
    "SmallResNet",
    "WideResNet",
    "architecture_of",
    "build_architecture",
    "convnext_convstem",
    "register_architecture",
    "resnet50",
    "timm_model",
    "wide_resnet50_2",
    "wide_resnet50_4",
]
