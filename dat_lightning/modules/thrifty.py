"""DAT for fewer network evaluations: chains that go on from a buffer, attacks that begin where the last one ended."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import get_size
from typing_extensions import override

from dat_lightning.core.ascent import Ascent, no_trace
from dat_lightning.core.curriculum import auc
from dat_lightning.core.energy import joint_energy
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.random_streams import stream_generator, uniform_noise
from dat_lightning.data.draws import DrawStream
from dat_lightning.data.entries import image_of
from dat_lightning.data.pixel_places import pixel_places
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.ranks import number_of_ranks, of_all_ranks
from dat_lightning.modules.replay_buffer import ReplayBufferModule
from dat_lightning.weights.hub import EnergyModel


class ThriftyDATModule(ReplayBufferModule, DualAdversarialModule):
    """Stage 2 of DAT with ways to evaluate the network less often; each is off by default, and without any it is DAT.

    **Chains that go on.** The buffer has as many places for each class. A contrastive chain of class y begins anew at
    its seed with probability ``restart_share``, and walks T steps; else it goes on from a place of class y, and walks
    ``continued_steps``. Either end takes the place. The AUC of the curriculum is that of chains that began anew: T is
    their length, and samples are such chains. A continued one has walked far more than T steps, over older networks.

    **Warm attacks.** The classification attack of an image begins at the perturbation in which its last one ended,
    carried through the shifts and flips of both draws. All ranks have all perturbations.

    Besides the buffer, a checkpoint has the perturbations; files of weights alone have neither.

    Args:
        energy_model: The network.
        restart_share: Share of chains that begin anew; with 1 there is no buffer.
        continued_steps: Steps of a chain that goes on, T at most.
        buffer_size: Images in the buffer, over all classes and ranks.
        warm_attacks: Whether an attack begins where the last one on the same image ended. The data have to be a
            :class:`~dat_lightning.data.PairedDataModule`, whose augmentation of ``clf`` moves or covers pixels alone.
        shared: The arguments of :class:`DualAdversarialModule`.

    Raises:
        InputError: If a number is outside its range, or ``warm_attacks`` meets a random start; in training, if the
            buffer cannot be shared evenly by classes and ranks, or ``warm_attacks`` has other data.

    Source: DAT (arXiv 2510.13872), of whose open questions it is one; JEM (arXiv 1912.03263) and JEM++ (arXiv
    2109.09032) for chains that go on, ATTA (arXiv 1912.11969) for warm attacks.
    """

    def __init__(
        self,
        energy_model: EnergyModel,
        restart_share: float = 1.0,
        continued_steps: int = 1,
        buffer_size: int = 200,
        warm_attacks: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(energy_model=energy_model, **shared)
        if not 0 <= restart_share <= 1:
            raise InputError(f"restart_share must lie in [0, 1], got {restart_share}")
        require_at_least(0, continued_steps=continued_steps)
        require_at_least(1, buffer_size=buffer_size)
        if warm_attacks and self.threat_model.random_start:
            raise InputError("warm_attacks and threat_model.random_start exclude each other: an attack has one start")
        self.restart_share, self.continued_steps, self.buffer_size = restart_share, continued_steps, buffer_size
        self.warm_attacks = warm_attacks
        self.perturbations: Tensor | None = None  # (images, C, H·W) of the clf stream; like the buffer no buffer
        self._clf_stream: DrawStream | None = None
        self._anew: Tensor | None = None
        self._num_classes = 0

    # One method per equation.

    @override
    def contrastive_samples(self, x_ood: Tensor, y_gen: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the ends of chains that began at ``x_ood`` or in the buffer, (N, C, H, W), detached."""
        steps = self.curriculum.steps_on_host()
        if self.restart_share == 1:
            return self._walked(x_ood, y_gen, draws, steps)
        buffer = self._buffer_of(x_ood)
        numbers = torch.arange(len(x_ood)) if draws is None else draws.cpu()
        places, has_place = self._places(buffer, y_gen, int(numbers[0]))
        old = buffer[places]
        anew = uniform_noise(self.seed, "restart", numbers.tolist(), ()) < self.restart_share
        anew |= ~has_place | ~old.flatten(1).isfinite().all(1).cpu()
        ends = torch.empty_like(x_ood)
        for part, starts, length in ((anew, x_ood, steps), (~anew, old, min(steps, self.continued_steps))):
            if part.any():
                on_device = part.to(x_ood.device)
                ends[on_device] = self._walked(starts[on_device], y_gen[on_device], numbers[part], length)
        buffer[places[has_place]] = ends[has_place.to(x_ood.device)]
        self._anew = anew.to(x_ood.device)
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

    @override
    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the attacked images (N, C, H, W), detached; with ``warm_attacks`` the attack goes on."""
        if not self.warm_attacks:
            return super().adversarial_examples(x, y, draws)
        if draws is None:
            raise InputError("warm_attacks needs numbered draws: the batches of a PairedDataModule have them")
        stream, numbers = self._stream(), draws.tolist()
        height, width = get_size(image_of(stream.dataset[0]))
        shape = (stream.size, x.shape[1], height * width)
        if self.perturbations is None or self.perturbations.shape != shape:
            self.perturbations = x.new_zeros(shape)
        self.perturbations = self.perturbations.to(x)  # those of a checkpoint are elsewhere
        indices = torch.tensor([stream.index(number) for number in numbers], device=x.device)
        # Where a pixel has no place it begins and ends in one behind the others.
        places = pixel_places(stream, numbers, (height, width)).to(x.device).unsqueeze(1).expand(-1, x.shape[1], -1)
        padded = torch.nn.functional.pad(self.perturbations[indices], (0, 1))
        places = torch.where(places < 0, padded.shape[2] - 1, places)
        attack = Ascent(self.attack_objective, self.threat_model, self.attack_rule)
        x_adv = self.ascend(attack, x, y, start=x + padded.gather(2, places).view_as(x), draws=draws)
        ends = padded.scatter(2, places, (x_adv - x).flatten(2))[:, :, :-1]
        self._keep(self.perturbations, indices, ends)
        return x_adv

    # State between steps.

    @override
    def first_images(self, places: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Returns NaN, (N, *shape): places from which no chain can go on."""
        return torch.full((len(places), *shape), torch.nan)

    @override
    def on_fit_start(self) -> None:
        """Loads the initial weights; another run may have other data, and attacks that begin anew."""
        super().on_fit_start()
        self._clf_stream = None
        if self.trainer.ckpt_path is None:
            self.perturbations = None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds buffer and perturbations, unless it is a file of weights alone; every rank takes part."""
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint and self.perturbations is not None:
            checkpoint["perturbations"] = self.perturbations.cpu()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes buffer and perturbations."""
        super().on_load_checkpoint(checkpoint)
        self.perturbations = checkpoint.get("perturbations")

    # Parts.

    def _walked(self, x: Tensor, y: Tensor, draws: Tensor | None, steps: int) -> Tensor:
        """The ends of chains of so many steps."""
        chain = replace(self.contrastive_chain, num_steps=steps)
        return self.ascend(Ascent(self.contrastive_objective, chain, self.contrastive_rule), x, y, draws=draws)

    def _places(self, buffer: Tensor, y: Tensor, name: int) -> tuple[Tensor, Tensor]:
        """A place in this rank's share of the buffer for each label, no two the same; and whether there is one."""
        if not self._num_classes:
            with torch.no_grad(), no_trace(self.energy_model):
                self._num_classes = self.energy_model(buffer[:1].nan_to_num()).shape[1]
        classes, ranks = self._num_classes, self.trainer.world_size
        if self.buffer_size % (classes * ranks):
            raise InputError(
                f"buffer_size must be a multiple of classes times processes, {classes} · {ranks}, got"
                f" {self.buffer_size}"
            )
        share = self.buffer_size // classes // ranks
        order = torch.randperm(share, generator=stream_generator(self.seed, "chains", name))
        mine = torch.nn.functional.one_hot(y.cpu(), classes)
        number = (mine.cumsum(0) * mine).sum(1) - 1  # of those before it that have the same label
        return y.cpu() * share + order[number.clamp_max(share - 1)], number < share

    def _stream(self) -> DrawStream:
        """The draws of ``x_clf``."""
        if self._clf_stream is None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            make = getattr(data, "training_stream", None)
            stream = None if make is None else make("clf")
            if not isinstance(stream, DrawStream):
                raise InputError(
                    "warm_attacks needs data whose x_clf are draws of one data set: a PairedDataModule without"
                    f" generated images, got {type(data).__name__}"
                )
            self._clf_stream = stream
        return self._clf_stream

    def _keep(self, perturbations: Tensor, indices: Tensor, ends: Tensor) -> None:
        """Puts the perturbations of all ranks in their places."""
        if number_of_ranks() > 1:
            indices, ends = (cast(Tensor, self.all_gather(part)).flatten(0, 1) for part in (indices, ends))
        # At the end of a pass a batch may have an image twice: its last one counts, on all devices.
        rows = {index: row for row, index in enumerate(indices.tolist())}
        # What is not finite, in a step that a guard skips, would come back in each pass.
        perturbations[list(rows)] = ends[list(rows.values())].nan_to_num(0.0, 0.0, 0.0)
