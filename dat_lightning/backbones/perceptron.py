"""A perceptron of several layers, for points of a plane and other small vectors, as images of one pixel."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from dat_lightning.backbones.architectures import register_architecture
from dat_lightning.backbones.small import ACTIVATIONS, Activation
from dat_lightning.core.errors import InputError


@register_architecture("Perceptron")
class Perceptron(nn.Module):
    """Linear layers of given widths, each with its activation, and a last one without; it has no normalisation.

    Args:
        num_classes: K.
        in_features: Numbers in an image, C·H·W.
        widths: Outputs of each layer but the last.
        activation: The nonlinearity; smooth ones give smoother energy gradients.

    Shape:
        (N, C, H, W) → (N, num_classes).

    Raises:
        InputError: If a number is not positive, or the activation is unknown.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_features: int = 2,
        widths: Sequence[int] = (128, 128, 128),
        activation: Activation = "silu",
    ) -> None:
        super().__init__()
        if min(num_classes, in_features, *widths, len(widths)) < 1:
            raise InputError(f"sizes must be positive: {num_classes=}, {in_features=}, widths={list(widths)}")
        if activation not in ACTIVATIONS:
            raise InputError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        layers: list[nn.Module] = []
        for inputs, outputs in zip((in_features, *widths[:-1]), widths, strict=True):
            layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes)."""
        return cast(Tensor, self.fc(self.layers(x.flatten(1))))
