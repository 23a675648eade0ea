"""A classifier read as an energy-based model: logits f(x), joint energy −f(x)[y], marginal energy −logsumexp f(x)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.errors import InputError
from dat_lightning.core.objectives import negative_marginal_energy, targeted_logit


def joint_energy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns E(x, y) = −f(x)[y], shape (N,), from logits (N, K) and labels (N,); low energy means likely.

    Source: DAT (arXiv 2510.13872); Grathwohl et al. 2020 (arXiv 1912.03263).
    """
    return -targeted_logit(logits, y)


def marginal_energy(logits: Tensor) -> Tensor:
    """Returns E(x) = −logsumexp_y f(x)[y], shape (N,), from logits (N, K); low energy means likely.

    Source: Grathwohl et al. 2020 (arXiv 1912.03263).
    """
    return -negative_marginal_energy(logits, logits)


def batch_norm_layers(module: nn.Module) -> list[nn.Module]:
    """Returns the batch norm layers of a module, SyncBatchNorm among them; LayerNorm and GroupNorm are none."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@fx.wrap  # a call of its own where a network is traced: only then have images a shape
def _normalised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if x.shape[1] != mean.shape[1]:
        raise InputError(f"the network takes images of {mean.shape[1]} channel(s), got the shape {tuple(x.shape)}")
    return (x - mean) / std


class EnergyModel(nn.Module):
    """Gives a backbone raw pixels, and its logits the names of an energy-based model.

    A module from images to logits like any classifier, so that evaluators such as AutoAttack take it as it is. The
    names in its state dict are the same whether or not the backbone is one that ``torch.compile`` returned.
    ``dat_lightning.EnergyModel`` is this one with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Args:
        backbone: Maps normalised images (N, C, H, W) to logits (N, K). K = 1 gives an unconditional energy, as
            AT-EBM trains it; the other methods classify, and need K of at least 2.
        mean: Mean of each channel, in units of [0, 1] pixels; ``None`` for a backbone that takes raw pixels.
        std: Standard deviation of each channel, likewise.

    Shape:
        Images are (N, C, H, W) in [0, 1], labels (N,) integers below K, logits (N, K), energies (N,).

    Raises:
        InputError: If only one of ``mean`` and ``std`` is given, their lengths differ, or a deviation is not positive.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None) or (mean is not None and std is not None and len(mean) != len(std)):
            raise InputError(f"mean and std go together and have one entry per channel, got mean={mean}, std={std}")
        if std is not None and not all(s > 0 for s in std):
            raise InputError(f"std must be positive, got {list(std)}")
        self.backbone = backbone
        # Without normalisation there are no buffers, so that weights trained with it do not load.
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(1, -1, 1, 1))
        self.batch_norm_frozen = False
        self.register_state_dict_post_hook(_save_plain_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_expect_plain_names)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits f(x).

        Raises:
            InputError: If the images have not as many channels as ``mean``; one would be taken for all of them.
        """
        if self.mean is not None and self.std is not None:
            x = _normalised(x, self.mean, self.std)
        logits: Tensor = self.backbone(x)
        return logits

    def joint_energy(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns E(x, y) = −f(x)[y].

        Raises:
            InputError: If there is not one label for each image.
        """
        if y.shape != x.shape[:1]:
            raise InputError(f"y must have one label for each of {len(x)} images, got the shape {tuple(y.shape)}")
        return joint_energy(self(x), y)

    def marginal_energy(self, x: Tensor) -> Tensor:
        """Returns E(x) = −logsumexp_y f(x)[y]."""
        return marginal_energy(self(x))

    def count_classes(self, x: Tensor) -> int:
        """Returns K, as the logits of the first of images (N, C, H, W) tell it, and leaves no trace."""
        with torch.no_grad(), no_trace(self):
            return int(self(x[:1]).shape[1])

    def freeze_batch_norm(self) -> None:
        """Keeps batch norm layers in eval mode from now on, whatever ``train()`` says; their affine parameters train.

        Source: DAT (arXiv 2510.13872), on normalisation in Stage 2.
        """
        self.batch_norm_frozen = True
        for layer in batch_norm_layers(self):
            layer.eval()

    def train(self, mode: bool = True) -> "EnergyModel":
        """Sets the mode of all submodules but frozen batch norm layers."""
        super().train(mode)
        if self.batch_norm_frozen:
            self.freeze_batch_norm()
        return self


def first_weight(network: nn.Module, otherwise: Tensor) -> Tensor:
    """Returns the first floating parameter of a network, whose type and device its images need, or another tensor."""
    return next((p for p in network.parameters() if p.is_floating_point()), otherwise)


# What torch.compile puts into the names of a network's weights.
_COMPILED = "_orig_mod."


def _save_plain_names(model: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(prefix) and _COMPILED in name]:
        state[name.replace(_COMPILED, "")] = state.pop(name)


def _expect_plain_names(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {prefix + name.replace(_COMPILED, ""): prefix + name for name, _ in _named_tensors(model)}
    for name in [name for name in state if name.startswith(prefix)]:
        plain = name.replace(_COMPILED, "")
        state[own.get(plain, plain)] = state.pop(name)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Tied weights have two names in a state dict.
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
