"""JEM: a classifier whose energy is trained by maximum likelihood, with Langevin chains from a replay buffer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.ascent import Ascent, unbounded_ascent
from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.errors import InputError, TrainingFailureError, require_at_least, require_counts
from dat_lightning.core.losses import energy_difference, is_right
from dat_lightning.core.objectives import negative_marginal_energy
from dat_lightning.core.random_streams import normal_noise, stream_generator, uniform_noise
from dat_lightning.core.update_rules import Langevin
from dat_lightning.modules.ranks import number_of_ranks
from dat_lightning.modules.replay_buffer import ReplayBufferModule
from dat_lightning.modules.trained import Batch
from dat_lightning.weights.hub import EnergyModel

# Steps between looks at the energies, each of which waits for the device.
_CHECK_EVERY = 10


class JEMModule(ReplayBufferModule):
    """Minimises CE(f(x), y) + E_data[E(x)] − E_q[E(x)], with q by Langevin chains that go on from a replay buffer: JEM.

    The buffer begins as uniform noise. Each rank keeps its share of it, on its device; a checkpoint has the whole.
    Batch norm is frozen, so that without initial weights there is none but for its affine parameters, as in the paper.
    Batches need ``x_gen``, ``x_clf`` and ``y_clf``.

    Override points: :meth:`noised`, :meth:`chain_samples`, :meth:`energy_loss`, and those of :class:`EnergyModule`.

    Logged besides: ``train/{loss, energy_loss, classification_loss, accuracy, energy_real, energy_samples}``.

    Args:
        energy_model: The network.
        num_steps: Langevin steps of a chain in each training step.
        step_size: Of x ← x + ``step_size`` · ∇(−E(x)) + ``noise`` · N(0, I), clipped to [0, 1].
        noise: Of the same.
        buffer_size: Images in the buffer, over all ranks.
        restart_share: Share of chains that begin anew from uniform noise.
        data_noise: Standard deviation of the noise on training images.
        energy_weight: Weight of the difference of energies.
        max_energy_gap: The run stops when the two mean energies are further apart than this.
        shared: The arguments of :class:`EnergyModule`; ``optimizer`` is Adam with rate 1e-4 in the paper. There is no
            attack in training: ``threat_model`` is that of evaluation, ``attack_mode`` and ``attack_rule`` do nothing.

    Raises:
        InputError: If a number is outside its range; in training, if the buffer cannot be shared evenly by ranks, or is
            smaller than a batch.
        TrainingFailureError: In training, if it diverges.

    Source: Grathwohl et al. 2020 (arXiv 1912.03263), Eq. 9 and Algorithm 1, where images lie in [−1, 1].
    """

    trains_energy = True
    training_parts = ("x_gen", "x_clf", "y_clf")

    def __init__(
        self,
        energy_model: EnergyModel,
        num_steps: int = 20,
        step_size: float = 1.0,
        noise: float = 0.01,
        buffer_size: int = 10_000,
        restart_share: float = 0.05,
        data_noise: float = 0.03,
        energy_weight: float = 1.0,
        max_energy_gap: float = 1000.0,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        require_counts(1, buffer_size=buffer_size)
        require_at_least(0, data_noise=data_noise, energy_weight=energy_weight)
        if not 0 <= restart_share <= 1:
            raise InputError(f"restart_share must lie in [0, 1], got {restart_share}")
        if not max_energy_gap > 0:
            raise InputError(f"max_energy_gap must be positive, got {max_energy_gap}")
        self.chain = Ascent(negative_marginal_energy, unbounded_ascent(step_size, num_steps), Langevin(noise))
        self.buffer_size, self.restart_share = buffer_size, restart_share
        self.data_noise, self.energy_weight, self.max_energy_gap = data_noise, energy_weight, max_energy_gap
        self.energy_model.freeze_batch_norm()

    # One method per equation.

    @override
    def first_images(self, places: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Returns uniform noise, (N, *shape), from a stream of each place."""
        return uniform_noise(self.seed, "buffer", places, shape)

    def noised(self, x: Tensor, draws: Sequence[int], name: str) -> Tensor:
        """Returns training images with noise, (N, C, H, W), from streams named by each draw's number."""
        return x + self.data_noise * normal_noise(self.seed, f"data noise {name}", draws, tuple(x.shape[1:])).to(x)

    def chain_samples(self, buffer: Tensor, draws: Sequence[int]) -> Tensor:
        """Returns the ends of a chain for each draw, detached, which take their starts' places in the buffer."""
        if len(draws) > len(buffer):
            batch_size = len(draws) * number_of_ranks()
            raise InputError(f"buffer_size must be at least the batch size, {batch_size}, got {self.buffer_size}")
        order = torch.randperm(len(buffer), generator=stream_generator(self.seed, "chains", draws[0]))
        places = order[: len(draws)].to(buffer.device)
        old, noise = buffer[places], uniform_noise(self.seed, "start", draws, tuple(buffer.shape[1:])).to(buffer)
        anew = (uniform_noise(self.seed, "restart", draws, ()) < self.restart_share).to(buffer.device)
        anew |= ~old.flatten(1).isfinite().all(1)
        starts = torch.where(anew.view(-1, 1, 1, 1), noise, old)
        x = self.ascend(self.chain, starts, torch.zeros_like(places), draws=torch.tensor(draws))
        buffer[places] = x
        return x

    def energy_loss(self, energy_data: Tensor, energy_samples: Tensor) -> Tensor:
        """Returns E_data[E(x)] − E_q[E(x)], a scalar, whose gradient is that of the negative log-likelihood."""
        return energy_difference(energy_data, energy_samples)

    # Lightning's hooks.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the weighted loss of one step.

        Raises:
            TrainingFailureError: If the energies of images and samples are too far apart, on any rank.
        """
        x_gen, x_clf, y_clf = (self.part(batch, key) for key in ("x_gen", "x_clf", "y_clf"))
        draws = self.draws_of(batch).tolist()
        samples = self.chain_samples(self._buffer_of(x_gen), draws)
        energy_real = marginal_energy(self(self.noised(x_gen, draws, "gen")))
        energy_samples = marginal_energy(self(samples))
        logits = self(self.noised(x_clf, draws, "clf"))
        energy_loss = self.energy_loss(energy_real, energy_samples)
        classification_loss = self.classification_loss(logits, y_clf)
        loss = classification_loss + self.energy_weight * energy_loss
        scalars = {
            "loss": loss,
            "energy_loss": energy_loss,
            "classification_loss": classification_loss,
            "accuracy": is_right(logits, y_clf).float().mean(),
            "energy_real": energy_real.mean(),
            "energy_samples": energy_samples.mean(),
        }
        self.log_training(scalars, len(x_gen), shown=("loss", "accuracy"))
        self._check_divergence(energy_loss.detach())
        return loss

    # Parts.

    def _check_divergence(self, gap: Tensor) -> None:
        if self.global_step % _CHECK_EVERY:
            return
        largest = self.trainer.strategy.reduce(gap.abs().nan_to_num(torch.inf), reduce_op="max")
        if not largest <= self.max_energy_gap:
            raise TrainingFailureError(
                f"JEM has diverged at step {self.global_step + 1}: mean energies of images and samples are"
                f" {float(largest):.3g} apart, beyond max_energy_gap {self.max_energy_gap:g}, so that chains no longer"
                " reach what the network calls likely. Go on from an earlier checkpoint with a lower learning rate,"
                " more num_steps or more noise"
            )
