"""What is kept of a training step that failed: its batch, energies and circumstances, in one file that runs no code."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.weights.files import written_whole

_FORMAT = "1"


@dataclass(frozen=True)
class PostMortem:
    """A training step that failed.

    Attributes:
        report: Step, epoch, loss, T and what else is known; numbers that are not finite are the words nan, inf, -inf.
        batch: The tensors of the batch by name; entries of nested containers have names such as ``0.image``.
        energies: E(x) of the batch's images before the step, (N,) by name, as far as the module has an energy.
    """

    report: dict[str, Any]
    batch: dict[str, Tensor]
    energies: dict[str, Tensor]


def save_post_mortem(path: Path, mortem: PostMortem, max_bytes: int) -> None:
    """Writes a file that :func:`load_post_mortem` reads, whole or not at all.

    Args:
        path: Its name; the folder is made if there is none.
        mortem: What to keep.
        max_bytes: Of a larger batch the first examples are kept, as many as fit; the report says how many.
    """
    tensors = {f"batch/{name}": tensor for name, tensor in mortem.batch.items()}
    tensors |= {f"energy/{name}": tensor for name, tensor in mortem.energies.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    share = min(1.0, max_bytes / size) if size else 1.0
    kept = {name: t[: math.floor(len(t) * share)] if t.dim() else t for name, t in tensors.items()}
    report = {**mortem.report, "share_of_examples": share}
    metadata = {"format": _FORMAT, "report": json.dumps(_plain(report), allow_nan=False)}
    # Copies: tensors of one batch may share memory, which the format does not do.
    data = save({name: t.detach().cpu().clone().contiguous() for name, t in kept.items()}, metadata=metadata)
    with written_whole(path) as file:
        file.write(data)


def load_post_mortem(path: str | Path) -> PostMortem:
    """Returns what DivergenceGuard has kept of a step.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no file of DivergenceGuard's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no post-mortem at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable post-mortem: {error}") from error
    if metadata.get("format") != _FORMAT or "report" not in metadata:
        raise InputError(f"{path} is no post-mortem of DivergenceGuard, or one of another version")
    parts = {part: {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)} for part in _PARTS}
    return PostMortem(json.loads(metadata["report"]), parts["batch/"], parts["energy/"])


def named_tensors(batch: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of nested dictionaries and sequences with their names."""
    if isinstance(batch, Tensor):
        yield prefix or "batch", batch
        return
    entries: Any = ()
    if isinstance(batch, Mapping):
        entries = batch.items()
    elif isinstance(batch, tuple | list):
        entries = enumerate(batch)
    for name, entry in entries:
        yield from named_tensors(entry, f"{prefix}.{name}" if prefix else str(name))


def named_images(batch: Any) -> dict[str, Tensor]:
    """Returns the images (N, C, H, W) of a batch by name."""
    return {name: x for name, x in named_tensors(batch) if x.dim() == 4 and x.is_floating_point()}


_PARTS = ("batch/", "energy/")


def _plain(value: Any) -> Any:
    """The value in what strict JSON has: its numbers are finite."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def bad_gradients(named_parameters: Iterator[tuple[str, torch.nn.Parameter]]) -> list[str]:
    """Returns the names of the parameters whose gradient is not finite."""
    return [name for name, p in named_parameters if p.grad is not None and not bool(p.grad.isfinite().all())]
