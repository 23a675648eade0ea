"""AT-EBM: an energy without classes, trained by telling images from what adversarial chains make of others."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.errors import InputError
from dat_lightning.core.objectives import negative_marginal_energy
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel


class ATEBMModule(DualAdversarialModule):
    """Minimises BCE on −E(x) plus the R1 penalty, for a network of one logit −E(x): AT-EBM.

    It is Stage 2 of DAT without classes: the chain climbs −E(x), the curriculum's AUC compares energies, and there is
    neither a classification term nor its attack. Labels of the data are not looked at. Batch norm is frozen, so that
    without initial weights there is none but for its affine parameters. Batches need ``x_gen`` and ``x_ood``.

    Override points: those of :class:`DualAdversarialModule` but the classification's and :meth:`loss_terms`.

    Logged: ``train/{loss, energy_loss, r1_penalty, energy_real, energy_contrast, auc, contrastive_steps}`` and
    ``{val,test}/{energy, r1}``.

    Args:
        energy_model: The network, whose ``num_classes`` is 1.
        r1_weight: Weight of the R1 penalty on ``x_gen``; the paper's is 0.01 at 32×32, and 30 to 100 at 256×256.
        shared: The arguments of :class:`DualAdversarialModule` but ``classification_weight``; ``threat_model``,
            ``eval_threat_model`` and ``attack_rule`` do nothing.

    Raises:
        InputError: If a weight is negative; with a batch, if the network has more than one logit.

    Source: Yin, Li & Rohde 2020 (arXiv 2012.06568).
    """

    training_parts = ("x_gen", "x_ood")
    evaluation_parts = ("x",)

    def __init__(self, energy_model: EnergyModel, r1_weight: float = 0.01, **shared: Any) -> None:
        super().__init__(energy_model=energy_model, r1_weight=r1_weight, classification_weight=0.0, **shared)

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
    def contrastive_objective(self, logits: Tensor, y: Tensor) -> Tensor:
        """Returns what the contrastive chain climbs, (N,): −E(x)."""
        return negative_marginal_energy(logits, y)

    @override
    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns ``x``: nothing is attacked."""
        return x

    @override
    def evaluation_metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Returns E(x) and ‖∇ₓE(x)‖² of each image, (N,) each."""
        x = self.part(batch, "x")
        return {"energy": marginal_energy(self(x)), "r1": self.energy_gradient_norm(x)}

    @override
    def loss_terms(self, logits: JointLogits, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Returns weight and value of the energy loss and of the R1 penalty."""
        terms = {"energy_loss": (self.energy_weight, self.energy_loss(logits))}
        if self.r1_weight > 0:
            terms["r1_penalty"] = (self.r1_weight, self.regularization(self.part(batch, "x_gen")))
        return terms

    # Lightning's hooks.

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the weighted loss of one step, and moves the curriculum: Stage 2 with nothing to classify."""
        x_gen, x_ood = self.part(batch, "x_gen"), self.part(batch, "x_ood")
        only_class = torch.zeros(len(x_ood), dtype=torch.long, device=x_ood.device)
        nothing = {"x_clf": x_gen[:0], "y_clf": only_class[:0]}
        return super().training_step({**batch, "y_gen": only_class, **nothing}, batch_idx)

    @override
    def log_training(self, scalars: Mapping[str, Tensor], batch_size: int, shown: Collection[str]) -> None:
        """Logs all but the robust accuracy, of which there is none."""
        super().log_training({k: v for k, v in scalars.items() if k != "robust_accuracy"}, batch_size, shown)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns ``index`` and ``energy`` of each image, (N,) each: there is no class to predict."""
        found = super().predict_step(batch, batch_idx)
        return {name: found[name] for name in ("index", "energy")}
