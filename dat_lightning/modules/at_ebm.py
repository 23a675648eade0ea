"""AT-EBM: an energy without classes, trained by telling images from what adversarial chains make of others."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.errors import InputError
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.core.update_rules import Steepest
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.ranks import number_of_ranks
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel


class ATEBMModule(DualAdversarialModule):
    """Minimises BCE on −E(x) plus the R1 penalty, for a network of one logit −E(x): AT-EBM.

    The energy's half of a Stage-2 step: chain, BCE, R1 and curriculum are those of :class:`DualAdversarialModule`, for
    the one class; nothing is classified or attacked. Labels of the data are not looked at. Batch norm is frozen, so
    that without initial weights there is none but for its affine parameters. Batches need ``x_gen`` and ``x_ood``.

    Override points: ``contrastive_objective``, ``contrastive_samples``, ``energy_loss``, ``regularization``,
    ``separation``, :meth:`evaluation_metrics`.

    Logged: ``train/{loss, energy_loss, r1_penalty, energy_real, energy_contrast, auc, contrastive_steps}`` and
    ``{val,test}/{energy, r1}``.

    Args:
        energy_model: The network, whose ``num_classes`` is 1.
        r1_weight: Weight of the R1 penalty on ``x_gen``; the paper's is 0.01 at 32×32, and 30 to 100 at 256×256.
        shared: The arguments of :class:`DualAdversarialModule` but those of the classification and of attacks:
            ``classification_weight``, ``threat_model``, ``eval_threat_model``, ``attack_rule``.

    Raises:
        InputError: If a weight is negative or infinite; with a batch, if the network has more than one logit.

    Source: Yin, Li & Rohde 2020 (arXiv 2012.06568).
    """

    training_parts = ("x_gen", "x_ood")
    evaluation_parts = ("x",)

    def __init__(self, energy_model: EnergyModel, r1_weight: float = 0.01, **shared: Any) -> None:
        # Named here, what does nothing is no argument.
        super().__init__(
            energy_model=energy_model,
            r1_weight=r1_weight,
            classification_weight=0.0,
            threat_model=ThreatModel(),
            eval_threat_model=None,
            attack_rule=Steepest(),
            **shared,
        )
        # Callbacks that would attack a classification with it find none.
        del self.eval_threat_model

    # One method per equation.

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Returns the logit −E(x), (N, 1), of images (N, C, H, W) in [0, 1].

        Raises:
            InputError: If there are several.
        """
        logits = super().forward(x)
        if logits.shape[1] != 1:
            raise InputError(
                f"{type(self).__name__} needs a network of one logit, got {logits.shape[1]}: set the backbone's"
                " num_classes to 1"
            )
        return logits

    @override
    def evaluation_metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Returns E(x) and ‖∇ₓE(x)‖² of each image, (N,) each."""
        x = self.part(batch, "x")
        return {"energy": marginal_energy(self(x)), "r1": self.energy_gradient_norm(x)}

    # Lightning's hooks.

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the weighted loss of one step, and moves the curriculum: that of Stage 2 without a classification."""
        x_gen, x_ood = self.part(batch, "x_gen"), self.part(batch, "x_ood")
        only_class = torch.zeros(len(x_gen), dtype=torch.long, device=x_gen.device)
        # Someone may have called train() on a single layer.
        self.energy_model.freeze_batch_norm()
        x_contrast = self.contrastive_samples(x_ood, only_class, self.draws_of(batch))
        gen, contrast = self.joint_logits(x_gen, x_contrast)
        logits = JointLogits(gen, contrast, adv=gen[:0])
        energy_loss = self.energy_loss(logits)
        separation = self.separation(logits, only_class)
        loss = self.energy_weight * energy_loss
        scalars = {
            "energy_loss": energy_loss,
            "auc": separation,
            "contrastive_steps": self.curriculum.num_steps.float(),
            "energy_real": marginal_energy(gen).mean(),
            "energy_contrast": marginal_energy(contrast).mean(),
        }
        if self.r1_weight > 0:
            scalars["r1_penalty"] = self.regularization(x_gen)
            loss = loss + self.r1_weight * scalars["r1_penalty"]
        self.log_training({**scalars, "loss": loss}, len(x_gen), shown=("loss", "contrastive_steps", "auc"))
        self.curriculum.update(separation, len(x_gen) * number_of_ranks())
        return loss

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns ``index`` and ``energy`` of each image, (N,) each: there is no class to predict."""
        found = super().predict_step(batch, batch_idx)
        return {name: found[name] for name in ("index", "energy")}
