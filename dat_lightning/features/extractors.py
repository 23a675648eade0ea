"""Feature extractors of the Fréchet distance: uint8 images (N, 3, H, W) in, features (N, D) out."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from dat_lightning.core.errors import InputError
from dat_lightning.weights.reading import read_checkpoint

_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class TorchFidelityFeatures(nn.Module):
    """Features of one of torch-fidelity's extractors, with its preprocessing.

    Args:
        name: Name in torch-fidelity's registry; ``inception-v3-compat`` is the network that FID is defined by.
        feature: Name of the layer; ``2048`` is Inception's pool.
        weights_path: File with the extractor's weights, for machines without a network; by default torch-fidelity
            downloads them once.

    Raises:
        InputError: If torch-fidelity has no such extractor or layer, or the file holds more than weights.
        FileNotFoundError: If the weights are neither in ``weights_path`` nor to be downloaded; the message says which
            file to put where.

    Source: Heusel et al. 2017 (arXiv 1706.08500); Obukhov et al. 2020 (torch-fidelity).
    """

    def __init__(
        self, name: str = "inception-v3-compat", feature: str = "2048", weights_path: str | None = None
    ) -> None:
        super().__init__()
        self.extractor = torch_fidelity_extractor(name, [feature], weights_path)

    def extra_repr(self) -> str:
        """Returns which extractor and layer this is."""
        return f"{self.extractor.get_name()}, {self.extractor.get_requested_features_list()}"

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (N, D) of uint8 images (N, 3, H, W)."""
        return cast(Tensor, self.extractor(images)[0])


def torch_fidelity_extractor(name: str, layers: Sequence[str] | None, weights_path: str | None) -> FeatureExtractorBase:
    """Returns one of torch-fidelity's extractors, see :class:`~dat_lightning.features.TorchFidelityLayers`."""
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise InputError(f"torch-fidelity has no extractor {name!r}; it has {sorted(FEATURE_EXTRACTORS_REGISTRY)}")
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    if layers is None:
        # Without repetition: most extractors have one layer for both.
        layers = list(dict.fromkeys(kind.get_default_feature_layer_for_metric(m) for m in ("fid", "isc")))
    known = kind.get_provided_features_list()
    if not layers or len(set(layers)) < len(layers) or set(layers) - set(known):
        raise InputError(f"layers must be different names out of {list(known)} of {name!r}, got {list(layers)}")
    if weights_path is not None and not Path(weights_path).is_file():
        raise FileNotFoundError(f"weights_path={weights_path}: no such file; expected {_weights_hint(name)}")
    if weights_path is not None and name in ("inception-v3-compat", "vgg16"):
        # torch-fidelity would run code in a pickled file; its other extractors read archives of TorchScript.
        try:
            read_checkpoint(weights_path)  # no more than its size promises
            torch.load(weights_path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"weights_path={weights_path} is damaged or no file of weights") from error
    try:
        return kind(name, list(layers), feature_extractor_weights_path=weights_path)
    except (URLError, RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"the weights of {name!r} could not be loaded ({error}). Without a network, fetch {_weights_hint(name)}"
            f" elsewhere, and either put it into {torch.hub.get_dir()}/checkpoints or name it as weights_path."
        ) from error


def _weights_hint(name: str) -> str:
    if name == "inception-v3-compat":
        return f"{Path(_INCEPTION_URL).name} from {_INCEPTION_URL}"
    return f"the weights that torch-fidelity's documentation names for {name!r}"


def digits_feature_network() -> nn.Sequential:
    """Returns the untrained network of :class:`DigitsFeatures`: two convolutions, 64 features, 10 logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class DigitsFeatures(nn.Module):
    """Penultimate features, (N, 64), of a small classifier of scikit-learn's digits; its weights ship with the package.

    ``python -m dat_lightning.features.train_digits_features`` trains it on the training split alone; that module's
    docstring and the file's metadata give its accuracy on the test split. It reads the first channel, resized to 16×16.

    Raises:
        FileNotFoundError: If the installation lacks the weights.
    """

    WEIGHTS = Path(__file__).with_name("digits_features.safetensors")

    def __init__(self) -> None:
        super().__init__()
        self.network = digits_feature_network()
        if not self.WEIGHTS.is_file():
            raise FileNotFoundError(f"{self.WEIGHTS} is missing: install the package again")
        self.network.load_state_dict(load_file(self.WEIGHTS))
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (N, 64) of uint8 images (N, 3, H, W)."""
        x = images[:, :1].float() / 255
        if x.shape[-2:] != (16, 16):
            x = nn.functional.interpolate(x, size=(16, 16), mode="area")
        return cast(Tensor, self.network[:-1](x))
