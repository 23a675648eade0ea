"""The search for hashes that differ in few bits, exact and without comparing all with all."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dat_lightning.core.errors import InputError
from dat_lightning.data.image_hashes import ImageHashes


class DuplicatePair(NamedTuple):
    """Two images whose hashes differ in ``distance`` bits, by their places in their data sets."""

    ood: int
    reference: int
    distance: int


_BITS_SET = np.array([bin(word).count("1") for word in range(1 << 16)], dtype=np.uint8)
# What is held in memory at a time, tens of bytes each: entries of the index, hashes looked up, and pairs compared.
_MAX_ENTRIES = 1 << 23
_MAX_QUERIES = 1 << 18
_MAX_PAIRS = 1 << 22


def near_duplicates(ood: ImageHashes, reference: ImageHashes, max_distance: int) -> list[DuplicatePair]:
    """Returns all pairs of hashes that differ in at most ``max_distance`` bits, the nearest first.

    No pair is missed. A hash has B bands of 16 bits; let d = B r + a. If two hashes differ in at most d bits, then one
    of the first a + 1 bands differs in at most r bits, or one of the others in at most r − 1. So the smaller set is
    indexed, band by band, under all keys within that radius, and the larger one looks its bands up. Memory grows with
    the sizes, not with their product.

    Args:
        ood: Hashes of OOD images.
        reference: Hashes of in-distribution images, of the same kind.
        max_distance: d, in bits.

    Raises:
        InputError: If the hashes differ in length, or the distance is negative or as long as a hash.

    Source: Norouzi et al. 2014 (arXiv 1307.2982), section 2.
    """
    if ood.hashes.shape[1] != reference.hashes.shape[1]:
        lengths = tuple(64 * h.hashes.shape[1] for h in (ood, reference))
        raise InputError(f"ood and reference must have hashes of one length, got {lengths[0]} and {lengths[1]} bits")
    bits = 64 * ood.hashes.shape[1]
    if not 0 <= max_distance < bits:
        raise InputError(f"max_distance must lie in 0 … {bits - 1}, got {max_distance}")
    swap = len(ood.hashes) < len(reference.hashes)
    small, large = (ood, reference) if swap else (reference, ood)
    indexed, queries = (np.ascontiguousarray(h.hashes).view(np.uint16) for h in (small, large))
    num_bands = indexed.shape[1]
    found = [np.empty((0, 3), dtype=np.int64)]
    for band in range(num_bands):
        radius = max_distance // num_bands - (band > max_distance % num_bands)
        keys = np.flatnonzero(_BITS_SET.astype(np.int64) <= radius).astype(np.uint16)
        block = _MAX_ENTRIES // max(1, len(keys))
        for first in range(0, len(indexed) if len(keys) else 0, block):
            for i, q, distance in _matches(indexed[first : first + block], queries, band, keys):
                near = distance <= max_distance
                found.append(np.stack([i[near] + first, q[near], distance[near]], axis=1))
    # A pair that agrees in several bands was found as often.
    rows = np.unique(np.concatenate(found), axis=0)
    pairs = np.stack([small.indices[rows[:, 0]], large.indices[rows[:, 1]], rows[:, 2]], axis=1)
    if not swap:
        pairs = pairs[:, [1, 0, 2]]
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0], pairs[:, 2]))]
    return [DuplicatePair(*row) for row in pairs.tolist()]


def _matches(
    indexed: np.ndarray, queries: np.ndarray, band: int, keys: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows of both sets that are near each other in one band, and their distances in all bands together."""
    entries = (indexed[:, band, None] ^ keys).ravel()
    order = np.argsort(entries, kind="stable")
    owners = order // len(keys)
    starts = np.concatenate([[0], np.cumsum(np.bincount(entries, minlength=1 << 16))])
    counts = np.diff(starts)
    for first in range(0, len(queries), _MAX_QUERIES):
        chunk = queries[first : first + _MAX_QUERIES]
        ends = np.cumsum(counts[chunk[:, band]])
        begin = 0
        while begin < len(chunk):
            done = ends[begin - 1] if begin else 0
            # At least one query at a time, however many entries share its key.
            end = max(begin + 1, int(np.searchsorted(ends, done + _MAX_PAIRS, side="right")))
            q, before = np.arange(begin, end), np.concatenate([[done], ends[begin : end - 1]])
            number = counts[chunk[begin:end, band]]
            q = np.repeat(q, number)
            place = np.arange(ends[end - 1] - done) + np.repeat(starts[chunk[begin:end, band]] - before + done, number)
            i = owners[place]
            yield i, q + first, _distances(indexed[i], chunk[q])
            begin = end


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Numbers of bits in which rows of 16-bit words differ."""
    different = a ^ b
    distance = np.zeros(len(a), dtype=np.int64)
    for word in range(a.shape[1]):
        distance += _BITS_SET[different[:, word]]
    return distance
