"""Extractors that give several layers, and how features and class logits are found among them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import Rounding, resized_by_pil, to_uint8_rgb
from dat_lightning.features.extractors import DigitsFeatures, torch_fidelity_extractor
from dat_lightning.results.digests import network_identity


class TorchFidelityLayers(nn.Module):
    """Several layers of one of torch-fidelity's extractors in one pass, as a dictionary.

    Args:
        name: Name in torch-fidelity's registry.
        layers: Names of layers, that of the features first; by default those that torch-fidelity takes for FID and the
            Inception score, of Inception ``2048`` and ``logits_unbiased``.
        weights_path: As :class:`~dat_lightning.TorchFidelityFeatures` takes it.

    Raises:
        InputError: If torch-fidelity has no such extractor or layer, or a layer is named twice.
        FileNotFoundError: If the weights are neither in ``weights_path`` nor to be downloaded.

    Source: Obukhov et al. 2020 (torch-fidelity).
    """

    def __init__(
        self,
        name: str = "inception-v3-compat",
        layers: Sequence[str] | None = None,
        weights_path: str | None = None,
    ) -> None:
        super().__init__()
        self.extractor = torch_fidelity_extractor(name, layers, weights_path)

    def extra_repr(self) -> str:
        """Returns which extractor and layers these are."""
        return f"{self.extractor.get_name()}, {self.extractor.get_requested_features_list()}"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the layers, (N, D) each, of uint8 images (N, 3, H, W)."""
        return dict(zip(self.extractor.get_requested_features_list(), self.extractor(images), strict=True))


class DigitsLayers(nn.Module):
    """Features (N, 64) and logits (N, 10) of the small digits classifier that ships with the package, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.digits = DigitsFeatures()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns ``features`` and ``logits`` of uint8 images (N, 3, H, W)."""
        features = self.digits(images)
        return {"features": features, "logits": self.digits.network[-1](features)}


class LayerReader:
    """Reads features and class logits of eight-bit images from extractors of any kind.

    Args:
        extractor: Maps uint8 images (N, 3, H, W) to features (N, D), or to a tuple or a dictionary of layers.
        classifier: Maps images (N, C, H, W) in [0, 1] to logits (N, K); ``None`` for a layer of the extractor.
        features: Name of the layer with the features, its position in a tuple; by default the first.
        logits: Name of the layer with the logits; by default ``logits_unbiased`` or ``logits``.
        logit_size: Height and width to which PIL resizes images, bilinear, before logits are read, in a pass of their
            own; ``None`` leaves images as they are.
    """

    def __init__(
        self,
        extractor: nn.Module,
        classifier: nn.Module | None = None,
        features: str | None = None,
        logits: str | None = None,
        logit_size: int | None = None,
    ) -> None:
        self.extractor = extractor
        self.classifier = classifier
        self.feature_layer = features
        self.logit_layer = logits
        self.logit_size = logit_size

    def read(self, pixels: Tensor, with_logits: bool = False) -> dict[str, Tensor]:
        """Returns ``features`` (N, D), and ``logits`` (N, K) if asked for, in float32.

        Args:
            pixels: uint8 images (N, 1 or 3, H, W); the extractor gets three channels, the classifier those there are.
            with_logits: Whether logits are needed.

        Raises:
            InputError: If a layer is missing.
        """
        with torch.no_grad():
            layers = self._layers(pixels)
            found = {"features": self._layer(layers, self.feature_layer or next(iter(layers)), "features")}
            if with_logits:
                size = self.logit_size
                resized = pixels if size is None else resized_by_pil(pixels, (size, size))
                if self.classifier is not None:
                    found["logits"] = self.classifier(resized.float() / 255)
                else:
                    scored = layers if resized is pixels else self._layers(resized)
                    found["logits"] = self._layer(scored, self.logit_layer, "logits")
        return {name: value.detach().flatten(1).float() for name, value in found.items()}

    def settings(self) -> tuple[dict[str, str | None], dict[str, str | int | None]]:
        """Returns what features and what logits depend on."""
        extractor = network_identity(self.extractor)
        of_features = {"extractor": extractor, "feature_layer": self.feature_layer}
        resized = {"isc_size": self.logit_size}
        if self.classifier is not None:
            return of_features, {"classifier": network_identity(self.classifier), **resized}
        return of_features, {"extractor": extractor, "logit_layer": self.logit_layer, **resized}

    def _layers(self, pixels: Tensor) -> dict[str, Tensor]:
        return named_layers(self.extractor, self.extractor(pixels.expand(-1, 3, -1, -1)))

    def _layer(self, layers: Mapping[str, Tensor], name: str | None, part: str) -> Tensor:
        if name is None:
            name = next((known for known in ("logits_unbiased", "logits") if known in layers), None)
        if name is None:
            raise InputError(
                f"the metric 'isc' needs class logits: {type(self.extractor).__name__} gives the layers {list(layers)};"
                " name one of them as logits, or give a classifier"
            )
        if name not in layers:
            raise InputError(
                f"{part}={name!r}: {type(self.extractor).__name__} has no such layer; it gives {list(layers)}"
            )
        return layers[name]


def extract_features(extractor: nn.Module, images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Returns an extractor's features (N, D) of images (N, C, H, W) in [0, 1], which become eight bits first."""
    return LayerReader(extractor).read(to_uint8_rgb(images, rounding))["features"]


def named_layers(extractor: nn.Module, output: object) -> dict[str, Tensor]:
    """Returns an extractor's output as layers by name, a tuple's by torch-fidelity's names or else by position.

    Raises:
        InputError: If it is no tensor, nor a tuple or a dictionary of tensors.
    """
    named: dict[str, Tensor] = {}
    if isinstance(output, Mapping):
        named = {str(name): layer for name, layer in output.items()}
    elif isinstance(output, (tuple, list)):
        names: Sequence[str] = [str(position) for position in range(len(output))]
        if isinstance(extractor, FeatureExtractorBase):
            names = extractor.get_requested_features_list()
        named = dict(zip(names, output, strict=True))
    else:
        named = {"0": output}  # type: ignore[dict-item]
    if not named or not all(isinstance(layer, Tensor) for layer in named.values()):
        kinds = {name: type(layer).__name__ for name, layer in named.items()}
        raise InputError(f"{type(extractor).__name__} must give a tensor, or a tuple or dict of tensors, got {kinds}")
    return named
