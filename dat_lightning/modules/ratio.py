"""RATIO: a robust classifier that is uncertain about out-of-distribution images, and in balls around them."""

from typing import Any

import torch
from torch import Tensor

from dat_lightning.core.ascent import Ascent
from dat_lightning.core.errors import require_finite, require_kind
from dat_lightning.core.losses import is_right, mean_distance_to_uniform
from dat_lightning.core.objectives import cross_entropy, distance_to_uniform
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.modules.base import EnergyModule
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel

# The paper's attack on out-of-distribution images, at 32×32.
OOD_ATTACK = ThreatModel(norm="L2", eps=1.0, step_size=0.1, num_steps=20)


class RATIOModule(EnergyModule):
    """Minimises ½(CE(f(x), y) + CE(f(x_adv), y)) + ½ λ KL(uniform ‖ p(·|x_ood_adv)): RATIO.

    Two attacks: the one of :class:`EnergyModule` on ``x_clf``, and one inside the ball of ``ood_threat_model`` around
    ``x_ood`` that climbs the same divergence, so that it raises the confidence. Both walk by ``attack_rule``, and see
    the network in ``attack_mode``.

    Clean, adversarial and out-of-distribution images pass the network as one batch. While batch norm trains, all three
    share its statistics, and the running ones are those of the mixture, as evaluation then finds it: had each a pass of
    its own, the running statistics would be mostly those of the last.

    Override points: :meth:`clean_loss`, :meth:`ood_adversarial_examples`, :meth:`ood_loss`, and those of
    :class:`EnergyModule`. Batches need ``x_clf``, ``y_clf`` and ``x_ood``.

    Logged besides: ``train/{loss, clean_loss, adversarial_loss, ood_loss, accuracy, robust_accuracy}``.

    Args:
        energy_model: The network.
        ood_weight: λ, the weight of the term of out-of-distribution images.
        ood_threat_model: The attack on them, in units of [0, 1] pixels; the default is the paper's for 32×32.
        shared: The arguments of :class:`EnergyModule`.

    Raises:
        InputError: If ``ood_weight`` is negative or infinite.

    Source: Augustin et al. 2020 (arXiv 2003.09461), Eq. 5. Steps are steepest here, without the paper's momentum and
    backtracking.
    """

    trains_batch_norm = True
    training_parts = ("x_clf", "y_clf", "x_ood")

    def __init__(
        self,
        energy_model: EnergyModel,
        ood_weight: float = 1.0,
        ood_threat_model: ThreatModel = OOD_ATTACK,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        require_finite(0, ood_weight=ood_weight)
        require_kind(ThreatModel, ood_threat_model=ood_threat_model)
        self.ood_weight = ood_weight
        self.ood_threat_model = ood_threat_model

    # One method per equation.

    def clean_loss(self, logits_clean: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross-entropy at clean images, a scalar."""
        return cross_entropy(logits_clean, y).mean()

    def ood_adversarial_examples(self, x_ood: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the images of the balls around ``x_ood`` (N, C, H, W) that the network is confident about, detached.

        Args:
            x_ood: Out-of-distribution images in [0, 1].
            draws: Global numbers of the examples, (N,), which name the streams of a random start.
        """
        return confident_images(self, self.ood_threat_model, x_ood, draws)

    def ood_loss(self, logits_ood: Tensor) -> Tensor:
        """Returns the mean of KL(uniform ‖ p(·|x_ood_adv)), a scalar, from logits (N, K)."""
        return mean_distance_to_uniform(logits_ood)

    # Lightning's hooks.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of clean, adversarial and attacked out-of-distribution images."""
        x, y, x_ood = (self.part(batch, key) for key in ("x_clf", "y_clf", "x_ood"))
        x_adv = self.adversarial_examples(x, y, self.draws_of(batch))
        x_ood_adv = self.ood_adversarial_examples(x_ood, self.draws_of(batch))
        logits = self(torch.cat([x, x_adv, x_ood_adv]))
        logits_clean, logits_adv, logits_ood = logits.split([len(x), len(x), len(x_ood)])
        clean_loss = self.clean_loss(logits_clean, y)
        adversarial_loss = self.classification_loss(logits_adv, y)
        ood_loss = self.ood_loss(logits_ood)
        loss = 0.5 * (clean_loss + adversarial_loss) + 0.5 * self.ood_weight * ood_loss
        scalars = {
            "loss": loss,
            "clean_loss": clean_loss,
            "adversarial_loss": adversarial_loss,
            "ood_loss": ood_loss,
            "accuracy": is_right(logits_clean, y).float().mean(),
            "robust_accuracy": is_right(logits_adv, y).float().mean(),
        }
        self.log_training(scalars, len(x), shown=("loss", "robust_accuracy"))
        return loss


def confident_images(module: EnergyModule, threat_model: ThreatModel, x: Tensor, draws: Tensor | None) -> Tensor:
    """Returns what an attack that raises the confidence of a module makes of images (N, C, H, W), detached."""
    no_class = torch.zeros(len(x), dtype=torch.long, device=x.device)  # the divergence does not look at labels
    attack = Ascent(distance_to_uniform, threat_model, module.attack_rule)
    return module.ascend(attack, x, no_class, mode=module.attack_mode, draws=draws)
