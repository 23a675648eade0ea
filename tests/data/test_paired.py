from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dat_lightning.data import PairedDataModule, SizedDataset, Transform
from dat_lightning.data.paired import OODSplit, Split, Stream


class Constant:
    """Image i is constant at ``offset`` + i; labels, if any, are i modulo 3."""

    def __init__(self, size: int, offset: float, labelled: bool) -> None:
        self.size, self.offset, self.labelled = size, offset, labelled

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Tensor | tuple[Tensor, int]:
        image = torch.full((1, 2, 2), float(self.offset + index))
        return (image, index % 3) if self.labelled else image


class ToyDataModule(PairedDataModule):
    """25 training images from 0 on, 7 and 10 for validation and test, OOD images from 1000 and 2000 on."""

    ood: SizedDataset | None = Constant(11, 1000, labelled=False)

    def in_distribution(self, split: Split) -> SizedDataset:
        size, offset = {"train": (25, 0), "val": (7, 100), "test": (10, 200)}[split]
        return Constant(size, offset, labelled=True)

    def out_of_distribution(self, split: OODSplit) -> SizedDataset | None:
        return self.ood if split == "train" else Constant(5, 2000, labelled=False)

    def transform(self, stream: Stream) -> Transform:
        return lambda image: image + 0.1 * torch.rand(())

    def evaluation_transform(self) -> Transform:
        return lambda image: image


def attach(data: PairedDataModule, processed: int = 0, rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    """Gives the data module a trainer of which it sees the batches processed, the rank and the world size."""
    total = SimpleNamespace(processed=processed)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    cast(Any, data).trainer = SimpleNamespace(
        fit_loop=loop, global_rank=rank, world_size=world_size, state=SimpleNamespace(fn=TrainerFn.FITTING)
    )
    return total


def batches(data: PairedDataModule) -> list[dict[str, Tensor]]:
    return list(data.train_dataloader())


def assert_equal(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_training_batch_has_the_documented_keys() -> None:
    data = ToyDataModule(batch_size=4)
    first = batches(data)[0]
    assert {key: tuple(value.shape) for key, value in first.items()} == {
        "draw": (4,),
        "x_gen": (4, 1, 2, 2),
        "y_gen": (4,),
        "x_clf": (4, 1, 2, 2),
        "y_clf": (4,),
        "x_ood": (4, 1, 2, 2),
    }
    for name in ("gen", "clf"):
        index = first[f"x_{name}"][:, 0, 0, 0].long()
        assert (index < 25).all()
        assert torch.equal(first[f"y_{name}"], index % 3)
    assert ((first["x_ood"] >= 1000) & (first["x_ood"] < 1011.1)).all()
    assert not torch.equal(first["x_gen"], first["x_clf"])


@pytest.mark.parametrize(
    ("streams", "keys"),
    [
        (("clf",), {"draw", "x_clf", "y_clf"}),
        (("gen", "ood"), {"draw", "x_gen", "y_gen", "x_ood"}),
    ],
)
def test_streams_select_the_parts_of_a_batch(streams: tuple[Stream, ...], keys: set[str]) -> None:
    assert batches(ToyDataModule(batch_size=5, streams=streams))[0].keys() == keys


def test_a_stream_is_the_same_whatever_others_there_are() -> None:
    alone, all_three = (batches(ToyDataModule(batch_size=5, streams=s)) for s in (("clf",), ("gen", "clf", "ood")))
    for one, three in zip(alone, all_three, strict=True):
        assert torch.equal(one["x_clf"], three["x_clf"])


def test_the_generative_data_define_the_epoch_and_the_rest_begins_the_next_one() -> None:
    data = ToyDataModule(batch_size=4)
    total = attach(data)
    draws = list[int]()
    for _ in range(5):
        epoch = batches(data)
        assert len(epoch) == data.num_batches == 25 // 4
        total.processed += len(epoch)
        draws += torch.cat([batch["draw"] for batch in epoch]).tolist()
    assert draws == list(range(5 * 24))
    assert ToyDataModule(batch_size=1000).num_batches == 1


def test_all_ranks_together_see_what_one_process_sees() -> None:
    whole = batches(ToyDataModule(batch_size=6))
    ranks = []
    for rank in range(3):
        data = ToyDataModule(batch_size=6)
        attach(data, rank=rank, world_size=3)
        ranks.append(batches(data))
    assert_equal(
        [{k: torch.cat([part[k] for part in parts]) for k in parts[0]} for parts in zip(*ranks, strict=True)], whole
    )


def test_a_batch_size_that_ranks_cannot_share_is_refused() -> None:
    data = ToyDataModule(batch_size=7)
    attach(data, world_size=2)
    with pytest.raises(ValueError, match="divisible by the number of processes 2, got 7"):
        data.train_dataloader()


def test_evaluation_shards_cover_each_split_once_without_shuffling() -> None:
    for split, size, offset in (("val", 7, 100), ("test", 10, 200), ("predict", 10, 200)):
        seen = list[int]()
        for rank in range(2):
            data = ToyDataModule(eval_batch_size=3)
            attach(data, rank=rank, world_size=2)
            for batch in getattr(data, f"{split}_dataloader")():
                assert torch.equal(batch["x"][:, 0, 0, 0], batch["index"] + float(offset))
                assert torch.equal(batch["y"], batch["index"] % 3)
                seen += batch["index"].tolist()
        assert sorted(seen) == list(range(size))


def test_training_resumes_in_mid_epoch_where_it_stopped() -> None:
    expected = batches(ToyDataModule(batch_size=4))
    data = ToyDataModule(batch_size=4)
    total = attach(data)
    data.setup("fit")
    total.processed = 2
    state = data.state_dict()
    assert state == {
        "draws_consumed": 8,
        "batches_processed": 2,
        "batch_size": 4,
        "seed": 0,
        "stream_sizes": {},
        "num_processes": 1,
    }

    resumed = ToyDataModule(batch_size=4)
    total = attach(resumed)
    resumed.setup("fit")
    resumed.load_state_dict(state)
    # The data module is restored before the trainer's counters; the position is right before and after.
    assert resumed.draws_consumed == 8
    total.processed = 2
    assert resumed.draws_consumed == 8
    assert_equal(batches(resumed)[:4], expected[2:])
    total.processed = 5
    assert resumed.draws_consumed == 20


def test_another_batch_size_continues_from_the_same_draw() -> None:
    data = ToyDataModule(batch_size=6)
    total = attach(data)
    data.setup("fit")
    data.load_state_dict({"draws_consumed": 40, "batches_processed": 10, "batch_size": 4, "seed": 0})
    total.processed = 13
    assert data.draws_consumed == 40 + 3 * 6
    assert batches(data)[0]["draw"].tolist() == list(range(58, 64))
    sizes = {"gen": 25, "clf": 25, "ood": 11}
    position = {"draws_consumed": 58, "batches_processed": 13, "batch_size": 6}
    assert data.state_dict() == position | {"seed": 0, "stream_sizes": sizes, "num_processes": 1}


def test_a_resume_on_other_data_says_so() -> None:
    first = ToyDataModule(batch_size=6)
    total = attach(first)
    first.setup("fit")
    first.train_dataloader()
    total.processed = 2
    state = first.state_dict()
    resumed = ToyDataModule(batch_size=6)
    resumed.ood = Constant(12, 1000, labelled=False)
    total = attach(resumed)
    resumed.setup("fit")
    resumed.load_state_dict(state)
    total.processed = 2
    with pytest.warns(UserWarning, match=r"number of images has changed since the checkpoint \(ood: 11 → 12\)"):
        resumed.train_dataloader()
    resumed.train_dataloader()


def test_another_seed_cannot_continue() -> None:
    data = ToyDataModule(seed=1)
    with pytest.raises(ValueError, match=r"data.seed is 1, but the checkpoint was trained with 0"):
        data.load_state_dict(ToyDataModule(seed=0).state_dict())


def test_a_trainer_that_fits_on_goes_on_and_a_new_one_starts_anew() -> None:
    data = ToyDataModule(batch_size=4)
    attach(data, processed=9)
    data.setup("fit")
    assert data.draws_consumed == 36
    data.setup("test")
    assert data.draws_consumed == 36
    data.load_state_dict({"draws_consumed": 100, "batches_processed": 9, "batch_size": 4, "seed": 0})
    attach(data, processed=0)
    data.setup("fit")
    assert data.draws_consumed == 0


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("eval_batch_size", -1), ("num_workers", -1)])
def test_numbers_outside_their_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least ., got {value}"):
        ToyDataModule(**{name: value})  # type: ignore[arg-type]


def test_without_a_trainer_nothing_is_consumed() -> None:
    assert ToyDataModule().state_dict() == {
        "draws_consumed": 0,
        "batches_processed": 0,
        "batch_size": 128,
        "seed": 0,
        "stream_sizes": {},
        "num_processes": 1,
    }


def test_held_out_seeds_are_an_endless_stream_of_other_images() -> None:
    seeds = ToyDataModule().held_out_seeds()
    assert sorted(int(seeds(i)[0][0, 0, 0]) for i in range(5, 10)) == [2000, 2001, 2002, 2003, 2004]
    assert torch.equal(seeds(123456789)[0], ToyDataModule().held_out_seeds()(123456789)[0])


def test_reference_data_are_the_training_images_in_order() -> None:
    reference = ToyDataModule().reference_data()
    assert reference[[3, 24]]["x"][:, 0, 0, 0].tolist() == [3, 24]


def test_training_images_as_ood_are_refused() -> None:
    data = ToyDataModule()
    data.ood = Constant(25, 0, labelled=True)
    with pytest.raises(ValueError, match="of ToyDataModule are the training images: 100%"):
        data.setup("fit")


@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_training_images_as_seeds_of_samples_are_refused(stage: str) -> None:
    class Copying(ToyDataModule):
        def out_of_distribution(self, split: OODSplit) -> SizedDataset | None:
            return self.in_distribution("train") if split == "held_out" else super().out_of_distribution(split)

    with pytest.raises(ValueError, match="the held-out seeds of Copying are the training images: 100%"):
        Copying().setup(stage)


def test_only_a_fit_that_uses_ood_images_compares_them() -> None:
    for streams, stage in ((("clf",), "fit"), (("gen", "clf", "ood"), "test")):
        data = ToyDataModule(streams=cast(Any, streams))
        data.ood = Constant(25, 0, labelled=True)
        data.setup(stage)
        assert data.draws_consumed == 0


@pytest.mark.parametrize("ood", [None, Constant(0, 0, labelled=False)])
def test_missing_ood_images_are_refused_where_they_are_needed(ood: SizedDataset | None) -> None:
    data = ToyDataModule(streams=("clf",))
    data.ood = ood
    data.setup("fit")
    assert len(batches(data)) == 1

    data = ToyDataModule()
    data.ood = ood
    for use in (lambda: data.setup("fit"), data.train_dataloader):
        with pytest.raises(ValueError, match=r"no out-of-distribution images \(train\)"):
            use()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size .* 0"),
        ({"eval_batch_size": -1}, "eval_batch_size .* -1"),
        ({"streams": ()}, "streams must be some of"),
        ({"streams": ("gen", "real")}, "streams must be some of .* 'real'"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToyDataModule(**arguments)
