"""ConvNeXt with a convolutional stem, with the parameter names of the published robust weights."""

from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from dat_lightning.backbones.architectures import register_architecture
from dat_lightning.backbones.resnet import NOT_DESCRIBED, create_timm
from dat_lightning.core.errors import InputError

ConvNeXtSize = Literal["tiny", "small", "base", "large"]

# Channels after each convolution of the stem; the first two halve the resolution.
_STEMS: dict[ConvNeXtSize, tuple[int, ...]] = {
    "tiny": (48, 96),
    "small": (48, 96),
    "base": (64, 96, 128),
    "large": (96, 144, 192),
}


class ConvStem(nn.Module):
    """3×3 convolutions, each followed by LayerNorm over the channels and GELU; a quarter of the resolution.

    Args:
        in_channels: Channels of the images.
        widths: Channels after each convolution; the first two have stride 2, further ones stride 1.

    Source: Singh et al. 2023 (arXiv 2303.01870), on architecture.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        from timm.layers import LayerNorm2d

        layers: list[nn.Module] = []
        for place, (before, after) in enumerate(zip((in_channels, *widths[:-1]), widths, strict=True)):
            convolution = nn.Conv2d(before, after, 3, stride=2 if place < 2 else 1, padding=1)
            # As ConvNeXt's own convolutions start.
            nn.init.trunc_normal_(convolution.weight, std=0.02)
            nn.init.zeros_(cast(Tensor, convolution.bias))
            layers += [convolution, LayerNorm2d(after), nn.GELU()]
        self.stem = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Returns features of shape (N, widths[-1], ⌈H/4⌉, ⌈W/4⌉)."""
        return cast(Tensor, self.stem(x))


@register_architecture("convnext_convstem", omit=NOT_DESCRIBED)
def convnext_convstem(
    size: ConvNeXtSize = "tiny", num_classes: int = 1000, in_channels: int = 3, grad_checkpointing: bool = False
) -> nn.Module:
    """Returns ConvNeXt whose patches are replaced by a :class:`ConvStem`; 28.6, 50.3, 88.8 and 198.1 M parameters.

    Images may have any size from 32×32 on. The published weights take raw pixels, without mean and std.

    Args:
        size: T, S, B or L.
        num_classes: K.
        in_channels: Channels of the images.
        grad_checkpointing: See :func:`~dat_lightning.backbones.timm_model`; ConvNeXt has no batch norm.

    Raises:
        InputError: If the size is unknown or a number is not positive.

    Source: Liu et al. 2022 (arXiv 2201.03545); Singh et al. 2023 (arXiv 2303.01870).
    """
    if size not in _STEMS:
        raise InputError(f"size must be one of {', '.join(_STEMS)}, got {size!r}")
    network: Any = create_timm(f"convnext_{size}", num_classes, in_channels, grad_checkpointing)
    network.stem = ConvStem(in_channels, _STEMS[size])
    return cast(nn.Module, network)
