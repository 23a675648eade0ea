"""Values of batches in files, so that an evaluation that was interrupted goes on where it stopped."""

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.energy import first_weight
from dat_lightning.data.batches import logits_of
from dat_lightning.results.digests import digest, network_digest
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import settings_key
from dat_lightning.version import __version__
from dat_lightning.weights.files import written_whole

_DIGEST_SIZE = hashlib.sha256().digest_size
# The entry of a file with the network's logits, by which it is known again.
_PROBE = "__logits__"


class KeptValues:
    """A folder of values per example, a file for each batch, that belong to one network and one way to compute them.

    Never mistaken for each other are values of other weights or buffers, settings, versions of this package, images,
    labels or indices. What neither weights nor structure show, such as an attribute that ``forward`` reads, shows in
    the logits: they are kept with the values, and those of a network with other logits (beyond 1e-3 of the largest)
    are computed anew. So are files that a crash or a full disk has damaged. Another batch size composes other batches,
    and finds nothing.

    Args:
        folder: Where the files are.
        name: Who computes; begins the name of the folder in it.
        settings: The primitives on which the values depend; dataclasses of primitives are as good.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.name = name
        self.settings = settings
        self._own: Path | None = None

    def get_or_compute(
        self,
        network: nn.Module,
        batch: Mapping[str, Tensor],
        compute: Callable[[Mapping[str, Tensor]], Values],
        part: str = "test",
    ) -> Values:
        """Returns the values of a batch on the CPU, from its file or else computed and written there.

        Args:
            network: Maps images to logits. Its weights must not change between calls.
            batch: Has ``x`` and ``index``; these and ``y`` enter the file's name.
            compute: Maps the batch to values, (N, …) each.
            part: The set of images; it begins the file's name.

        Raises:
            TypeError: If a setting is no primitive.
        """
        path = self.path(network, batch, part)
        like = first_weight(network, batch["x"])
        with torch.no_grad(), no_trace(network):
            probe = logits_of(network, batch["x"].to(like.dtype), self.name.rpartition(".")[2]).float().cpu()
        values = read_values(path, len(batch["index"]))
        kept = None if values is None else values.pop(_PROBE, None)
        if values is None or kept is None or not _alike(kept, probe):
            values = compute(batch)
            write_values(path, {**values, _PROBE: probe})
        return values

    def path(self, network: nn.Module, batch: Mapping[str, Tensor], part: str) -> Path:
        """Returns the file of a batch."""
        seen = digest(each for name in ("x", "y", "index") if name in batch for each in (name, batch[name]))
        index = batch["index"]
        file = f"{part}-{int(index.min())}-{int(index.max())}-{seen[:16]}.values"
        return self.own_folder(network) / file

    def own_folder(self, network: nn.Module) -> Path:
        """Returns the folder of this network's values, which is made if there is none."""
        if self._own is None:
            weights = {"weights": network_digest(network), "version": __version__}
            key = settings_key({"name": self.name, "settings": dict(self.settings), **weights})
            self._own = self.folder / f"{self.name.rpartition('.')[2]}-{key[:16]}"
            self._own.mkdir(parents=True, exist_ok=True)
        return self._own


def read_values(path: Path, size: int) -> Values | None:
    """Returns the values of ``size`` examples in a file; ``None`` without one, or if it is damaged."""
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


def write_values(path: Path, values: Values) -> None:
    """Writes values, behind a hash of them; a crash leaves no half-written file of that name."""
    arrays = io.BytesIO()
    np.savez(arrays, **{name: value.numpy() for name, value in values.items()})  # type: ignore[arg-type]
    with written_whole(path) as file:
        file.write(hashlib.sha256(arrays.getvalue()).digest() + arrays.getvalue())


def _alike(kept: Tensor, probe: Tensor) -> bool:
    """Whether logits are the same but for what devices and libraries make of sums."""
    if kept.shape != probe.shape:
        return False
    # NaN logits are nobody's.
    largest = float(probe.abs().max()) if probe.numel() else 0.0
    return bool(((kept - probe).abs() <= 1e-3 * largest).all())
