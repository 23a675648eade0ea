"""A small pre-activation residual network for images of 16×16 to 32×32 pixels; trains in minutes to hours on a CPU."""

from collections.abc import Sequence
from typing import Literal, cast, get_args

from torch import Tensor, nn

from dat_lightning.backbones.architectures import register_architecture
from dat_lightning.core.errors import InputError

Activation = Literal["relu", "silu", "gelu"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
Normalization = Literal["batch", "layer"]


class PreActivationBlock(nn.Module):
    """Two 3×3 convolutions, each after normalisation and activation, around a shortcut; pools before them if asked to.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; a 1×1 convolution adapts the shortcut where they differ.
        pool: Whether to halve height and width by averaging.
        activation: The nonlinearity; smooth ones give smoother energy gradients.
        norm: The normalisation, see :class:`SmallResNet`.

    Source: He et al. 2016 (arXiv 1603.05027), Fig. 4e.
    """

    def __init__(
        self, in_channels: int, out_channels: int, pool: bool, activation: Activation, norm: Normalization = "batch"
    ) -> None:
        super().__init__()
        self.bn1 = _normalization(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = _normalization(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2) if pool else nn.Identity()
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Returns features of shape (N, out_channels, H', W')."""
        h = self.activation(self.bn1(x))
        # A shortcut that changes the channels starts after the activation, an identity before it.
        shortcut = self.shortcut(self.pool(x if isinstance(self.shortcut, nn.Identity) else h))
        h = self.conv1(self.pool(h))
        return cast(Tensor, shortcut + self.conv2(self.activation(self.bn2(h))))


@register_architecture("SmallResNet")
class SmallResNet(nn.Module):
    """Residual blocks of given widths, each but the first at half the resolution of the one before.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        widths: Channels of each block.
        activation: The nonlinearity.
        stem_pool: Side of the squares over which the first convolution's outputs are averaged. A convolution of stride
            2 in its place costs the same later on, and leaves checkerboards in input gradients, and so in samples.
        norm: ``batch`` normalises by the statistics of batches, which are frozen in Stage 2; ``layer`` each image by
            its own, over channels and places, as a group norm of one group does. Weights of one are none of the other.

    Shape:
        (N, in_channels, H, W) → (N, num_classes), for H and W of at least stem_pool · 2^(len(widths)−1).

    Raises:
        InputError: If a number is not positive, or the activation or normalisation is unknown.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 32, 64),
        activation: Activation = "silu",
        stem_pool: int = 1,
        norm: Normalization = "batch",
    ) -> None:
        super().__init__()
        if min(num_classes, in_channels, stem_pool, *widths, len(widths)) < 1:
            raise InputError(
                f"sizes must be positive: {num_classes=}, {in_channels=}, widths={list(widths)}, {stem_pool=}"
            )
        if activation not in ACTIVATIONS:
            raise InputError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        if norm not in get_args(Normalization):
            raise InputError(f"norm must be 'batch' or 'layer', got {norm!r}")
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.stem_pool = nn.AvgPool2d(stem_pool) if stem_pool > 1 else nn.Identity()
        ins = (widths[0], *widths[:-1])
        sizes = enumerate(zip(ins, widths, strict=True))
        self.blocks = nn.Sequential(*(PreActivationBlock(i, o, n > 0, activation, norm) for n, (i, o) in sizes))
        self.norm = _normalization(norm, widths[-1])
        self.activation = ACTIVATIONS[activation]()
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes)."""
        h = self.activation(self.norm(self.blocks(self.stem_pool(self.stem(x)))))
        return cast(Tensor, self.fc(h.mean((2, 3))))


def _normalization(norm: Normalization, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(1, channels)
