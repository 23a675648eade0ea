"""Networks of timm: ResNets for ImageNet, with the parameter names of torchvision's, and any other by its name."""

from difflib import get_close_matches
from typing import Any

from torch import nn

from dat_lightning.backbones.architectures import register_architecture
from dat_lightning.core.errors import InputError

# What a description of a network leaves out: it starts or runs otherwise and computes the same.
NOT_DESCRIBED = ("grad_checkpointing",)


@register_architecture("resnet50", omit=NOT_DESCRIBED)
def resnet50(num_classes: int = 1000, in_channels: int = 3, grad_checkpointing: bool = False) -> nn.Module:
    """Returns ResNet-50, 25.6 M parameters for 1000 classes.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        grad_checkpointing: See :func:`timm_model`.

    Source: He et al. 2016 (arXiv 1512.03385), with the stride in the 3×3 convolutions, as in torchvision.
    """
    return create_timm("resnet50", num_classes, in_channels, grad_checkpointing)


@register_architecture("wide_resnet50_2", omit=NOT_DESCRIBED)
def wide_resnet50_2(num_classes: int = 1000, in_channels: int = 3, grad_checkpointing: bool = False) -> nn.Module:
    """Returns WRN-50-2, ResNet-50 with inner widths doubled, 68.9 M parameters for 1000 classes.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        grad_checkpointing: See :func:`timm_model`.

    Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146).
    """
    return create_timm("wide_resnet50_2", num_classes, in_channels, grad_checkpointing)


@register_architecture("wide_resnet50_4", omit=NOT_DESCRIBED)
def wide_resnet50_4(num_classes: int = 1000, in_channels: int = 3, grad_checkpointing: bool = False) -> nn.Module:
    """Returns WRN-50-4, ResNet-50 with inner widths quadrupled, 223.4 M parameters for 1000 classes.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        grad_checkpointing: See :func:`timm_model`.

    Source: Salman et al. 2020 (arXiv 2007.08489), whose robust weights have this shape.
    """
    return create_timm("resnet50", num_classes, in_channels, grad_checkpointing, base_width=256)


@register_architecture("timm_model", omit=("pretrained", *NOT_DESCRIBED))
def timm_model(
    name: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    pretrained: bool = False,
    grad_checkpointing: bool = False,
) -> nn.Module:
    """Returns a network of timm by its name there, such as ``"convnext_tiny"``, without drop path and dropout.

    Args:
        name: What ``timm.list_models()`` or, with a tag for its weights, ``timm.list_pretrained()`` has.
        num_classes: K.
        in_channels: Channels of the images.
        pretrained: Whether to download the weights that timm has for it. They want the input normalisation of
            ``timm.get_pretrained_cfg(name)`` as the mean and std of :class:`~dat_lightning.weights.EnergyModel`.
        grad_checkpointing: Whether to compute activations again in the backward pass in train mode, in place of
            keeping them: less memory for about a third more time. Attacks and samples, which run in eval mode, are
            not slowed down. Batch norm in train mode counts each batch twice then; frozen batch norm does not.

    Raises:
        InputError: If timm has no such network, a size is not positive, or the network has no checkpointing.
    """
    import timm

    if name not in timm.list_models() and name not in timm.list_pretrained():
        close = get_close_matches(name, timm.list_models(), n=5)
        hint = f"close ones are {', '.join(close)}" if close else "timm.list_models() lists them"
        raise InputError(f"name must be a network of timm, got {name!r}; {hint}")
    return create_timm(name, num_classes, in_channels, grad_checkpointing, pretrained=pretrained)


def create_timm(
    name: str,
    num_classes: int,
    in_channels: int,
    grad_checkpointing: bool,
    *,
    base_width: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Returns a network of timm; checkpointing, if asked for, acts in train mode alone.

    Raises:
        InputError: If a size is not positive, or the network has no checkpointing.
    """
    # Importing timm takes seconds.
    import timm

    if min(num_classes, in_channels) < 1:
        raise InputError(f"sizes must be positive: {num_classes=}, {in_channels=}")
    width = {} if base_width is None else {"base_width": base_width}
    network: nn.Module = timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **width
    )
    if grad_checkpointing:
        try:
            _set_checkpointing(network, True)
        except (AssertionError, AttributeError, TypeError) as error:
            raise InputError(f"grad_checkpointing must be false for {name!r}, which has none") from error
        network.register_forward_pre_hook(_checkpoint_in_training)
    return network


def _checkpoint_in_training(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    # A hook, because an attack sets the mode of every module without a call of train().
    _set_checkpointing(network, network.training)


def _set_checkpointing(network: Any, enable: bool) -> None:
    network.set_grad_checkpointing(enable)
