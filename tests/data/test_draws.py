import pickle
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dat_lightning.data import DrawStream
from dat_lightning.data.draws import (
    DrawBatches,
    EvaluationBatches,
    PairedDraws,
    ResumableLoader,
    ShardedBatches,
)


class Numbered:
    """Image i is constant at i, and so is its label."""

    def __init__(self, size: int, labelled: bool = True) -> None:
        self.size, self.labelled = size, labelled

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Tensor | tuple[Tensor, int]:
        image = torch.full((1, 2, 2), float(index))
        return (image, index) if self.labelled else image


def jitter(image: Tensor) -> Tensor:
    return image + torch.rand(image.shape)


def stream(size: int = 7, seed: int = 3, name: str = "gen", labelled: bool = True) -> DrawStream:
    return DrawStream(Numbered(size, labelled), jitter, seed, name)


def same(a: tuple[Tensor, int | None], b: tuple[Tensor, int | None]) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1]


def test_a_draw_is_the_same_whatever_happened_before() -> None:
    first = {draw: stream()(draw) for draw in range(20)}
    other = stream()
    torch.manual_seed(12345)
    for draw in (13, 2, 13, 0, 19):
        torch.rand(draw + 1)
        assert same(other(draw), first[draw])


def test_a_draw_leaves_the_global_generator_where_it_was() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    stream()(4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transform_that_fails_leaves_the_global_generator_where_it_was() -> None:
    def failing(image: Tensor) -> Tensor:
        raise OSError(f"{torch.rand(3)}")

    state = torch.get_rng_state()
    with pytest.raises(OSError, match="tensor"):
        DrawStream(Numbered(3), failing, 0, "gen")(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_pass_visits_every_entry_once_in_another_order() -> None:
    draws = stream(size=50)
    passes = [[draws.index(50 * number + i) for i in range(50)] for number in range(4)]
    assert all(sorted(order) == list(range(50)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4


def test_image_and_label_are_those_of_the_index() -> None:
    draws = stream()
    for draw in range(14):
        image, label = draws(draw)
        assert label == draws.index(draw)
        assert torch.equal(image.floor(), torch.full((1, 2, 2), float(draws.index(draw))))


def test_an_entry_is_augmented_anew_in_each_pass() -> None:
    draws = stream(size=1)
    images = [draws(draw)[0] for draw in range(5)]
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_streams_differ_by_name_and_seed_in_order_and_augmentation() -> None:
    streams = [stream(50), stream(50, name="clf"), stream(50, seed=4)]
    assert len({tuple(s.index(i) for i in range(50)) for s in streams}) == 3
    noise = [s(0)[0] % 1 for s in streams]
    assert not any(torch.equal(a, b) for i, a in enumerate(noise) for b in noise[:i])


def test_a_stream_without_labels_says_so() -> None:
    assert stream(labelled=False)(0)[1] is None


def test_a_pickled_stream_goes_on_the_same() -> None:
    draws = stream()
    draws(5)
    copy = pickle.loads(pickle.dumps(draws))
    assert all(same(copy(draw), draws(draw)) for draw in range(16))


def test_an_empty_data_set_is_refused_by_the_name_of_its_stream() -> None:
    with pytest.raises(ValueError, match="'ood' stream is empty"):
        stream(size=0, name="ood")


def test_a_paired_batch_has_each_stream_s_draws() -> None:
    streams = {"gen": stream(7), "ood": stream(5, name="ood", labelled=False)}
    batch = PairedDraws(streams)[[4, 9, 2]]
    assert batch.keys() == {"draw", "x_gen", "y_gen", "x_ood"}
    assert batch["draw"].tolist() == [4, 9, 2]
    for row, draw in enumerate([4, 9, 2]):
        image, label = streams["gen"](draw)
        assert torch.equal(batch["x_gen"][row], image)
        assert batch["y_gen"][row] == label
        assert torch.equal(batch["x_ood"][row], streams["ood"](draw)[0])


def test_draw_batches_of_all_ranks_are_the_global_batches() -> None:
    whole = list(DrawBatches(12, 5, lambda: 100))
    assert whole == [list(range(first, first + 12)) for first in range(100, 160, 12)]
    for world_size in (1, 2, 3, 4, 6, 12):
        ranks = [list(DrawBatches(12, 5, lambda: 100, rank, world_size)) for rank in range(world_size)]
        shares = [len(batch) for batches in ranks for batch in batches]
        assert set(shares) == {12 // world_size}
        assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


def test_draw_batches_ask_for_the_position_at_each_iteration() -> None:
    position = [0]
    batches = DrawBatches(2, 2, lambda: position[0])
    assert len(batches) == 2
    assert list(batches) == [[0, 1], [2, 3]]
    position[0] = 6
    assert list(batches) == [[6, 7], [8, 9]]


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size is the global batch size .* processes 4, got 10; .*: 8"):
        DrawBatches(10, 1, lambda: 0, 0, 4)


@settings(deadline=None)
@given(size=st.integers(1, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 9))
def test_sharded_batches_cover_all_examples_once_in_equally_many_batches(
    size: int, batch_size: int, world_size: int
) -> None:
    if size < world_size:
        with pytest.raises(ValueError, match=f"{size} examples .* {world_size} processes"):
            ShardedBatches(size, batch_size, 0, world_size)
        return
    samplers = [ShardedBatches(size, batch_size, rank, world_size) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in samplers]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(size))
    assert {len(batches) for batches in ranks} == {len(sampler) for sampler in samplers} == {samplers[0].num_batches}
    lengths = [len(batch) for batches in ranks for batch in batches]
    assert min(lengths) >= 1
    # One more only where a rank would otherwise have an empty batch, which can only be with batches of one.
    assert max(lengths) <= (batch_size if batch_size > 1 else 2)


def test_one_process_s_batches_are_in_order_and_no_larger_than_asked() -> None:
    batches = list(ShardedBatches(10, 4))
    assert list(chain(*batches)) == list(range(10))
    assert [len(batch) for batch in batches] == [3, 3, 4]


def test_evaluation_batches_name_their_examples() -> None:
    batch = EvaluationBatches(Numbered(9), lambda image: image / 9)[[8, 0]]
    assert batch.keys() == {"x", "y", "index"}
    assert batch["index"].tolist() == batch["y"].tolist() == [8, 0]
    assert torch.equal(batch["x"], torch.tensor([8 / 9, 0.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2))


def test_the_loader_accepts_its_own_state_alone() -> None:
    loader = ResumableLoader(EvaluationBatches(Numbered(2), jitter), batch_size=None)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"no state of its own, got \['position'\]"):
        loader.load_state_dict({"position": 3})
