"""DAT with a noise-contrastive term: the energy also tells data from a proposal whose density is known."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.errors import InputError, require_finite
from dat_lightning.core.noise_contrastive import TiedGaussians, best_offset
from dat_lightning.core.random_streams import normal_noise, uniform_noise
from dat_lightning.data.draws import EvaluationBatches
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.ranks import of_all_ranks
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel

# Of an image; a covariance has the square of it, which is 1.2 GB here.
MOST_VALUES = 3 * 64 * 64


class DATNoiseContrastiveModule(DualAdversarialModule):
    """Minimises the loss of DAT + λ · min over c of BCE(−s E(x) − log q(x) + c): data against a known proposal q.

    DAT's own optimum has equal energy wherever there are data. That of the term is −s E = log p + constant, with p the
    density of the data, so that E knows common from rare; s says how many nats a unit of energy stands for, and with
    it how far the two pull apart. c, the log of what exp(−s E) would have to be divided by, is the one that is best for
    the batch, of all ranks; it is no parameter.

    ``uniform`` proposals lie in the box [0, 1]^D, where q = 1; they are far from images of more than a few pixels, and
    teach nothing there. ``gaussians`` have one component for each class, with a common covariance, fitted to the
    training images of the DataModule when a fit starts, and images get the noise that this covariance has too: without
    noise every image lies in a subspace that no sample of q ever meets.

    Override points: :meth:`proposals`, :meth:`proposal_log_density`, :meth:`noise_contrastive_loss`, and those of
    :class:`DualAdversarialModule`.

    Logged besides: ``train/nce_loss``, unless λ is 0.

    Args:
        energy_model: The network.
        nce_weight: λ; 0 leaves the term out, which is DAT.
        nce_scale: s, nats of log p per unit of energy.
        proposal: q.
        data_noise: Standard deviation of the noise on images of this term, in units of [0, 1] pixels; for Gaussians
            alone.
        shared: The arguments of :class:`DualAdversarialModule`.

    Raises:
        InputError: If a number is outside its range or the proposal unknown; when a fit starts, if there is no
            DataModule to fit Gaussians to, or its images have more than 12 288 values each.

    Source: Gutmann & Hyvärinen 2010, Eq. 3, for noise-contrastive estimation; DAT (arXiv 2510.13872), among its open
    questions.
    """

    def __init__(
        self,
        energy_model: EnergyModel,
        nce_weight: float = 1.0,
        nce_scale: float = 1.0,
        proposal: Literal["uniform", "gaussians"] = "uniform",
        data_noise: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        require_finite(0, nce_weight=nce_weight, data_noise=data_noise)
        if not 0 < nce_scale < math.inf:
            raise InputError(f"nce_scale must be positive and finite, got {nce_scale}")
        if proposal not in ("uniform", "gaussians") or (proposal == "gaussians") != (data_noise > 0):
            raise InputError(
                "proposal must be 'uniform' without data_noise, which would leave the box, or 'gaussians' with it, got"
                f" {proposal!r} and {data_noise}"
            )
        self.nce_weight, self.nce_scale = nce_weight, nce_scale
        self.proposal, self.data_noise = proposal, data_noise
        # Not in checkpoints: a fit that goes on has the same from the same data.
        self.gaussians: TiedGaussians | None = None

    # One method per equation.

    def proposals(self, draws: Sequence[int], like: Tensor) -> Tensor:
        """Returns images of q, shape of ``like`` (N, C, H, W), from streams named by each draw's number."""
        shape = tuple(like.shape[1:])
        if self.proposal == "uniform":
            return uniform_noise(self.seed, "proposal", draws, shape).to(like)
        component = uniform_noise(self.seed, "proposal component", draws, ())
        noise = normal_noise(self.seed, "proposal", draws, shape)
        return self._fitted(like).sample(component.to(like), noise.to(like))

    def proposal_log_density(self, x: Tensor) -> Tensor:
        """Returns log q, (N,), of images (N, C, H, W)."""
        return x.new_zeros(len(x)) if self.proposal == "uniform" else self._fitted(x).log_prob(x)

    def noise_contrastive_loss(self, logits_data: Tensor, logits_proposal: Tensor) -> Tensor:
        """Returns the BCE that tells data from proposals at the best c, a scalar.

        Args:
            logits_data: −s E − log q of images, (N,).
            logits_proposal: The same of as many proposals, (N,).
        """
        c = best_offset(*of_all_ranks(torch.stack([logits_data.detach(), logits_proposal.detach()])))
        # By the envelope theorem the gradient needs no derivative of c.
        return 0.5 * (F.softplus(-logits_data - c).mean() + F.softplus(logits_proposal + c).mean())

    @override
    def loss_terms(self, logits: JointLogits, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Returns weight and value of each term: those of DAT, and the noise-contrastive one."""
        terms = super().loss_terms(logits, batch)
        if self.nce_weight > 0:
            x = self.part(batch, "x_gen")
            draws = self.draws_of(batch).tolist()
            logits_gen = logits.gen
            if self.data_noise > 0:
                x = x + self.data_noise * normal_noise(self.seed, "data noise", draws, tuple(x.shape[1:])).to(x)
                logits_gen = self(x)
            x_q = self.proposals(draws, x)
            data, proposal = (
                -self.nce_scale * marginal_energy(f) - self.proposal_log_density(images)
                for f, images in ((logits_gen, x), (self(x_q), x_q))
            )
            terms["nce_loss"] = (self.nce_weight, self.noise_contrastive_loss(data, proposal))
        return terms

    # Lightning's hooks.

    @override
    def on_fit_start(self) -> None:
        """Loads the initial weights, and fits the Gaussians.

        Raises:
            InputError: If there is no DataModule with training images to fit them to, or these are too large.
        """
        super().on_fit_start()
        self.gaussians = None
        if self.proposal == "gaussians" and self.nce_weight > 0:
            self.gaussians = TiedGaussians.fitted(*self._training_images(), self.data_noise)

    # Parts.

    def _fitted(self, like: Tensor) -> TiedGaussians:
        # A callback may train before the module's own fit starts, as a search for a learning rate does.
        if self.gaussians is None:
            self.gaussians = TiedGaussians.fitted(*self._training_images(), self.data_noise)
        # From float64 on the CPU, once.
        self.gaussians = self.gaussians.to(like)
        return self.gaussians

    def _training_images(self) -> tuple[Tensor, Tensor]:
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "in_distribution"):
            raise InputError(f"{type(self).__name__} fits Gaussians to the training images of a PairedDataModule")
        images = EvaluationBatches(data.in_distribution("train"), data.evaluation_transform())
        places = range(len(images.dataset))
        first = next((x for place in places for _, x, _ in images.read([place])), None)
        if first is not None and first.numel() > MOST_VALUES:
            raise InputError(
                f"{type(self).__name__} fits Gaussians to images of at most {MOST_VALUES} values, as 3×64×64 pixels"
                f" are, since their covariance has as many squared; got {'×'.join(map(str, first.shape))}"
            )
        batch = images[places]
        if "y" not in batch:
            raise InputError(f"{type(self).__name__} fits Gaussians to classes, and the training images have none")
        return batch["x"], batch["y"]
