"""What enters as a batch comes into one form, or costs a sentence."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dat_lightning.core.errors import InputError
from dat_lightning.data.batches import (
    EvaluationEntry,
    batch_part,
    check_classes,
    check_pixels,
    class_labels,
    only_loader,
    stacked,
)

IMAGES = torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 3


def trainer_of(rank: int = 0, world_size: int = 1) -> Trainer:
    return cast(Trainer, SimpleNamespace(global_rank=rank, world_size=world_size, lightning_module=None))


def loader_of(labels: Tensor = LABELS, images: Tensor = IMAGES, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, labels), **{"batch_size": 4, **kwargs})


def entered(loader: Any, who: str = "Probe", **kwargs: Any) -> dict[str, Tensor]:
    """All batches of a loader, in form, put together."""
    entry = EvaluationEntry(who, loader, trainer_of(), **kwargs)
    batches = [entry(batch) for batch in only_loader(loader, who)]
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


# Pixels.


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-9e-4, 1 + 9e-4), (0.25, 0.25)])
def test_pixels_in_the_box_pass(low: float, high: float) -> None:
    check_pixels(torch.tensor([[low, high]]), "x")
    check_pixels(torch.tensor([[low, high]], dtype=torch.bfloat16), "x")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((IMAGES - 0.5) / 0.25, r"x must be images in \[0, 1\], got values in \[-1.\d+, 1.\d+\]: .*mean and std"),
        (IMAGES * 255, r"x must be images in \[0, 1\], got values in \[[\d.]+, 2\d\d.*\]"),
        (torch.tensor([[0.5, 1.01]]), r"got values in \[0.5, 1.01\]"),
        (torch.tensor([[0.5, 1.0011]]), r"got values in \[0.5, 1.001\]"),
        (torch.tensor([[-0.01, 0.5]]), r"got values in \[-0.01, 0.5\]"),
        (torch.tensor([[0.5, torch.nan]]), r"got values in \[nan, nan\]"),
        (torch.tensor([[0.5, torch.inf]]), r"got values in \[0.5, inf\]"),
        ((IMAGES * 255).byte(), r"x must be float images in \[0, 1\], got torch.uint8: divide eight-bit pixels by 255"),
        (torch.tensor([0.5]), r"x must be images \(N, C, H, W\), got shape \(1,\)"),
    ],
)
def test_other_pixels_are_refused_with_their_range(images: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_pixels(images, "x")


def test_nan_may_be_left_to_others_and_hides_nothing() -> None:
    check_pixels(torch.tensor([[0.5, torch.nan]]), "x", allow_nan=True)
    check_pixels(torch.full((1, 2), torch.nan), "x", allow_nan=True)
    with pytest.raises(InputError, match=r"got values in \[-2, 0.5\]"):
        check_pixels(torch.tensor([[0.5, torch.nan, -2.0]]), "x", allow_nan=True)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (torch.zeros(2, 2), r"torch.float32 \(2, 2\)"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), r"torch.uint8 \(1, 2, 2\)"),
        ("cat.png", "str"),
    ],
)
def test_only_float_images_are_stacked(image: Any, found: str) -> None:
    with pytest.raises(InputError, match=rf"the seeds must be float tensors \(C, H, W\) .* got {found}"):
        stacked([torch.zeros(1, 2, 2), image], "the seeds")
    assert stacked([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)], "the seeds").mean() == 0.5


def test_stacked_images_are_float32() -> None:
    images = [torch.full((1, 2, 2), 0.5, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    assert stacked(images, "the seeds").dtype == torch.float32
    assert bool((stacked(images, "the seeds") == 0.5).all())


@pytest.mark.parametrize("network", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("images", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_images_have_the_precision_of_the_network_or_are_float32(network: torch.dtype, images: torch.dtype) -> None:
    trainer = trainer_of()
    trainer.lightning_module = torch.nn.Linear(4, 2, dtype=network)  # type: ignore[assignment, misc]
    entry = EvaluationEntry("Probe", loader_of(), trainer)
    batch = (IMAGES[:4].to(images), LABELS[:4])
    if images in (torch.float32, network):
        assert entry(batch)["x"].dtype == images
    else:
        said = f"x of Probe must be images of {network}, as the network's weights are, got {images}: let the data give"
        with pytest.raises(InputError, match=said):
            entry(batch)


# Labels.


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16, torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("shape", [(10,), (10, 1)])
def test_labels_of_any_type_become_int64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    labels = LABELS % 2 if dtype == torch.bool else LABELS
    found = class_labels(labels.to(dtype).view(shape), "y")
    assert found.dtype == torch.int64
    assert torch.equal(found, labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(3), r"y must be class indices, integers \(N,\), got torch.float32 of shape \(3, 3\): .*argmax\(1\)"),
        (torch.tensor([1.0, 0.7]), r"y must be class indices, integers \(N,\), got 0.7 among them"),
        (torch.tensor([1.0, torch.nan]), r"got nan among them"),
        (torch.tensor([1.0, torch.inf]), r"got inf among them"),
        (torch.tensor([-torch.inf, 1.0]), r"got -inf among them"),
        (torch.tensor(1), r"got torch.int64 of shape \(\)"),
    ],
)
def test_other_labels_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        class_labels(labels, "y")


def test_a_batch_part_costs_no_look_at_values() -> None:
    # A tensor on the meta device has no values: looking at one is an error.
    batch = {"x": torch.zeros(2, 1, 2, 2, device="meta"), "y_gen": torch.zeros(2, 1, device="meta")}
    assert batch_part(batch, "x", "Probe") is batch["x"]
    labels = batch_part(batch, "y_gen", "Probe")
    assert (labels.dtype, labels.shape) == (torch.int64, (2,))


def test_a_missing_part_is_named_with_who_supplies_it() -> None:
    with pytest.raises(InputError, match=r"Probe needs 'x_ood' in its batch, got \['x'\]; .* data.streams has 'ood'"):
        batch_part({"x": IMAGES}, "x_ood", "Probe")
    with pytest.raises(InputError, match=r"Probe needs 'y' in its batch, got list; an evaluation loader of"):
        batch_part([IMAGES], "y", "Probe")


def test_labels_must_be_classes_of_the_network() -> None:
    check_classes(LABELS, torch.zeros(10, 3), "Probe")
    for labels, found in ((LABELS + 1, "1 … 3"), (LABELS - 1, "-1 … 1")):
        with pytest.raises(InputError, match=f"Probe: labels must lie in 0 … 2, got {found}"):
            check_classes(labels, torch.zeros(10, 3), "Probe")
    with pytest.raises(InputError, match=r"Probe needs logits \(N, K\) of at least 2 classes, got shape \(10, 1\)"):
        check_classes(LABELS, torch.zeros(10, 1), "Probe")


# Loaders.


def test_a_collection_of_one_loader_is_that_loader() -> None:
    loader = loader_of()
    for collection in (loader, [loader], (loader,), {"a": loader}, CombinedLoader([loader], "sequential"), [[loader]]):
        assert only_loader(collection, "Probe") is loader
    with pytest.raises(InputError, match="Probe evaluates one loader, got 2"):
        only_loader([loader, loader], "Probe")
    with pytest.raises(InputError, match="Probe evaluates one loader, got none"):
        only_loader([], "Probe")


# Batches of an evaluation.


@pytest.mark.parametrize("labels", [LABELS, LABELS.int(), LABELS.byte().view(10, 1), LABELS.double()])
def test_pairs_become_numbered_mappings(labels: Tensor) -> None:
    found = entered(loader_of(labels))
    assert torch.equal(found["x"], IMAGES)
    assert torch.equal(found["y"], LABELS)
    assert found["index"].tolist() == list(range(10))
    assert entered(loader_of(labels, batch_size=3)).keys() == {"x", "y", "index"}


def test_mappings_keep_what_they_have_and_are_numbered_through_if_they_must() -> None:
    batches = [{"x": IMAGES[:4], "y": LABELS[:4]}, {"x": IMAGES[4:], "y": LABELS[4:]}]
    assert entered(DataLoader(batches, batch_size=None))["index"].tolist() == list(range(10))  # type: ignore[arg-type]
    entry = EvaluationEntry("Probe", loader_of(), trainer_of())
    found = entry({"x": IMAGES[:2], "y": LABELS[:2], "index": torch.tensor([7, 3]), "extra": torch.ones(2)})
    assert found["index"].tolist() == [7, 3]
    assert found["extra"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", [list, tuple])
def test_images_alone_do_where_labels_are_not_needed(kind: Any) -> None:
    for batch in (kind([IMAGES[:3]]), IMAGES[:3], kind([IMAGES[:3], "names"])):
        found = EvaluationEntry("Probe", loader_of(), trainer_of(), ("x",))(batch)
        assert found.keys() == {"x", "index"}
    with pytest.raises(InputError, match=r"Probe needs 'y' in its batch, got \['x'\]"):
        EvaluationEntry("Probe", loader_of(), trainer_of())(kind([IMAGES[:3]]))


@pytest.mark.parametrize("wrapped", [False, True])
def test_ranks_number_what_a_distributed_sampler_deals_without_its_padding(wrapped: bool) -> None:
    indices = []
    for rank in range(4):
        data = TensorDataset(IMAGES, LABELS)
        sampler: Any = DistributedSampler(data, num_replicas=4, rank=rank, shuffle=False)
        loader = DataLoader(data, batch_size=2, sampler=sampler)
        entry = EvaluationEntry("Probe", [loader] if wrapped else loader, trainer_of(rank, 4))
        for batch in loader:
            found = entry(batch)
            assert torch.equal(found["x"], IMAGES[found["index"]])
            indices += found["index"].tolist()
    # Ten examples are dealt as twelve.
    assert len(indices) == 12
    assert set(indices) == set(range(10))


def test_ranks_that_each_read_everything_number_alike() -> None:
    """A loader that the DataModule gave, or with use_distributed_sampler=False, has no sampler that deals."""
    for rank in range(3):
        entry = EvaluationEntry("Probe", loader_of(), trainer_of(rank, 3))
        assert torch.cat([entry(batch)["index"] for batch in loader_of()]).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([IMAGES * 2 - 1, LABELS], r"x of Probe must be images in \[0, 1\], got values in \[-0.\d+, 0.\d+\]"),
        ([IMAGES, LABELS + 0.5], r"y of Probe must be class indices, integers \(N,\), got 0.5 among them"),
        ([IMAGES, torch.eye(10)], r"y of Probe must be class indices, .* of shape \(10, 10\)"),
        ([IMAGES, LABELS[:9]], r"needs one y and one index for each image, got the shapes .*'y': \(9,\)"),
        ({"x": IMAGES, "y": LABELS, "index": torch.zeros(10, 2)}, r"one index for each image, .*\(10, 2\)"),
        ([(IMAGES * 255).byte(), LABELS], "x of Probe must be float images"),
    ],
)
def test_batches_out_of_order_are_refused(batch: Any, message: str) -> None:
    entry = EvaluationEntry("Probe", loader_of(), trainer_of())
    entry([IMAGES, LABELS])
    with pytest.raises(InputError, match=message):
        entry(batch)


def test_a_loop_that_trains_looks_at_values_once() -> None:
    entry = EvaluationEntry("Probe", loader_of(), trainer_of(), values="first")
    with pytest.raises(InputError, match="images in"):
        entry([IMAGES * 255, LABELS])
    entry([IMAGES, LABELS])
    entry([IMAGES * 255, LABELS])
