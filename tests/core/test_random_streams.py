import hashlib
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dat_lightning.core import RandomPermutation, normal_noise, stream_generator, stream_seed, uniform_noise

Noise = Callable[[int, str, Iterable[int], tuple[int, ...]], Tensor]


def test_a_seed_never_changes() -> None:
    # A literal on purpose: runs resume and samples repeat only as long as it holds, on any platform and version.
    assert stream_seed(0, "noise", 7) == 6812654027350015150
    digest = hashlib.blake2b(b"(0, 'noise', 7)", digest_size=8).hexdigest()
    assert stream_seed(0, "noise", 7) == int(digest, 16) // 2


@settings(deadline=None)
@given(parts=st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=4))
def test_a_seed_fits_torch_s_generator(parts: list[int | str]) -> None:
    seed = stream_seed(*parts)
    assert 0 <= seed < 2**63
    assert stream_generator(*parts).initial_seed() == seed


def test_different_parts_give_different_seeds() -> None:
    parts: list[tuple[int | str, ...]] = [(1,), ("1",), (1, 1), (11,), (1, "1"), ("1", 1), ("a", "b"), ("ab",), (-1,)]
    assert len({stream_seed(*p) for p in parts}) == len(parts)


@pytest.mark.parametrize("noise", [normal_noise, uniform_noise])
def test_a_row_of_noise_depends_on_its_own_index_and_name_alone(noise: Noise) -> None:
    rows = noise(3, "a", [5, 2, 9], (2, 4))
    assert rows.shape == (3, 2, 4)
    assert torch.equal(noise(3, "a", [9], (2, 4))[0], rows[2])
    assert torch.equal(noise(3, "a", (2, 5), (2, 4)), rows[[1, 0]])
    assert not torch.equal(noise(4, "a", [5], (2, 4))[0], rows[0])
    assert not torch.equal(noise(3, "b", [5], (2, 4))[0], rows[0])


@pytest.mark.parametrize("noise", [normal_noise, uniform_noise])
@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_no_images_have_no_noise(noise: Noise, shape: tuple[int, ...]) -> None:
    found, one = noise(0, "a", [], shape), noise(0, "a", [0], shape)
    assert (found.shape, found.dtype) == ((0, *shape), one.dtype)


def test_noise_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), normal_noise(0, "a", [0], (3,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(normal_noise(0, "a", [0], (3,)), first)


def test_noise_has_the_moments_of_its_distribution() -> None:
    normal, uniform = normal_noise(0, "n", range(200), (100,)), uniform_noise(0, "u", range(200), (100,))
    # 20 000 values: standard errors of 0.007 (mean), 0.01 (variance) and 0.002 (uniform mean).
    assert abs(normal.mean()) < 0.03
    assert abs(normal.var() - 1) < 0.04
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    assert abs(uniform.mean() - 1 / 2) < 0.01
    assert abs(uniform.var() - 1 / 12) < 0.004
    # Rows are independent of each other: neighbours do not correlate.
    assert abs((normal[:-1] * normal[1:]).mean()) < 0.03


def test_a_permutation_of_any_small_size_is_a_bijection() -> None:
    for size in range(1, 130):
        permutation = RandomPermutation(size, "seed", size)
        assert len(permutation) == size
        assert sorted(permutation[i] for i in range(size)) == list(range(size))


@settings(max_examples=15, deadline=None)
@given(size=st.integers(130, 4200), seed=st.integers(0, 10**6))
def test_a_permutation_of_any_size_and_seed_is_a_bijection(size: int, seed: int) -> None:
    permutation = RandomPermutation(size, seed)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_a_permutation_of_eighty_million_entries_costs_nothing() -> None:
    permutation = RandomPermutation(79_302_017, 0)
    entries = [permutation[i] for i in range(0, 79_302_017, 1_000_003)]
    assert len(set(entries)) == len(entries)
    assert 0 <= min(entries) < 5_000_000
    assert 74_000_000 < max(entries) < 79_302_017


def test_permutations_depend_on_all_parts_of_their_seed() -> None:
    orders = {tuple(RandomPermutation(20, *seed)[i] for i in range(20)) for seed in [(0,), (1,), (0, 0), (0, "order")]}
    assert len(orders) == 4
    assert tuple(range(20)) not in orders


def test_every_order_is_as_likely_as_the_others() -> None:
    # 3! orders from 3 000 seeds: 500 each, with a standard deviation of 20.
    orders = Counter(tuple(RandomPermutation(3, seed)[i] for i in range(3)) for seed in range(3000))
    assert len(orders) == 6
    assert all(400 < count < 600 for count in orders.values())


@pytest.mark.parametrize("position", [-1, 4])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match="0 … 3"):
        RandomPermutation(4, 0)[position]


def test_an_empty_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        RandomPermutation(0, 0)
