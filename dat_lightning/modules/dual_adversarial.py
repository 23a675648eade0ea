"""Stage 2: joint training of a robust classifier and an energy-based generator."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dat_lightning.core.ascent import Ascent, unbounded_ascent
from dat_lightning.core.curriculum import AUCCurriculum, auc
from dat_lightning.core.energy import joint_energy, marginal_energy
from dat_lightning.core.errors import InputError, require_finite, require_kind
from dat_lightning.core.losses import energy_bce, is_right, r1_penalty
from dat_lightning.core.objectives import targeted_logit
from dat_lightning.core.update_rules import Steepest, UpdateRule
from dat_lightning.modules.base import EnergyModule
from dat_lightning.modules.ranks import number_of_ranks, of_all_ranks
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel


class JointLogits(NamedTuple):
    """Logits, (N, K) each, of the three images that enter the loss of one step."""

    gen: Tensor
    contrast: Tensor
    adv: Tensor


class DualAdversarialModule(EnergyModule):
    """Minimises energy BCE plus robust cross-entropy: Stage 2 of DAT.

    Batch norm is frozen: running statistics stay as Stage 1 left them, affine parameters train. Both attacks see the
    network in eval mode. Batches need ``x_gen, y_gen, x_clf, y_clf, x_ood``.

    Override points: :meth:`contrastive_objective` and :meth:`contrastive_samples` (the chain), :meth:`energy_loss`
    (BCE), :meth:`regularization` (R1), :meth:`loss_terms` (their sum), :meth:`separation` (the curriculum's AUC), and
    those of :class:`EnergyModule`.

    Logged besides: ``train/{loss, energy_loss, classification_loss, robust_accuracy, energy_real, energy_contrast, auc,
    contrastive_steps}``, with ``r1_weight`` also ``train/r1_penalty``.

    Args:
        energy_model: The network.
        curriculum: The number of contrastive steps T, which it moves.
        contrastive_step_size: η, the L2 length of one contrastive step.
        contrastive_rule: How contrastive steps are made.
        energy_weight: Weight of the energy loss.
        energy_level: The energy that BCE tells real from contrastive images by. Stage 1 leaves the energies of images
            anywhere; with a level among them the first steps need not move all of them, and the classifier with them.
        classification_weight: Weight of the robust cross-entropy.
        r1_weight: Weight of the R1 penalty on ``x_gen``; 0 leaves it out.
        merge_forwards: Whether the three loss terms share one forward pass; exact with frozen batch norm, at the price
            of three batches' activations at a time.
        shared: The arguments of :class:`EnergyModule` but ``attack_mode``, which is eval here.

    Raises:
        InputError: If a weight is negative or infinite, or ``energy_level`` not finite.

    Source: DAT (arXiv 2510.13872), the second stage of its training.
    """

    trains_energy = True

    def __init__(
        self,
        energy_model: EnergyModel,
        curriculum: AUCCurriculum | None = None,
        contrastive_step_size: float = 0.1,
        contrastive_rule: UpdateRule = Steepest(),
        energy_weight: float = 1.0,
        energy_level: float = 0.0,
        classification_weight: float = 1.0,
        r1_weight: float = 0.0,
        merge_forwards: bool = True,
        **shared: Any,
    ) -> None:
        if "attack_mode" in shared:
            raise TypeError(f"{type(self).__name__} has no argument 'attack_mode': its attack sees eval mode")
        super().__init__(energy_model=energy_model, attack_mode="eval", **shared)
        require_finite(0, energy_weight=energy_weight, classification_weight=classification_weight, r1_weight=r1_weight)
        if not math.isfinite(energy_level):
            raise InputError(f"energy_level must be a finite number, got {energy_level}")
        require_kind(UpdateRule, contrastive_rule=contrastive_rule)
        self.curriculum: AUCCurriculum = curriculum if curriculum is not None else AUCCurriculum()
        require_kind(AUCCurriculum, curriculum=self.curriculum)
        self.contrastive_chain, self.contrastive_rule = unbounded_ascent(contrastive_step_size, 0), contrastive_rule
        self.energy_weight, self.energy_level = energy_weight, energy_level
        self.classification_weight, self.r1_weight = classification_weight, r1_weight
        self.merge_forwards = merge_forwards
        self.energy_model.freeze_batch_norm()

    # One method per equation.

    def contrastive_objective(self, logits: Tensor, y: Tensor) -> Tensor:
        """Returns what the contrastive chain climbs, (N,): f(x)[y] = −E(x, y)."""
        return targeted_logit(logits, y)

    def contrastive_samples(self, x_ood: Tensor, y_gen: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns ``x_ood`` after T steps towards the classes ``y_gen``, (N, C, H, W), detached.

        Args:
            x_ood: The seeds.
            y_gen: The classes, (N,).
            draws: Global numbers of the examples, (N,), which name the streams of a rule with noise.
        """
        # The loop's length has to be known on the host: the one synchronisation of a step. DivergenceGuard shares it.
        chain = replace(self.contrastive_chain, num_steps=self.curriculum.steps_on_host())
        return self.ascend(Ascent(self.contrastive_objective, chain, self.contrastive_rule), x_ood, y_gen, draws=draws)

    def joint_logits(self, *images: Tensor) -> Sequence[Tensor]:
        """Returns the logits (N, K) of each part of the images, from one forward pass, or one for each part."""
        if not self.merge_forwards:
            return [self(x) for x in images]
        logits: Sequence[Tensor] = self(torch.cat(images)).split([len(x) for x in images])
        return logits

    def energy_loss(self, logits: JointLogits) -> Tensor:
        """Returns the BCE that lowers the energy of real images and raises that of contrastive ones, a scalar."""
        return energy_bce(*(marginal_energy(part) - self.energy_level for part in (logits.gen, logits.contrast)))

    def regularization(self, x_gen: Tensor) -> Tensor:
        """Returns ½E‖∇ₓE(x_gen)‖², a scalar."""
        # An input gradient that is trained through, which forward() does not see.
        self.count_evaluations(x_gen, 2 * 3)
        # Not self: a compiled graph has no second derivatives.
        return r1_penalty(self.energy_model, x_gen)

    def separation(self, logits: JointLogits, y_gen: Tensor) -> Tensor:
        """Returns the AUC that tells f(x_gen)[y] from f(x_contrast)[y] over the images of all ranks, a scalar.

        The reference implementation averages the ranks' own AUCs instead, which depends on how many ranks there are.
        Ranks must have equally many images, as those of :class:`~dat_lightning.data.PairedDataModule` do.
        """
        scores = -torch.stack([joint_energy(part.detach(), y_gen) for part in (logits.gen, logits.contrast)])
        return auc(*of_all_ranks(scores))

    def loss_terms(self, logits: JointLogits, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Returns weight and value, a scalar, of each term of the loss, by the name that it is logged with."""
        adversarial = self.classification_loss(logits.adv, self.part(batch, "y_clf"))
        terms = {"energy_loss": (self.energy_weight, self.energy_loss(logits))}
        terms["classification_loss"] = (self.classification_weight, adversarial)
        if self.r1_weight > 0:
            terms["r1_penalty"] = (self.r1_weight, self.regularization(self.part(batch, "x_gen")))
        return terms

    # Lightning's hooks.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the weighted loss of one step, and moves the curriculum."""
        x_gen, y_gen = self.part(batch, "x_gen"), self.part(batch, "y_gen")
        x_clf, y_clf = self.part(batch, "x_clf"), self.part(batch, "y_clf")
        # Someone may have called train() on a single layer.
        self.energy_model.freeze_batch_norm()
        x_contrast = self.contrastive_samples(self.part(batch, "x_ood"), y_gen, self.draws_of(batch))
        x_adv = self.adversarial_examples(x_clf, y_clf, self.draws_of(batch))
        logits = JointLogits(*self.joint_logits(x_gen, x_contrast, x_adv))
        terms = self.loss_terms(logits, batch)
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        separation = self.separation(logits, y_gen)
        scalars = {
            **{name: term for name, (_, term) in terms.items()},
            "loss": loss,
            "auc": separation,
            "contrastive_steps": self.curriculum.num_steps.float(),
            "energy_real": marginal_energy(logits.gen).mean(),
            "energy_contrast": marginal_energy(logits.contrast).mean(),
            "robust_accuracy": is_right(logits.adv, y_clf).float().mean(),
        }
        self.log_training(scalars, len(x_gen), shown=("loss", "contrastive_steps", "auc"))
        self.curriculum.update(separation, len(x_gen) * number_of_ranks())
        return loss
