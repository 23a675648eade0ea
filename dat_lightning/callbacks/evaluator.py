"""What all evaluators share: values per example, gathered over all ranks, kept in files, and summed up in figures."""

import hashlib
import json
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.fingerprint import image_digest, module_fingerprint

Values = dict[str, Tensor]
"""Name → per-example values, first dimension N, on the CPU."""


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation, with what it takes to understand and repeat it.

    Attributes:
        name: What it is, such as ``accuracy`` or ``ece``; logged as ``{stage}/{name}``.
        value: The number.
        protocol: How it was measured, in words: attack, norm, ε, steps, bins, reference.
        num_samples: Number of images that entered.
        details: Further primitives: settings, seeds, confidence intervals, curves as lists.
    """

    name: str
    value: float
    protocol: str
    num_samples: int
    details: Mapping[str, Any] = field(default_factory=dict)


class Evaluator(Callback):
    """Computes figures from the images of a test loader, exactly over any number of ranks, and resumably.

    Override :meth:`evaluate_batch`, which gives values per example, and :meth:`summarize`, which makes figures of all
    of them in the order of the data set; :meth:`settings` must tell apart whatever changes the values. The
    LightningModule may be any that maps images in [0, 1] to logits. Batches need ``x``, ``y`` and ``index``, as
    :class:`~dat_lightning.data.PairedDataModule` gives them.

    Logged: ``{stage}/{name}`` for each figure. :attr:`figures` keeps the last ones, for reports.

    Args:
        dirpath: Folder that keeps the values of each batch, so that a test that was interrupted goes on where it
            stopped; ``None`` keeps nothing. Ranks need to share it only if their number changes.

    Attributes:
        figures: Results of the last evaluation, on every rank.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.figures: list[Figure] = []
        self._values: list[Values] = []
        self._folder: Path | None = None

    # What a subclass supplies.

    @abstractmethod
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns values per example, (N, …) each."""

    @abstractmethod
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Figure]:
        """Returns the figures from the values of all examples, sorted by index; called on every rank alike."""

    def settings(self) -> dict[str, Any]:
        """Returns the primitives on which the values depend."""
        return {}

    # Lightning's hooks.

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew, or finds the folder of an evaluation of the same weights with the same settings."""
        self._values = []
        self.figures = []
        self._folder = None
        if self.dirpath is not None:
            key = {"evaluator": type(self).__name__, "settings": self.settings(), "weights": _weights(pl_module)}
            digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
            self._folder = Path(self.dirpath) / f"{type(self).__name__}-{digest}"
            self._folder.mkdir(parents=True, exist_ok=True)

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
        """Evaluates the batch, unless its values are in the folder.

        Raises:
            ValueError: If the batch lacks a part.
        """
        missing = [key for key in ("x", "y", "index") if not (isinstance(batch, Mapping) and key in batch)]
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs {', '.join(missing)} in its batch; an evaluation loader of"
                " PairedDataModule gives x, y and index"
            )
        values = self._stored(batch)
        if values is None:
            values = {name: value.detach().cpu() for name, value in self.evaluate_batch(pl_module, batch).items()}
            self._store(batch, values)
        self._values.append({"index": batch["index"].cpu(), **values})

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the values of all ranks, and logs the figures."""
        values = gather(self._values)
        self._values = []
        self.figures = self.summarize(trainer, pl_module, values)
        for figure in self.figures:
            # The same number on every rank, so there is nothing to reduce.
            pl_module.log(f"test/{figure.name}", figure.value, sync_dist=False)

    # Files.

    def _path(self, batch: Mapping[str, Tensor]) -> Path | None:
        """The file of a batch; images enter the name, so that other data of the same size are not mistaken for it."""
        if self._folder is None:
            return None
        index = batch["index"].cpu()
        seen = image_digest(torch.cat([batch["x"].flatten(1), batch["y"].unsqueeze(1)], 1).float())
        return self._folder / f"{int(index.min())}-{int(index.max())}-{len(index)}-{seen[:16]}.npz"

    def _stored(self, batch: Mapping[str, Tensor]) -> Values | None:
        path = self._path(batch)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        except (OSError, ValueError, KeyError, EOFError):
            # A file that a crash or a full disk left damaged is computed anew.
            return None

    def _store(self, batch: Mapping[str, Tensor], values: Values) -> None:
        path = self._path(batch)
        if path is None:
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, **{name: value.numpy() for name, value in values.items()})  # type: ignore[arg-type]
        Path(file.name).replace(path)


def gather(batches: list[Values]) -> Values:
    """Returns the values of all ranks, each example once, sorted by ``index``; every rank must call it.

    Raises:
        ValueError: If there are no examples.
    """
    names = batches[0].keys() if batches else ()
    mine = {name: torch.cat([batch[name] for batch in batches]) for name in names}
    parts: list[Values | None] = [mine]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, mine)
    filled = [part for part in parts if part]
    if not filled:
        raise ValueError("there are no examples to evaluate: the test loader gave no batch")
    everything = {name: torch.cat([part[name] for part in filled]) for name in filled[0]}
    # A sampler of another project may pad with repeated examples.
    index, first = np.unique(everything["index"].numpy(), return_index=True)
    order = torch.from_numpy(first)
    return {name: value[order] for name, value in everything.items()} | {"index": torch.from_numpy(index)}


def _weights(module: LightningModule) -> str:
    """A hash of the weights alone."""
    network: torch.nn.Module = getattr(module, "energy_model", module)
    return module_fingerprint(network)
