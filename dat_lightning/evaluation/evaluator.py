"""What all evaluators share: values per example, gathered over all ranks, kept in files, and summed up in figures."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.data.batches import EvaluationEntry, check_classes, only_loader, require_finite
from dat_lightning.results.digests import image_digests, set_identity
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.kept_values import KeptValues
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.progress import warn_if_spawned


class Evaluator(Callback, ABC):
    """Computes figures from the images of a test loader, exactly over any number of ranks, and resumably.

    Override :meth:`evaluate_batch`, which gives values per example, and :meth:`summarize`, which makes figures of all
    of them in the order of the data set; :meth:`settings` must tell apart whatever changes the values. Batches of other
    data go through :meth:`remember`. The LightningModule may be any that maps images in [0, 1] to logits; it runs in
    the precision of its weights, without autocast. Batches are mappings with ``x``, ``y`` and ``index``, as
    :class:`~dat_lightning.data.PairedDataModule` gives them, or begin with images and labels, as those of most data
    sets do: :class:`~dat_lightning.data.batches.EvaluationEntry` brings them into form.

    Logged: ``{stage}/{name}`` for each figure. :attr:`figures` keeps the last ones, for reports.

    Args:
        dirpath: Folder that keeps the values of each batch, so that a test that was interrupted goes on where it
            stopped; ``None`` keeps nothing. Other weights, settings or images are never mistaken for those in the
            folder; another batch size or number of ranks composes other batches, and starts anew.

    Attributes:
        figures: Results of the last evaluation, on every rank.

    Raises:
        TypeError: In a test, if a setting is no primitive.
        InputError: In a test, if a batch lacks a part, images are not in [0, 1], labels are no integers, there are
            several test loaders, or none gives an example.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.figures: list[Measurement] = []
        self._values: list[Values] = []
        self._kept: KeptValues | None = None
        self._entry: EvaluationEntry | None = None
        self._digests: list[Values] = []

    # What a subclass supplies.

    @abstractmethod
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns values per example, (N, …) each."""

    @abstractmethod
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns the figures from the values of all examples, sorted by index; called on every rank alike."""

    def settings(self) -> dict[str, Any]:
        """Returns the primitives on which the values depend; dataclasses of primitives are as good."""
        return {}

    def known_values(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns values per example that the data know, which no file keeps: other data may have the same images."""
        return {}

    # What it may use.

    def remember(
        self,
        pl_module: LightningModule,
        batch: Mapping[str, Tensor],
        compute: Callable[[Mapping[str, Tensor]], Values],
        part: str = "test",
    ) -> Values:
        """Returns the values of a batch on the CPU: from its file, or else computed, and kept there.

        Args:
            pl_module: The module that is tested.
            batch: Has ``x`` and ``index``; these and ``y`` enter the file's name.
            compute: Maps the batch to values per example.
            part: The set of images; it begins the file's name.
        """
        size = len(batch["index"])

        def checked(batch: Mapping[str, Tensor]) -> Values:
            values = {name: _on_cpu(value) for name, value in compute(batch).items()}
            wrong = {name: tuple(v.shape) for name, v in values.items() if v.shape[:1] != (size,) or name == "index"}
            if wrong:
                raise InputError(
                    f"{type(self).__name__}: the values of a batch of {size} examples must have that first dimension,"
                    f" and a name other than index, got {wrong}"
                )
            return values

        if self.dirpath is None:
            return checked(batch)
        if self._kept is None:
            name = f"{type(self).__module__}.{type(self).__qualname__}"
            self._kept = KeptValues(Path(self.dirpath), name, self.settings())
        return self._kept.get_or_compute(pl_module, batch, checked, part)

    def add_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> None:
        """Evaluates a batch that is in form, unless its values are in the folder, and keeps them for the figures."""
        values = self.remember(pl_module, batch, partial(self.evaluate_batch, pl_module))
        self._values.append({"index": batch["index"].cpu(), **values, **self.known_values(pl_module, batch)})
        self._digests.append({"index": batch["index"].cpu(), "digest": image_digests(batch["x"], batch["y"])})

    def test_batch(self, trainer: Trainer, batch: Any) -> Mapping[str, Tensor]:
        """Returns a batch of the only test loader in form, see :class:`~dat_lightning.data.batches.EvaluationEntry`.

        Raises:
            InputError: If the batch is not in order, or there are several test loaders.
        """
        if self._entry is None:
            self._entry = EvaluationEntry(type(self).__name__, trainer.test_dataloaders, trainer)
        return self._entry(batch)

    def check_logits(self, logits: Tensor, y: Tensor, least: int = 2) -> None:
        """Raises an InputError unless logits (N, K) are finite, K is at least ``least``, and labels lie below K."""
        check_classes(y, logits, type(self).__name__, least)
        require_finite(logits, type(self).__name__)

    # Lightning's hooks.

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last evaluation.

        Raises:
            InputError: If there are several test loaders.
        """
        warn_if_spawned(trainer, type(self).__name__)
        only_loader(trainer.test_dataloaders, type(self).__name__)
        self._values = []
        self.figures = []
        self._entry = None
        self._digests = []
        # Made with the first batch: the module's own hook, which may load weights, comes after this one.
        self._kept = None

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Brings the batch into form, and evaluates it.

        Raises:
            InputError: If the batch is not in order, or there are several test loaders.
        """
        self.add_batch(pl_module, self.test_batch(trainer, batch))

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the values of all ranks, and logs the figures."""
        values = gather(self._values)
        self._values = []
        images = set_identity(gather(self._digests, same_on_ranks=True)["digest"])
        self._digests = []
        self.figures = [
            replace(figure, settings={**figure.settings, "test_images": images})
            for figure in self.summarize(trainer, pl_module, values)
        ]
        for figure in self.figures:
            # The same number on every rank, so there is nothing to reduce.
            pl_module.log(f"test/{figure.name}", figure.value, sync_dist=False)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notices that there was no test loader, of which Lightning calls no other hook.

        Raises:
            InputError: If there was none.
        """
        if stage == "test":
            only_loader(trainer.test_dataloaders, type(self).__name__)


def _on_cpu(value: Tensor) -> Tensor:
    """Values as NumPy's files take them."""
    value = value.detach().cpu()
    return value.float() if value.dtype == torch.bfloat16 else value
