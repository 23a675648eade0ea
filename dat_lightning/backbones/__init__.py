"""Networks that map normalised images to logits."""

from dat_lightning.backbones.small import SmallResNet
from dat_lightning.backbones.wide_resnet import WideResNet

__all__ = ["SmallResNet", "WideResNet"]
