"""Randomness as a pure function of (seed, name, index), so that no result depends on batch size, workers or ranks."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from dat_lightning.core.errors import require_at_least


def stream_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that is a fixed hash of its parts, such as ``stream_seed(seed, "noise", index)``.

    Equal parts give equal seeds on every platform and in every process; Python's own ``hash`` does not.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream_generator(*parts: int | str) -> torch.Generator:
    """Returns a CPU generator seeded by :func:`stream_seed` of the parts."""
    return torch.Generator().manual_seed(stream_seed(*parts))


def normal_noise(seed: int, name: str, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Returns standard normal noise of shape (N, *shape) on the CPU; row i depends on ``indices[i]`` alone."""
    rows = [torch.randn(shape, generator=stream_generator(seed, name, int(i))) for i in indices]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def uniform_noise(seed: int, name: str, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Returns uniform noise in [0, 1) of shape (N, *shape) on the CPU; row i depends on ``indices[i]`` alone."""
    rows = [torch.rand(shape, generator=stream_generator(seed, name, int(i))) for i in indices]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


class RandomPermutation:
    """A pseudorandom permutation of 0 … size−1 that is computed entry by entry.

    A four-round Feistel network over the next even power of two, walked until the value falls below ``size``. It takes
    no memory, so shuffling 79 million records costs as little as shuffling ten, and any worker can ask for any entry.

    Args:
        size: Number of entries.
        seed: Parts that name this permutation, see :func:`stream_seed`.

    Raises:
        InputError: If ``size`` is not positive.

    Source: Luby & Rackoff 1988 (Feistel permutations); Black & Rogaway 2002 (cycle walking).
    """

    _ROUNDS = 4

    def __init__(self, size: int, *seed: int | str) -> None:
        require_at_least(1, size=size)
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._keys = [stream_seed(*seed, "round", r).to_bytes(8, "big") for r in range(self._ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside 0 … {self.size - 1}")
        value = self._feistel(position)
        while value >= self.size:
            value = self._feistel(value)
        return value

    def _feistel(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            digest = hashlib.blake2b(right.to_bytes(8, "big"), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & self._mask)
        return (left << self._half_bits) | right
