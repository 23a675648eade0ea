"""DAT for fewer network evaluations: attacks that begin where the last one on the same image ended."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.ascent import Ascent
from dat_lightning.core.errors import InputError
from dat_lightning.data.draws import DrawStream
from dat_lightning.data.pixel_places import image_size, pixel_places
from dat_lightning.modules.checks import check_entry, check_entry_shape
from dat_lightning.modules.dual_adversarial import DualAdversarialModule
from dat_lightning.modules.ranks import gathered
from dat_lightning.weights.hub import EnergyModel


class DATWarmAttacksModule(DualAdversarialModule):
    """Stage 2 of DAT, whose classification attack of an image begins where its last one ended.

    It begins at the perturbation in which the last attack on the image ended, carried through the shifts and flips of
    both draws; in the first pass at the image itself. So fewer steps do: over the passes they add up.

    The data have to be a :class:`~dat_lightning.data.PairedDataModule` with images of one size, whose augmentation of
    ``clf`` moves or covers pixels alone. What stands in for a corrupt image shares that image's perturbation.

    All ranks have all perturbations, float32, images × C × H × W of them, on the device that trains, and so has every
    checkpoint that is not one of weights alone: 614 MB for CIFAR-10. Where that is too much, take
    :class:`DualAdversarialModule` with more steps of the attack.

    Args:
        energy_model: The network.
        shared: The arguments of :class:`DualAdversarialModule`; its ``threat_model`` has no random start.

    Attributes:
        perturbations: Of each image of the ``clf`` stream, (images, C, H · W); ``None`` before the first step.

    Raises:
        InputError: If ``threat_model`` has a random start; in training, if the data are others, or the perturbations of
            the checkpoint have another shape.

    Source: ATTA (arXiv 1912.11969), for DAT (arXiv 2510.13872).
    """

    def __init__(self, energy_model: EnergyModel, **shared: Any) -> None:
        super().__init__(energy_model=energy_model, **shared)
        if self.threat_model.random_start:
            raise InputError("threat_model.random_start must be false where attacks begin at the end of the last ones")
        # No buffer of nn.Module's: those are averaged, and part of files of weights.
        self.perturbations: Tensor | None = None
        self._source: tuple[DrawStream, tuple[int, int]] | None = None

    # One method per equation.

    @override
    def adversarial_examples(self, x: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the images that the attack reaches from the end of the last one, (N, C, H, W), detached.

        Args:
            x: Images in [0, 1].
            y: True labels, (N,).
            draws: Global numbers of the examples, (N,), which say which images they are, and how they are augmented.
        """
        if draws is None:
            raise InputError("warm attacks need numbered draws: the batches of a PairedDataModule have them")
        numbers = draws.tolist()
        stream, size = self._stream(numbers)
        places = pixel_places(stream, numbers, size)
        if places.shape[1] != x[0, 0].numel():
            raise InputError(
                f"warm attacks need images of one size: the first are {size[0]}×{size[1]}, of which the augmentation"
                f" makes {places.shape[1]} pixels, but an image of x_clf is {x.shape[2]}×{x.shape[3]}"
            )
        table = self._table((stream.size, x.shape[1], size[0] * size[1]), x)
        indices = torch.tensor([stream.index(number) for number in numbers])
        # A copy that does not wait for the device.
        indices, places = move_data_to_device((indices, places), x.device)
        # Where a pixel has no place it begins and ends in one behind the others.
        places = places.unsqueeze(1).expand(-1, x.shape[1], -1)
        padded = torch.nn.functional.pad(table[indices], (0, 1))
        places = torch.where(places < 0, padded.shape[2] - 1, places)
        attack = Ascent(self.attack_objective, self.threat_model, self.attack_rule)
        x_adv = self.ascend(attack, x, y, start=x + padded.gather(2, places).view_as(x), draws=draws)
        self._keep(table, indices, padded.scatter(2, places, (x_adv - x).flatten(2))[:, :, :-1])
        return x_adv

    # State between steps.

    @override
    def on_fit_start(self) -> None:
        """Loads the initial weights; another run may have other data, and attacks that begin anew."""
        super().on_fit_start()
        self._source = None
        if self.trainer.ckpt_path is None:
            self.perturbations = None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the perturbations, unless it is a file of weights alone."""
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint and self.perturbations is not None:
            checkpoint["perturbations"] = self.perturbations.cpu()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the perturbations where training goes on."""
        super().on_load_checkpoint(checkpoint)
        if self._is_fitting():
            self.perturbations = checkpoint.get("perturbations")

    def check_entries(self, contents: Mapping[str, Any]) -> None:
        """Raises an InputError if a checkpoint's perturbations are none."""
        check_entry("perturbations", contents.get("perturbations"), "images", "C", "H·W")

    # Parts.

    def _stream(self, numbers: list[int]) -> tuple[DrawStream, tuple[int, int]]:
        """The draws of ``x_clf``, and height and width of their images, for which those of the first batch are read."""
        if self._source is None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            make = getattr(data, "training_stream", None)
            stream = None if make is None else make("clf")
            if not isinstance(stream, DrawStream):
                raise InputError(
                    "warm attacks need data whose x_clf are draws of one data set: a PairedDataModule without"
                    f" generated images, got {type(data).__name__}"
                )
            self._source = stream, image_size(stream, numbers)
        return self._source

    def _table(self, shape: tuple[int, int, int], x: Tensor) -> Tensor:
        """The perturbations, made or taken from a checkpoint at the first step."""
        if self.perturbations is None:
            self.perturbations = x.new_zeros(shape)
        check_entry_shape("perturbations", self.perturbations, *shape)
        self.perturbations = self.perturbations.to(x)  # those of a checkpoint are elsewhere
        return self.perturbations

    @staticmethod
    def _keep(table: Tensor, indices: Tensor, ends: Tensor) -> None:
        """Puts the perturbations of all ranks in their places."""
        indices, ends = (gathered(part).flatten(0, 1) for part in (indices, ends))
        # At the end of a pass a batch may have an image twice: its last one counts, in whatever order a device writes.
        rows = torch.arange(len(indices), device=indices.device)
        last = ((indices.unsqueeze(1) == indices) * rows).amax(1)
        # What is not finite, in a step that a guard skips, would come back in each pass.
        table[indices] = ends[last].nan_to_num(0.0, 0.0, 0.0)
