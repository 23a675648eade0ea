"""What the processes that train together know of each other."""

import torch
from torch import Tensor, distributed


def number_of_ranks() -> int:
    """Returns how many processes train together; one where there is no Trainer."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(values: Tensor) -> Tensor:
    """Returns the tensors of all ranks, which have one shape, (ranks, *shape); without gradient."""
    if number_of_ranks() == 1:
        return values.unsqueeze(0)
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(number_of_ranks())]
    distributed.all_gather(parts, values)
    return torch.stack(parts)


def of_all_ranks(scores: Tensor) -> Tensor:
    """Returns the scores (2, N) of all ranks side by side, (2, ranks · N)."""
    if number_of_ranks() > 1:
        # Not every backend moves types shorter than float32.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return gathered(scores).transpose(0, 1).flatten(1)
