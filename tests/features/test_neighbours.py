"""Exact nearest neighbours, against a plain loop."""

import numpy as np
import pytest
import torch

from dat_lightning.features import nearest_neighbours


@pytest.mark.parametrize("block_size", [4, 50, 8192])
def test_euclidean_neighbours_are_those_of_a_plain_loop(block_size: int) -> None:
    rng = np.random.default_rng(0)
    # Far from the origin, where float32 would lose the differences.
    queries, pool = (rng.normal(1000, 1, (n, 6)).astype(np.float32) for n in (9, 50))
    pool[17] = queries[2]
    distances, places = nearest_neighbours(torch.from_numpy(queries), torch.from_numpy(pool), 5, block_size=block_size)
    assert distances.dtype == torch.float64
    for i, query in enumerate(queries.astype(np.float64)):
        expected = np.sqrt(((pool.astype(np.float64) - query) ** 2).sum(1))
        order = np.argsort(expected)[:5]
        assert places[i].tolist() == order.tolist()
        np.testing.assert_allclose(distances[i].numpy(), expected[order], atol=1e-4)
    assert int(places[2, 0]) == 17


def test_cosine_is_one_minus_the_cosine() -> None:
    rng = np.random.default_rng(0)
    queries, pool = (rng.normal(size=(n, 4)) for n in (7, 30))
    pool[3] = 5 * queries[1]
    distances, places = nearest_neighbours(
        torch.from_numpy(queries), torch.from_numpy(pool), 3, metric="cosine", block_size=8
    )
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(pool, axis=1)
    expected = 1 - queries @ pool.T / norms
    order = expected.argsort(1)[:, :3]
    assert places.tolist() == order.tolist()
    np.testing.assert_allclose(distances.numpy(), np.take_along_axis(expected, order, 1), atol=1e-12)
    assert int(places[1, 0]) == 3


@pytest.mark.parametrize("shape", [(2, 4), (10, 5)])
def test_a_pool_has_to_fit(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"pool must have at least 3 vectors of 4 features, got \(\d+, \d\)"):
        nearest_neighbours(torch.zeros(1, 4), torch.zeros(*shape), 3)
