"""DAT with a likelihood term near the data: contrastive divergence by short Langevin chains that begin at images."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from dat_lightning.core.ascent import Ascent, unbounded_ascent
from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.errors import require_at_least, require_finite
from dat_lightning.core.losses import energy_difference
from dat_lightning.core.objectives import negative_marginal_energy
from dat_lightning.core.update_rules import Langevin
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel


class DATLikelihoodModule(DualAdversarialModule):
    """Minimises the loss of DAT + λ (E_data[E(x)] − E_q[E(x)]), with q by short Langevin chains from the data.

    The chains' stationary density is proportional to exp(−s E) with s = 2 · step size / noise². As long as they move on
    average towards low energy, the term makes E steeper, and flatter where they move away. Short chains see the shape
    of the density around the data; how much of it lies in modes that none of them leaves, they cannot see.

    Override points: :meth:`chain_samples`, :meth:`likelihood_loss`, and those of :class:`DualAdversarialModule`.

    Logged besides: ``train/likelihood_loss``, unless λ is 0.

    Args:
        energy_model: The network.
        likelihood_weight: λ; 0 leaves the term out, which is DAT.
        likelihood_steps: Langevin steps of a chain.
        likelihood_step_size: Of x ← x + ``likelihood_step_size`` · ∇(−E(x)) + ``likelihood_noise`` · N(0, I), clipped
            to [0, 1].
        likelihood_noise: Of the same.
        shared: The arguments of :class:`DualAdversarialModule`.

    Raises:
        InputError: If a number is outside its range.

    Source: Hinton 2002, contrastive divergence; DAT (arXiv 2510.13872), among its open questions.
    """

    def __init__(
        self,
        energy_model: EnergyModel,
        likelihood_weight: float = 1.0,
        likelihood_steps: int = 10,
        likelihood_step_size: float = 1.0,
        likelihood_noise: float = 0.01,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        require_finite(0, likelihood_weight=likelihood_weight)
        require_at_least(1, likelihood_steps=likelihood_steps)
        chain = unbounded_ascent(likelihood_step_size, likelihood_steps)
        self.likelihood_weight = likelihood_weight
        self.likelihood_chain = Ascent(negative_marginal_energy, chain, Langevin(likelihood_noise))

    # One method per equation.

    def chain_samples(self, x_gen: Tensor, y_gen: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the ends of chains from the images ``x_gen`` (N, C, H, W), detached; of labels makes no use."""
        return self.ascend(self.likelihood_chain, x_gen, y_gen, draws=draws)

    def likelihood_loss(self, energy_data: Tensor, energy_samples: Tensor) -> Tensor:
        """Returns E_data[E(x)] − E_q[E(x)], a scalar, from energies (N,) each."""
        return energy_difference(energy_data, energy_samples)

    @override
    def loss_terms(self, logits: JointLogits, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Returns weight and value of each term: those of DAT, and the likelihood's."""
        terms = super().loss_terms(logits, batch)
        if self.likelihood_weight > 0:
            x_gen, y_gen = self.part(batch, "x_gen"), self.part(batch, "y_gen")
            energy_samples = marginal_energy(self(self.chain_samples(x_gen, y_gen, self.draws_of(batch))))
            likelihood_loss = self.likelihood_loss(marginal_energy(logits.gen), energy_samples)
            terms["likelihood_loss"] = (self.likelihood_weight, likelihood_loss)
        return terms
