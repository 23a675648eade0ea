"""DAT whose contrastive chains go on from a buffer, as those of JEM do."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.ascent import Ascent
from dat_lightning.core.curriculum import auc
from dat_lightning.core.energy import joint_energy
from dat_lightning.core.errors import InputError, require_counts
from dat_lightning.core.random_streams import stream_generator, uniform_noise
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.ranks import number_of_ranks, of_all_ranks
from dat_lightning.modules.replay_buffer import ReplayBufferModule
from dat_lightning.weights.hub import EnergyModel


class DATContinuedChainsModule(ReplayBufferModule, DualAdversarialModule):
    """Stage 2 of DAT whose contrastive chains go on from a buffer, or begin anew.

    The buffer has as many places for each class. A contrastive chain of class y begins anew at its seed with
    probability ``restart_share``, and walks T steps; else it goes on from a place of class y, and walks
    ``continued_steps``. Either end takes the place. The AUC of the curriculum is that of chains that began anew: T is
    their length, and samples are such chains. A continued one has walked far more than T steps, over older networks.

    Args:
        energy_model: The network.
        restart_share: Share of chains that begin anew, in (0, 1]: T is moved by them alone. With 1 there is no buffer,
            and it is DAT.
        continued_steps: Steps of a chain that goes on, T at most.
        buffer_size: Images in the buffer, over all classes and ranks.
        shared: The arguments of :class:`DualAdversarialModule`.

    Raises:
        InputError: If a number is outside its range; in training, if the buffer cannot be shared evenly by classes and
            ranks, or that of the checkpoint has other images.

    Source: DAT (arXiv 2510.13872), of whose open questions it is one; JEM (arXiv 1912.03263) and JEM++ (arXiv
    2109.09032) for chains that go on.
    """

    def __init__(
        self,
        energy_model: EnergyModel,
        restart_share: float = 0.25,
        continued_steps: int = 1,
        buffer_size: int = 200,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        if not 0 < restart_share <= 1:
            raise InputError(f"restart_share must lie in (0, 1], got {restart_share}")
        require_counts(0, continued_steps=continued_steps)
        require_counts(1, buffer_size=buffer_size)
        self.restart_share, self.continued_steps, self.buffer_size = restart_share, continued_steps, buffer_size
        self._filled = torch.empty(0, dtype=torch.bool)  # on the host, by place of this rank's share
        self._anew: Tensor | None = None
        self._num_classes = 0

    # One method per equation.

    @override
    def contrastive_samples(self, x_ood: Tensor, y_gen: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the ends of chains that began at ``x_ood`` or in the buffer, (N, C, H, W), detached."""
        if self.restart_share == 1:
            return super().contrastive_samples(x_ood, y_gen, draws)
        buffer, device = self._buffer_of(x_ood), x_ood.device
        # Chains are shared out on the host, which needs the classes: the one wait of a step, for T as well.
        steps, *labels = torch.cat([self.curriculum.num_steps.reshape(1), y_gen]).tolist()
        draws = torch.arange(len(x_ood)) if draws is None else draws.cpu()
        numbers = draws.tolist()
        places, has_place = self._places(buffer, torch.tensor(labels), numbers[0])
        anew = uniform_noise(self.seed, "restart", numbers, ()) < self.restart_share
        anew |= ~has_place | ~self._filled[places]
        ends = torch.empty_like(x_ood)
        for part, length in ((anew, steps), (~anew, min(steps, self.continued_steps))):
            rows = part.nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            there, olds = move_data_to_device((rows, places[rows]), device)
            chain = replace(self.contrastive_chain, num_steps=length)
            ascent = Ascent(self.contrastive_objective, chain, self.contrastive_rule)
            starts = x_ood[there] if part is anew else buffer[olds]
            ends[there] = self.ascend(ascent, starts, y_gen[there], draws=draws[rows])
        rows = has_place.nonzero().squeeze(1)
        there, olds, self._anew = move_data_to_device((rows, places[rows], anew), device)
        # What is not finite, in a step that a guard skips, would go on to be that.
        buffer[olds] = ends[there].nan_to_num(0.0, 0.0, 0.0)
        self._filled[places[rows]] = True
        return ends

    @override
    def separation(self, logits: JointLogits, y_gen: Tensor) -> Tensor:
        """Returns the AUC that tells real images from the chains of all ranks that began anew, NaN if none did."""
        if self._anew is None:
            return super().separation(logits, y_gen)
        real, contrast = (-joint_energy(part.detach(), y_gen) for part in (logits.gen, logits.contrast))
        # NaN is neither above nor equal: those that went on do not count. A choice by index would wait for the device.
        real, contrast = of_all_ranks(torch.stack([real, contrast.masked_fill(~self._anew, torch.nan)]))
        share: Tensor = contrast.isfinite().float().mean()
        return auc(real, contrast) / share

    # State between steps.

    @override
    def first_images(self, places: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Returns NaN, (N, *shape): places from which no chain can go on."""
        return torch.full((len(places), *shape), torch.nan)

    # Parts.

    @override
    def _buffer_of(self, x: Tensor) -> Tensor:
        """This rank's share of the buffer; which of its places are filled is looked up once."""
        is_new = self.replay_buffer is None
        buffer = super()._buffer_of(x)
        if is_new:
            self._filled = buffer.flatten(1).isfinite().all(1).cpu()
        return buffer

    def _places(self, buffer: Tensor, y: Tensor, name: int) -> tuple[Tensor, Tensor]:
        """A place in this rank's share of the buffer for each label, no two the same; and whether there is one."""
        if not self._num_classes:
            self._num_classes = self.energy_model.count_classes(buffer[:1].nan_to_num())
        classes, ranks = self._num_classes, number_of_ranks()
        if self.buffer_size % (classes * ranks):
            raise InputError(
                f"buffer_size must be a multiple of classes times processes, {classes} · {ranks}, got"
                f" {self.buffer_size}"
            )
        share = self.buffer_size // classes // ranks
        order = torch.randperm(share, generator=stream_generator(self.seed, "chains", name))
        mine = torch.nn.functional.one_hot(y, classes)
        number = (mine.cumsum(0) * mine).sum(1) - 1  # of those before it that have the same label
        return y * share + order[number.clamp_max(share - 1)], number < share
