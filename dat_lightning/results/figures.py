"""What an evaluation gives: values per example, gathered from all ranks, and the figures made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dat_lightning.core.errors import InputError

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
        better: Which of two values is the better one; ``None`` if that is a question of taste.
        measured_with: Name → short digest or name of what decides the number besides the model and is not in the
            protocol: test images, reference, extractor, judge. Figures that differ here are not compared.
    """

    name: str
    value: float
    protocol: str
    num_samples: int
    details: Mapping[str, Any] = field(default_factory=dict)
    better: Literal["higher", "lower"] | None = None
    measured_with: Mapping[str, str] = field(default_factory=dict)


def gather(batches: list[Values], otherwise: str = "the test loader gave no batch") -> Values:
    """Returns the values of all ranks, each example once, sorted by ``index``; every rank must call it.

    Raises:
        InputError: If there are no examples, and ``otherwise`` says why; or if several different ones have one index.
    """
    names = batches[0].keys() if batches else ()
    mine = {name: torch.cat([batch[name] for batch in batches]) for name in names}
    if mine:
        _check_repeated(mine)
    filled = [part for part in all_ranks(mine) if part]
    if not filled:
        raise InputError(f"there are no examples to evaluate: {otherwise}")
    everything = {name: torch.cat([part[name] for part in filled]) for name in filled[0]}
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
