"""The equations that all modules share: energy model, attack, classification loss, and what evaluation measures."""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from dat_lightning.core.ascent import Ascent, AttackMode
from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.errors import require_choice, require_kind
from dat_lightning.core.losses import energy_gradient_norm, is_right, robust_cross_entropy
from dat_lightning.core.objectives import cross_entropy
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.core.update_rules import Steepest, UpdateRule
from dat_lightning.modules.trained import Batch, TrainedModule
from dat_lightning.weights.hub import EnergyModel


class EnergyModule(TrainedModule):
    """Trains an :class:`~dat_lightning.weights.EnergyModel`; subclasses say how, by their ``training_step``.

    Override points: :meth:`attack_objective` (what the classification attack climbs), :meth:`adversarial_examples`
    (how), :meth:`classification_loss` (what is minimised there), :meth:`evaluation_metrics` (what validation and test
    log).

    Logged: ``{val,test}/{loss, accuracy, robust_accuracy, energy, r1}``; exact over any number of ranks.

    Args:
        energy_model: The network.
        threat_model: The attack in training.
        eval_threat_model: The attack of ``robust_accuracy``; by default the one in training.
        attack_mode: Whether the attack in training sees the network in eval mode, or in the mode it trains in, where
            batch norm uses the batch's statistics; running statistics never change through an attack.
        attack_rule: How the attack in training makes its steps; the one of evaluation is always steepest.
        seed: Seed of random starts.
        shared: The arguments of :class:`~dat_lightning.modules.trained.TrainedModule`: optimiser, weights, execution.

    Source: DAT (arXiv 2510.13872); Madry et al. 2018 (arXiv 1706.06083).
    """

    def __init__(
        self,
        energy_model: EnergyModel,
        threat_model: ThreatModel = ThreatModel(),
        eval_threat_model: ThreatModel | None = None,
        attack_mode: AttackMode = "eval",
        attack_rule: UpdateRule = Steepest(),
        seed: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        require_kind(ThreatModel, threat_model=threat_model, eval_threat_model=eval_threat_model or threat_model)
        require_kind(UpdateRule, attack_rule=attack_rule)
        require_choice(get_args(AttackMode), attack_mode=attack_mode)
        self.threat_model = threat_model
        self.eval_threat_model = eval_threat_model or threat_model
        self.attack_mode: AttackMode = attack_mode
        self.attack_rule = attack_rule
        self.seed = seed

    # One method per equation.

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits f(x), (N, K), of images (N, C, H, W) in [0, 1]."""
        self.count_evaluations(x, 3 if torch.is_grad_enabled() else 1)
        logits: Tensor = self.network_forms.for_passes(self.energy_model)(x)
        return logits

    def attack_objective(self, logits: Tensor, y: Tensor) -> Tensor:
        """Returns what the attack on the classification climbs, (N,): the cross-entropy."""
        return cross_entropy(logits, y)

    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the images that :attr:`threat_model` reaches from ``x`` (N, C, H, W), detached.

        Args:
            x: Images in [0, 1].
            y: True labels, (N,).
            draws: Global numbers of the examples, (N,), which name the streams of a random start.
        """
        attack = Ascent(self.attack_objective, self.threat_model, self.attack_rule)
        return self.ascend(attack, x, y, mode=self.attack_mode, draws=draws)

    def classification_loss(self, logits_adv: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross-entropy at adversarial examples, a scalar."""
        return robust_cross_entropy(logits_adv, y)

    def evaluation_metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the per-example values, each (N,), whose means validation and test log."""
        x, y = self.part(batch, "x"), self.part(batch, "y")
        logits = self(x)
        x_adv = self.ascend(Ascent(cross_entropy, self.eval_threat_model), x, y, draws=batch.get("index"))
        return {
            "loss": cross_entropy(logits, y),
            "accuracy": is_right(logits, y).float(),
            "robust_accuracy": is_right(self(x_adv), y).float(),
            "energy": marginal_energy(logits),
            "r1": self.energy_gradient_norm(x),
        }

    def energy_gradient_norm(self, x: Tensor) -> Tensor:
        """Returns ‖∇ₓE(x)‖² of each image, (N,), without a graph; works where gradients are off."""
        with torch.inference_mode(False), torch.enable_grad():
            # Not self: a compiled graph has no second derivatives.
            return energy_gradient_norm(self.energy_model, x.clone()).detach()

    def ascend(
        self,
        ascent: Ascent,
        x: Tensor,
        y: Tensor,
        *,
        mode: AttackMode = "eval",
        start: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Returns the end of an ascent on the network, shape of ``x``, detached, and counts its evaluations.

        Network, precision and seed are the module's; see :meth:`~dat_lightning.core.Ascent.snapshots` for the rest.
        """
        self.count_evaluations(x, ascent.network_evaluations())
        # A folded form has no train mode.
        network = self.ascent_network() if mode == "eval" else self.network_forms.for_passes(self.energy_model)
        dtype = self.execution.attack_dtype(x.device)
        return ascent(network, x, y, start=start, mode=mode, draws=draws, seed=self.seed, autocast_dtype=dtype)

    def ascent_network(self) -> nn.Module:
        """Returns the network that ascents in eval mode climb, in its fastest form, with current weights.

        Raises:
            InputError: If batch norm is to be folded, and cannot be.
        """
        return self.network_forms.for_ascents(self.energy_model)
