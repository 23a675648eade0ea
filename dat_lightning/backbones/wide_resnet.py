"""The CIFAR WideResNet, with the parameter names of the common public implementations, so that their weights load."""

from typing import Literal, cast

from torch import Tensor, nn

from dat_lightning.backbones.architectures import register_architecture
from dat_lightning.core.errors import InputError

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class WideBlock(nn.Module):
    """Pre-activation block of two 3×3 convolutions.

    Args:
        in_planes: Channels of the input.
        out_planes: Channels of the output.
        stride: Stride of the first convolution.
        activation: The nonlinearity.

    Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146), Fig. 1.
    """

    def __init__(self, in_planes: int, out_planes: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.act1 = activation()
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.act2 = activation()
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, 1, 1, bias=False)
        self.convShortcut = None if in_planes == out_planes else nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns features of shape (N, out_planes, H/stride, W/stride)."""
        h = self.act1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(h)
        return cast(Tensor, shortcut + self.conv2(self.act2(self.bn2(self.conv1(h)))))


class WideGroup(nn.Module):
    """Blocks of one resolution, under the name ``layer``."""

    def __init__(self, count: int, in_planes: int, out_planes: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        first = WideBlock(in_planes, out_planes, stride, activation)
        self.layer = nn.Sequential(first, *(WideBlock(out_planes, out_planes, 1, activation) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features after all blocks."""
        return cast(Tensor, self.layer(x))


@register_architecture("WideResNet")
class WideResNet(nn.Module):
    """WRN-depth-width for 32×32 images (any size that is a multiple of 4).

    Args:
        depth: Number of convolutional layers, 6n + 4.
        widen_factor: Multiple of the base widths 16, 32, 64.
        num_classes: K.
        in_channels: Channels of the images.
        activation: The nonlinearity.

    Shape:
        (N, in_channels, H, W) → (N, num_classes).

    Raises:
        InputError: If ``depth`` is not 6n + 4 with n ≥ 1, or ``activation`` is unknown.

    Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146).
    """

    def __init__(
        self,
        depth: int = 34,
        widen_factor: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        activation: Literal["relu", "silu"] = "relu",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"depth must be 6n + 4 with n at least 1 (10, 16, 22, 28, 34, …), got {depth}")
        if activation not in _ACTIVATIONS:
            raise InputError(f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}")
        count, act = (depth - 4) // 6, _ACTIVATIONS[activation]
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.block1 = WideGroup(count, widths[0], widths[1], 1, act)
        self.block2 = WideGroup(count, widths[1], widths[2], 2, act)
        self.block3 = WideGroup(count, widths[2], widths[3], 2, act)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.act = act()
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes)."""
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        return cast(Tensor, self.fc(self.act(self.bn1(h)).mean((2, 3))))
