"""What all evaluators share: values per example, gathered over all ranks, kept in files, and summed up in figures."""

import dataclasses
import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.figures import Figure, Values, gather
from dat_lightning.core.files import written_whole
from dat_lightning.core.fingerprint import module_fingerprint

_DIGEST_SIZE = hashlib.sha256().digest_size


class Evaluator(Callback, ABC):
    """Computes figures from the images of a test loader, exactly over any number of ranks, and resumably.

    Override :meth:`evaluate_batch`, which gives values per example, and :meth:`summarize`, which makes figures of all
    of them in the order of the data set; :meth:`settings` must tell apart whatever changes the values. Batches of other
    data go through :meth:`remember`. The LightningModule may be any that maps images in [0, 1] to logits; it runs in
    the precision of its weights, without autocast. Batches need ``x``, ``y`` and ``index``, as
    :class:`~dat_lightning.data.PairedDataModule` gives them.

    Logged: ``{stage}/{name}`` for each figure. :attr:`figures` keeps the last ones, for reports.

    Args:
        dirpath: Folder that keeps the values of each batch, so that a test that was interrupted goes on where it
            stopped; ``None`` keeps nothing. Other weights, settings or images are never mistaken for those in the
            folder; another batch size or number of ranks composes other batches, and starts anew.

    Attributes:
        figures: Results of the last evaluation, on every rank.

    Raises:
        TypeError: In a test, if a setting is no primitive.
        ValueError: In a test, if a batch lacks a part, there are several test loaders, or none gives an example.
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
        """Returns the primitives on which the values depend; dataclasses of primitives are as good."""
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
        path = None if self.dirpath is None else self._batch_file(pl_module, batch, part)
        values = None if path is None else _read(path, size)
        if values is None:
            values = {name: _on_cpu(value) for name, value in compute(batch).items()}
            wrong = {name: tuple(v.shape) for name, v in values.items() if v.shape[:1] != (size,) or name == "index"}
            if wrong:
                raise ValueError(
                    f"{type(self).__name__}: the values of a batch of {size} examples must have that first dimension,"
                    f" and a name other than index, got {wrong}"
                )
            if path is not None:
                _write(path, values)
        return values

    # Lightning's hooks.

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last evaluation."""
        self._values = []
        self.figures = []
        # Named with the first batch: the module's own hook, which may load weights, comes after this one.
        self._folder = None

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
            ValueError: If the batch lacks a part, or comes from a second test loader.
        """
        check_test_batch(batch, type(self).__name__, dataloader_idx)
        values = self.remember(pl_module, batch, partial(self.evaluate_batch, pl_module))
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

    def _batch_file(self, pl_module: LightningModule, batch: Mapping[str, Tensor], part: str) -> Path:
        """The file of a batch, named by all that it holds."""
        if self._folder is None:
            name = f"{type(self).__module__}.{type(self).__qualname__}"
            key = {"evaluator": name, "settings": self.settings(), "weights": _weights(pl_module)}
            digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=_primitive).encode()).hexdigest()
            self._folder = Path(str(self.dirpath)) / f"{type(self).__name__}-{digest[:16]}"
            self._folder.mkdir(parents=True, exist_ok=True)
        seen = hashlib.sha256()
        for name in ("x", "y", "index"):
            if name in batch:
                value = batch[name].detach().cpu().contiguous()
                seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                seen.update(value.flatten().view(torch.uint8).numpy().tobytes())
        index = batch["index"]
        return self._folder / f"{part}-{int(index.min())}-{int(index.max())}-{seen.hexdigest()[:16]}.values"


def check_test_batch(batch: Any, evaluator: str, dataloader_idx: int) -> None:
    """Raises a ValueError unless a batch has ``x, y, index`` and comes from the only test loader."""
    if dataloader_idx > 0:
        raise ValueError(f"{evaluator} evaluates one test loader, got several; test them one by one")
    require_parts(batch, evaluator)


def require_parts(batch: Any, evaluator: str, parts: Sequence[str] = ("x", "y", "index")) -> None:
    """Raises a ValueError unless a batch is a mapping with the given parts."""
    missing = [key for key in parts if not (isinstance(batch, Mapping) and key in batch)]
    if missing:
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"{evaluator} needs {', '.join(missing)} in its batch, got {found}; an evaluation loader of"
            " PairedDataModule gives x, y and index"
        )


def is_silent(trainer: Trainer) -> bool:
    """Returns whether progress is not to be shown: on other ranks, or where the Trainer shows none."""
    return not trainer.is_global_zero or not getattr(trainer.progress_bar_callback, "is_enabled", False)


def _on_cpu(value: Tensor) -> Tensor:
    """Values as NumPy's files take them."""
    value = value.detach().cpu()
    return value.float() if value.dtype == torch.bfloat16 else value


def _read(path: Path, size: int) -> Values | None:
    """The values in a file; ``None`` without one, or if a crash or a full disk left it damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, arrays = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if hashlib.sha256(arrays).digest() != digest:
        return None
    with np.load(io.BytesIO(arrays), allow_pickle=False) as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files}
    return values if all(value.shape[:1] == (size,) for value in values.values()) else None


def _write(path: Path, values: Values) -> None:
    """Writes values, behind a hash of them; a crash leaves no half-written file of that name."""
    arrays = io.BytesIO()
    np.savez(arrays, **{name: value.numpy() for name, value in values.items()})  # type: ignore[arg-type]
    with written_whole(path) as file:
        file.write(hashlib.sha256(arrays.getvalue()).digest() + arrays.getvalue())


def _weights(module: LightningModule) -> str:
    """A hash of the weights alone."""
    network: torch.nn.Module = getattr(module, "energy_model", module)
    return module_fingerprint(network)


def _primitive(value: Any) -> Any:
    """A setting as primitives; what may print differently in each process, or alike for different values, is none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: dataclasses.asdict(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"settings() must return primitives, got {type(value).__name__}: {value!r}")
