"""TRADES: a robust classifier from a clean loss and the divergence between clean and adversarial predictions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.ascent import Ascent, no_trace
from dat_lightning.core.errors import require_finite
from dat_lightning.core.losses import is_right
from dat_lightning.core.objectives import cross_entropy
from dat_lightning.core.random_streams import normal_noise
from dat_lightning.modules.base import EnergyModule
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel

# Standard deviation of the noise that the attack starts with, in units of [0, 1] pixels.
START_NOISE = 0.001


class TradesModule(EnergyModule):
    """Minimises CE(f(x), y) + β · KL(p(·|x) ‖ p(·|x_adv)), another way to Stage 1's robust classifier.

    The attack climbs the same divergence. Its gradient is zero at x itself, so the walk begins at x + 0.001 · N(0, I),
    or at the random point of the ball that a threat model with ``random_start`` asks for. Clean predictions are fixed
    during the attack, and have a gradient in the loss.

    Clean and adversarial images pass the network one after the other. While batch norm trains, each batch is normalised
    by its own statistics, the clean ones first, and both move the running ones.

    Override points: :meth:`clean_loss`, :meth:`divergence` (what the attack climbs and the loss holds down, so that
    :meth:`attack_objective` plays no part), :meth:`robust_regularizer`, :meth:`adversarial_examples`,
    :meth:`evaluation_metrics`. Batches need ``x_clf`` and ``y_clf``.

    Logged besides: ``train/{loss, clean_loss, robust_regularizer, accuracy, robust_accuracy}``.

    Args:
        energy_model: The network.
        beta: β, the weight of the divergence; 0 trains on clean images alone, larger is more robust and less accurate.
        shared: The arguments of :class:`EnergyModule`.

    Raises:
        InputError: If ``beta`` is negative or infinite.

    Source: Zhang et al. 2019 (arXiv 1901.08573), Eq. 5 and Algorithm 1; their implementation's separate passes.
    """

    trains_batch_norm = True
    training_parts = ("x_clf", "y_clf")

    def __init__(
        self,
        energy_model: EnergyModel,
        beta: float = 6.0,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        require_finite(0, beta=beta)
        self.beta = beta

    # One method per equation.

    def divergence(self, logits_clean: Tensor, logits_adv: Tensor) -> Tensor:
        """Returns KL(p(·|x) ‖ p(·|x_adv)) of each image, (N,), from two times logits (N, K)."""
        clean, adv = F.log_softmax(logits_clean, dim=1), F.log_softmax(logits_adv, dim=1)
        return F.kl_div(adv, clean, reduction="none", log_target=True).sum(1)

    def clean_loss(self, logits_clean: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross-entropy at clean images, a scalar."""
        return cross_entropy(logits_clean, y).mean()

    def robust_regularizer(self, logits_clean: Tensor, logits_adv: Tensor) -> Tensor:
        """Returns the mean divergence over the batch, a scalar."""
        return self.divergence(logits_clean, logits_adv).mean()

    @override
    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the images of the ball around ``x`` whose predictions are far from those at ``x``, detached.

        Args:
            x: Images (N, C, H, W) in [0, 1].
            y: Labels, (N,), which the divergence does not look at.
            draws: Global numbers of the examples, (N,), which name the streams of the starts.
        """
        clean = self._fixed_logits(x)
        attack = Ascent(lambda logits, _: self.divergence(clean, logits), self.threat_model, self.attack_rule)
        start = None if self.threat_model.random_start else self._noised(x, draws)
        return self.ascend(attack, x, y, mode=self.attack_mode, start=start, draws=draws)

    # Lightning's hooks.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of ``x_clf`` and of the adversarial examples around it."""
        x, y = self.part(batch, "x_clf"), self.part(batch, "y_clf")
        x_adv = self.adversarial_examples(x, y, self.draws_of(batch))
        logits_clean, logits_adv = self(x), self(x_adv)
        clean_loss = self.clean_loss(logits_clean, y)
        regularizer = self.robust_regularizer(logits_clean, logits_adv)
        loss = clean_loss + self.beta * regularizer
        scalars = {
            "loss": loss,
            "clean_loss": clean_loss,
            "robust_regularizer": regularizer,
            "accuracy": is_right(logits_clean, y).float().mean(),
            "robust_accuracy": is_right(logits_adv, y).float().mean(),
        }
        self.log_training(scalars, len(x), shown=("loss", "robust_accuracy"))
        return loss

    # Parts.

    def _fixed_logits(self, x: Tensor) -> Tensor:
        """The clean logits as the attack sees them, without a graph and without a trace on the network."""
        network = self.network_forms.for_passes(self.energy_model)
        self.count_evaluations(x, 1)
        # Outside of inference mode, whose tensors no later gradient can use.
        with torch.inference_mode(False), torch.no_grad(), no_trace(self.energy_model, self.attack_mode):
            logits: Tensor = network(x.clone())
        return logits

    def _noised(self, x: Tensor, draws: Tensor | None) -> Tensor:
        """The images with the start's noise, from streams named by each example's global number."""
        indices = range(len(x)) if draws is None else draws.tolist()
        return x + START_NOISE * normal_noise(self.seed, "trades start", indices, tuple(x.shape[1:])).to(x)
