"""Stage 1: adversarial training of a robust classifier."""

from torch import Tensor

from dat_lightning.core.losses import is_right
from dat_lightning.modules.base import EnergyModule
from dat_lightning.modules.trained import Batch


class RobustClassifierModule(EnergyModule):
    """Minimises the cross-entropy at adversarial examples: Stage 1 of DAT.

    Batch norm trains as usual. The attack sees the network in ``attack_mode`` and leaves running statistics alone.

    Override points: those of :class:`EnergyModule`. Batches need ``x_clf`` and ``y_clf``.

    Logged besides: ``train/{loss, robust_accuracy}``.

    Source: Madry et al. 2018 (arXiv 1706.06083), Eq. 2.1; DAT (arXiv 2510.13872), the first stage of its training.
    """

    trains_batch_norm = True
    training_parts = ("x_clf", "y_clf")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss at adversarial examples of ``x_clf``."""
        x, y = self.part(batch, "x_clf"), self.part(batch, "y_clf")
        logits = self(self.adversarial_examples(x, y, self.draws_of(batch)))
        loss = self.classification_loss(logits, y)
        robust_accuracy = is_right(logits, y).float().mean()
        scalars = {"loss": loss, "robust_accuracy": robust_accuracy}
        self.log_training(scalars, len(x), shown=("loss", "robust_accuracy"))
        return loss
