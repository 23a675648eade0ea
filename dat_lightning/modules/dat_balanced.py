"""DAT whose contrastive samples have all classes equally often, so that the energy learns how common classes are."""

import torch
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.curriculum import auc
from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.random_streams import stream_seed
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.ranks import of_all_ranks


class DATBalancedModule(DualAdversarialModule):
    """Minimises the loss of DAT with contrastive samples of uniformly drawn classes, at no further cost.

    The classes of DAT's contrastive samples are those of the images of the same step, so that a rare class is as rare
    on both sides of the energy loss, and E cannot know it. Where chains reach the images of their class,
    q(x | y) = p(x | y), the optimum here is −E(x) = log K p(y) on a class apart from the others: energies differ by how
    common classes are. What is rare within a class stays unseen.

    Override points: those of :class:`DualAdversarialModule`.

    Source: DAT (arXiv 2510.13872), among its open questions.
    """

    _num_classes: int | None = None  # found with the first batch

    # One method per equation.

    @override
    def contrastive_samples(self, x_ood: Tensor, y_gen: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns ``x_ood`` after T steps towards classes of their own, (N, C, H, W), detached.

        The classes are random numbers, of a stream named by each draw's number, modulo K; ``y_gen`` is not looked at.
        """
        if self._num_classes is None:
            self._num_classes = self.energy_model.count_classes(x_ood)
        numbers = range(len(x_ood)) if draws is None else draws.tolist()
        seeds = [stream_seed(self.seed, "contrastive class", number) for number in numbers]
        labels = torch.tensor([seed % self._num_classes for seed in seeds])
        return super().contrastive_samples(x_ood, labels.to(y_gen.device), draws)

    @override
    def separation(self, logits: JointLogits, y_gen: Tensor) -> Tensor:
        """Returns the AUC that tells −E(x_gen) from −E(x_contrast) over the images of all ranks, a scalar."""
        scores = -torch.stack([marginal_energy(part.detach()) for part in (logits.gen, logits.contrast)])
        return auc(*of_all_ranks(scores))
