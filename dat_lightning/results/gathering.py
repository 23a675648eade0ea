"""Values per example, gathered from all ranks."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dat_lightning.core.errors import InputError

T = TypeVar("T")

Values = dict[str, Tensor]
"""Name → per-example values, first dimension N, on the CPU."""


def gather(
    batches: list[Values], otherwise: str = "the test loader gave no batch", same_on_ranks: bool = False
) -> Values:
    """Returns the values of all ranks, each example once, sorted by ``index``; every rank must call it.

    Args:
        batches: Of this rank.
        otherwise: Why there may be none.
        same_on_ranks: Whether an example has the same values to the last bit wherever they are computed.

    Raises:
        InputError: If there are no examples; or if several different ones of a rank have one index, of all ranks with
            ``same_on_ranks``.
    """
    names = batches[0].keys() if batches else ()
    mine = {name: torch.cat([batch[name] for batch in batches]) for name in names}
    filled = [part for part in all_ranks(mine) if part]
    if not filled:
        raise InputError(f"there are no examples to evaluate: {otherwise}")
    everything = {name: torch.cat([part[name] for part in filled]) for name in filled[0]}
    if mine:
        _check_repeated(everything if same_on_ranks else mine)
    # A sampler of another project may pad with repeated examples.
    index, first = np.unique(everything["index"].numpy(), return_index=True)
    order = torch.from_numpy(first)
    return {name: value[order] for name, value in everything.items()} | {"index": torch.from_numpy(index)}


def _check_repeated(values: Values) -> None:
    """Raises an InputError if different examples have one index; a sampler that pads repeats one with its values."""
    _, place, counts = np.unique(values["index"].numpy(), return_inverse=True, return_counts=True)
    for number in np.flatnonzero(counts > 1).tolist():
        rows = torch.from_numpy(np.flatnonzero(place == number))
        for value in values.values():
            first = value[rows[:1]].expand_as(value[rows])
            if not torch.equal(value[rows].nan_to_num(), first.nan_to_num()):
                index = int(values["index"][rows[0]])
                raise InputError(
                    f"{len(rows)} examples have the index {index}: index must number the examples of the whole test set"
                )


def all_ranks(mine: Any) -> list[Any]:
    """Returns what each rank holds; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts


def on_rank_zero(trainer: Trainer, compute: Callable[[], T]) -> T:
    """Returns on every rank what rank zero alone computes; every rank must call it."""
    found: T = trainer.strategy.broadcast(compute() if trainer.is_global_zero else None)  # type: ignore[assignment]
    return found
