"""Networks that map normalised images to logits."""

from dat_lightning.backbones.convnext import ConvStem, convnext_convstem
from dat_lightning.backbones.resnet import resnet50, timm_model, wide_resnet50_2, wide_resnet50_4
from dat_lightning.backbones.small import SmallResNet
from dat_lightning.backbones.wide_resnet import WideResNet

__all__ = [
    "ConvStem",
    "SmallResNet",
    "WideResNet",
    "convnext_convstem",
    "resnet50",
    "timm_model",
    "wide_resnet50_2",
    "wide_resnet50_4",
]
