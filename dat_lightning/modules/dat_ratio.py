"""DAT with RATIO's term: a robust classifier and a generator that is uncertain about out-of-distribution images."""

from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from dat_lightning.core.errors import InputError, require_finite, require_kind
from dat_lightning.core.losses import mean_distance_to_uniform
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.ratio import OOD_ATTACK, confident_images
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel


class DATRatioModule(DualAdversarialModule):
    """Minimises the loss of DAT + λ KL(uniform ‖ p(·|x)) over images x that come from ``x_ood``: open question 1.

    The images are those of RATIO's attack on ``x_ood``, which costs its steps and a training pass, or the ends of the
    contrastive chain, whose logits the step has already. The chain is there for the question whether its images do
    instead; on digits they do not, since they end as images of a class (``docs/pages/results/ratio.md``). In the paper
    RATIO has a factor ½, which λ is without here.

    Override points: :meth:`ood_logits`, :meth:`ood_loss`, and those of :class:`DualAdversarialModule`.

    Logged besides: ``train/ood_loss``, unless λ is 0.

    Args:
        energy_model: The network.
        ood_weight: λ; 0 leaves the term out, which is DAT.
        ood_source: Where its images come from.
        ood_threat_model: The attack on ``x_ood``, in units of [0, 1] pixels; with ``ood_source`` ``chain``, or without
            weight, there is none, and it does nothing.
        shared: The arguments of :class:`DualAdversarialModule`.

    Raises:
        InputError: If ``ood_weight`` is negative or infinite, or ``ood_source`` is unknown.

    Source: DAT (arXiv 2510.13872), among its open questions; Augustin et al. 2020, RATIO (arXiv 2003.09461), Eq. 5.
    """

    def __init__(
        self,
        energy_model: EnergyModel,
        ood_weight: float = 1.0,
        ood_source: Literal["attack", "chain"] = "attack",
        ood_threat_model: ThreatModel = OOD_ATTACK,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        if ood_source not in ("attack", "chain"):
            raise InputError(f"ood_source must be 'attack' or 'chain', got {ood_source!r}")
        require_finite(0, ood_weight=ood_weight)
        require_kind(ThreatModel, ood_threat_model=ood_threat_model)
        self.ood_weight = ood_weight
        self.ood_source = ood_source
        self.ood_threat_model = ood_threat_model

    # One method per equation.

    def ood_logits(self, logits: JointLogits, batch: Batch) -> Tensor:
        """Returns the logits (N, K) of the term's images: the chain's, or those of attacked ``x_ood``."""
        if self.ood_source == "chain":
            return logits.contrast
        x_ood = self.part(batch, "x_ood")
        attacked: Tensor = self(confident_images(self, self.ood_threat_model, x_ood, self.draws_of(batch)))
        return attacked

    def ood_loss(self, logits_ood: Tensor) -> Tensor:
        """Returns the mean of KL(uniform ‖ p(·|x)), a scalar, from logits (N, K)."""
        return mean_distance_to_uniform(logits_ood)

    @override
    def loss_terms(self, logits: JointLogits, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Returns weight and value of each term: those of DAT, and RATIO's."""
        terms = super().loss_terms(logits, batch)
        if self.ood_weight > 0:
            terms["ood_loss"] = (self.ood_weight, self.ood_loss(self.ood_logits(logits, batch)))
        return terms
