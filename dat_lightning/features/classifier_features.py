"""A classifier that was trained here as a reader of images, and its features where Inception is not at hand."""

import copy

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import Self

from dat_lightning.core.energy import EnergyModel
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.weights import load_weights


class TrainedClassifier(nn.Module):
    """A copy of a network with weights from a file, which never trains again.

    The network is copied, so that nothing happens to the one that is given. Weights are loaded when they are first
    needed, for images or for ``state_dict()``; until then the file may be missing.

    Args:
        energy_model: The network, with its input normalisation.
        init_from: Checkpoint, state dict or name of a model that ships, averaged weights preferred; ``None`` for those
            it has.

    Raises:
        InputError: If the network is no :class:`~dat_lightning.weights.EnergyModel`; on first use, if the file does not
            fit the network.
        FileNotFoundError: On first use, if there is no file ``init_from``.
    """

    def __init__(self, energy_model: EnergyModel, init_from: str | None = None) -> None:
        super().__init__()
        if not isinstance(energy_model, EnergyModel):
            raise InputError(f"energy_model must be an EnergyModel, got {type(energy_model).__name__}")
        self.energy_model = copy.deepcopy(energy_model)
        self.init_from = init_from
        self._loaded = False
        self.requires_grad_(False)
        self.eval()
        # Whoever reads the weights, as the cache of reference statistics does, has to see the trained ones.
        self.register_state_dict_pre_hook(_load_before_reading)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is asked for."""
        return super().train(False)

    def read_weights(self) -> None:
        """Loads the weights unless they have been loaded."""
        if not self._loaded and self.init_from is not None:
            loaded = load_weights(self.energy_model, self.init_from)
            rank_zero_info(f"{type(self).__name__}: weights from {self.init_from}: {loaded}")
        self._loaded = True


class ClassifierJudge(TrainedClassifier):
    """A trained classifier as an independent reader of images, (N, C, H, W) in [0, 1] to logits (N, K), in eval mode.

    It should be of another architecture than what it judges, and have no part in training or tuning. Arguments and
    errors are those of :class:`TrainedClassifier`.
    """

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits (N, K)."""
        self.read_weights()
        logits: Tensor = self.energy_model(images.to(next(self.energy_model.parameters()).dtype))
        return logits


class ClassifierFeatures(TrainedClassifier):
    """What the last linear layer of a trained classifier sees, (N, D), in eval mode and without gradients.

    Distances in these features compare runs with each other; they are not comparable with FID, nor between two
    classifiers. Measure with a classifier that neither run began from, or the samples have been drawn to please it.
    Network and weights are those of :class:`TrainedClassifier`.

    Args:
        energy_model: The network, with its input normalisation.
        init_from: Checkpoint or state dict with its weights, averaged ones preferred, or the name of a model
            that ships; ``None`` for those it has.
        image_size: Height and width that images are resized to; by default they stay as they are.
        grey: Whether the network takes one channel; it gets the first one.

    Raises:
        InputError: If the network is no :class:`~dat_lightning.weights.EnergyModel`, has no linear layer, or the size
            is not positive; on first use, if the file does not fit the network, or no images passed the layer.
        FileNotFoundError: On first use, if there is no file ``init_from``.

    Source: Heusel et al. 2017 (arXiv 1706.08500), with another network than theirs.
    """

    def __init__(
        self, energy_model: EnergyModel, init_from: str | None = None, image_size: int | None = None, grey: bool = False
    ) -> None:
        super().__init__(energy_model, init_from)
        if image_size is not None:
            require_at_least(1, image_size=image_size)
        self.image_size = image_size
        self.grey = grey
        self._last_linear()

    def extra_repr(self) -> str:
        """Returns how images are prepared; the weights' file is left out, as their values are what counts."""
        return f"image_size={self.image_size}, grey={self.grey}"

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (N, D) of uint8 images (N, 3, H, W)."""
        self.read_weights()
        x = images[:, :1] if self.grey else images
        x = x.to(next(self.energy_model.parameters()).dtype) / 255
        size = (self.image_size or x.shape[-2], self.image_size or x.shape[-1])
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
        seen: list[Tensor] = []
        hook = self._last_linear().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        try:
            self.energy_model(x)
        finally:
            hook.remove()
        if len(seen) != 1 or len(seen[0]) != len(images):
            raise InputError(
                f"the last linear layer of {type(self.energy_model.backbone).__name__} must see each batch once as"
                f" (N, D), N = {len(images)}; it saw {[tuple(s.shape) for s in seen]}"
            )
        return seen[0].flatten(1)

    def _last_linear(self) -> nn.Linear:
        layers = [m for m in self.energy_model.modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise InputError(
                f"energy_model must have a linear layer, whose input are the features;"
                f" {type(self.energy_model.backbone).__name__} has none"
            )
        return layers[-1]


def _load_before_reading(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Runs before ``state_dict()``."""
    if isinstance(module, TrainedClassifier):
        module.read_weights()
