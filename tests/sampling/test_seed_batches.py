"""Seeds are the same, counted alike, and no random number moves, whichever process reads them."""

import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dat_lightning import DigitsDataModule, DigitsFeatures, FrechetDistance, PGDSampler, SampleBatch, SamplingPlan
from dat_lightning.core import Logits
from dat_lightning.core.errors import InputError
from dat_lightning.data.draws import DrawStream
from dat_lightning.data.entries import SizedDataset
from dat_lightning.data.paired import OODSplit
from dat_lightning.data.pixels import CorruptImageError
from dat_lightning.runs.error_sentences import error_sentence
from dat_lightning.sampling.reference import ReferenceImages
from dat_lightning.sampling.seed_batches import SeedBatches, Seeds
from tests import tiny
from tests.sampling.test_sampling import Collector, Counting, ForeignModule, Interrupted, same_batches

# Machines with fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

BATCHES = [range(5), range(5, 10), range(10, 13)]


def plain(index: int) -> tuple[Tensor, None]:
    """A seed that is a function of its index, at the top of a module."""
    return torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(index)), None


def read(seeds: Seeds, num_workers: int, batches: Sequence[Sequence[int]] = BATCHES) -> list[Tensor]:
    return list(SeedBatches(seeds, batches, torch.empty(0), num_workers))


class Damaged:
    """Photograph crops of which some cannot be read."""

    def __init__(self, damaged: Sequence[int]) -> None:
        self.images = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        self.damaged = damaged

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.damaged:
            raise CorruptImageError(f"crop {index}", "its bytes are gone")
        return self.images[index]


class DamagedSeeds(DigitsDataModule):
    """Digits whose seeds are partly damaged."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(batch_size=32, num_workers=num_workers)

    def out_of_distribution(self, split: OODSplit) -> SizedDataset:
        return Damaged([3, 8, 12, 13])


class Foreign(LightningDataModule):
    """A DataModule of another project: a function for its seeds, and a number of workers."""

    def __init__(self, seeds: Seeds, num_workers: int) -> None:
        super().__init__()
        self.seeds = seeds
        self.num_workers = num_workers

    def held_out_seeds(self) -> Seeds:
        return self.seeds

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.rand(2, 1, 16, 16)))


class Images(ForeignModule):
    """A module of another project whose batches are a list of images."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Leaves everything to the callbacks."""


def test(path: Path, data: LightningDataModule, *callbacks: Callback, **kwargs: Any) -> None:
    module: LightningModule = Images() if isinstance(data, Foreign) else tiny.stage1()
    trainer = tiny.trainer(path, callbacks, limit_test_batches=1, **kwargs)
    trainer.test(module, datamodule=data, verbose=False)


test.__test__ = False  # type: ignore[attr-defined]


def random_states() -> list[bytes]:
    numpy_state = np.random.get_state()  # noqa: NPY002  the generator that other people's code uses
    return [torch.get_rng_state().numpy().tobytes(), repr(numpy_state).encode(), repr(random.getstate()).encode()]


# The same seeds.


@pytest.mark.parametrize("num_workers", [0, 1, 2, 7])
def test_seeds_are_the_same_whoever_reads_them(num_workers: int) -> None:
    """Also where a batch has fewer seeds than there are processes, or there is none."""
    stream = tiny.digits().held_out_seeds()
    for seeds in (plain, lambda index: plain(index + 1), stream):
        found = read(seeds, num_workers)
        for batch, images in zip(BATCHES, found, strict=True):
            assert torch.equal(images, torch.stack([seeds(index)[0] for index in batch]))
    assert read(plain, num_workers, []) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_seeds_have_the_type_of_the_network(dtype: torch.dtype) -> None:
    for workers in (0, 2):
        (images,) = SeedBatches(plain, [range(3)], torch.empty(0, dtype=dtype), workers)
        assert images.dtype == dtype
        assert torch.equal(images, torch.stack([plain(index)[0] for index in range(3)]).to(dtype))


@pytest.mark.parametrize("inference_mode", [False, True])
def test_samples_are_the_same_for_any_number_of_workers(inference_mode: bool, tmp_path: Path) -> None:
    collectors = [Collector(), Collector()]
    for workers, collector in zip((0, 2), collectors, strict=True):
        test(tmp_path, tiny.digits(num_workers=workers), Counting(), collector, inference_mode=inference_mode)
    assert len(collectors[1].batches) == 3
    assert all(same_batches(a, b) for a, b in zip(*(c.batches for c in collectors), strict=True))


def test_kept_samples_are_found_with_another_number_of_workers(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        test(tmp_path, tiny.digits(), Counting(dirpath=str(tmp_path / "kept")), Interrupted(12))
    resumed, found, expected = Counting(dirpath=str(tmp_path / "kept")), Collector(), Collector()
    test(tmp_path, tiny.digits(num_workers=2), resumed, found)
    assert resumed.begun == [20]
    test(tmp_path, tiny.digits(), Counting(), expected)
    assert all(same_batches(a, b) for a, b in zip(found.batches, expected.batches, strict=True))


# Overlap.


class Noting:
    """Seeds that leave a file with the number of the process for each that was read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, index: int) -> tuple[Tensor, None]:
        (self.folder / f"{index}-{os.getpid()}").touch()
        return torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(index)), None

    def read(self) -> dict[int, set[int]]:
        """Index → the processes that have read it so far."""
        found: dict[int, set[int]] = {}
        for path in self.folder.iterdir():
            index, process = map(int, path.name.split("-"))
            found.setdefault(index, set()).add(process)
        return found


class Watching(Counting):
    """Looks at what was read when the chain of each batch runs.

    Args:
        noting: The seeds.
        waits: Whether a chain waits until the seeds of the next batch were read: for ever, if nobody else reads them.
    """

    def __init__(self, noting: Noting, waits: bool) -> None:
        super().__init__()
        self.noting = noting
        self.waits = waits
        self.seen: list[int] = []

    def generate(self, logits: Logits, seeds: Tensor, indices: Tensor, num_classes: int) -> SampleBatch:
        expected = min(int(indices[-1]) + 1 + 10, 25) if self.waits else 0
        deadline = time.monotonic() + 120
        while len(self.noting.read()) < expected:
            assert time.monotonic() < deadline, "the next seeds are not read while the chain runs"
            time.sleep(0.01)
        self.seen.append(len(self.noting.read()))
        return super().generate(logits, seeds, indices, num_classes)


@pytest.mark.parametrize(("num_workers", "seen"), [(0, [10, 20, 25]), (2, [20, 25, 25])])
def test_the_next_seeds_are_read_while_a_chain_runs(num_workers: int, seen: list[int], tmp_path: Path) -> None:
    """One batch ahead, not more, by all processes; without any, each batch is read before its chain."""
    folder = tmp_path / "read"
    folder.mkdir()
    noting = Noting(folder)
    watching = Watching(noting, waits=num_workers > 0)
    test(tmp_path, Foreign(noting, num_workers), watching, Collector())
    assert watching.seen == seen
    readers = [noting.read()[index] - {os.getpid()} for index in range(25)]
    assert len(set.union(*readers)) == num_workers
    # The halves of a batch were read by the two processes.
    assert all((readers[first] != readers[first + 5]) == (num_workers > 0) for first in (0, 10))


@pytest.mark.parametrize("of_seeds", [False, True])
def test_an_error_leaves_no_process_behind(of_seeds: bool, tmp_path: Path) -> None:
    """One of a consumer, or one with the seeds."""
    data = DamagedSeeds(0)
    data.max_skipped_share = 0.0
    seeds = data.held_out_seeds() if of_seeds else Noting(tmp_path)
    with pytest.raises((InterruptedError, ValueError)) as caught:
        test(tmp_path / "run", Foreign(seeds, 2), Counting(), Interrupted(12))
    assert ("could not be read" in str(caught.value)) == of_seeds
    # While somebody still holds the error, and with it the frames that it went through.
    assert caught.value.__traceback__ is not None
    assert multiprocessing.active_children() == []


# What seeds are.


def bare(index: int) -> Tensor:
    return plain(index)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seeds_without_labels_need_no_pair(num_workers: int) -> None:
    assert all(map(torch.equal, read(bare, num_workers), read(plain, 0)))
    assert all(map(torch.equal, read(lambda index: [bare(index), 3], 0), read(plain, 0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"held_out_seeds\(\) must be float tensors \(C, H, W\) .* got torch.float32 \(4, 4\)"),
        (lambda x: (x * 255).byte(), r"held_out_seeds\(\) must be float tensors \(C, H, W\) .* got torch.uint8"),
        (lambda x: x.numpy(), r"held_out_seeds\(\) must be float tensors \(C, H, W\) .* got ndarray"),
        (lambda x: x * 2 - 1, r"held_out_seeds\(\) must be images in \[0, 1\], got values in \[-0.9"),
    ],
)
def test_seeds_that_are_no_images_are_refused_before_a_chain_begins(change: Any, message: str, tmp_path: Path) -> None:
    collector = Collector()
    with pytest.raises(ValueError, match=message):
        test(tmp_path, Foreign(lambda index: change(bare(index)), 0), Counting(), collector)
    assert collector.calls == []


def test_every_seed_is_looked_at() -> None:
    with pytest.raises(ValueError, match=r"held_out_seeds\(\) must be images in \[0, 1\], got .*, 2\d\d\]"):
        read(lambda index: bare(index) * (255 if index == 7 else 1), 0)
    with pytest.raises(ValueError, match=r"held_out_seeds.* have several shapes"):
        read(lambda index: bare(index)[:, : 4 - (index == 7)], 0)


# Corrupt seeds.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_seeds_are_replaced_and_logged(num_workers: int, tmp_path: Path) -> None:
    data, collector = DamagedSeeds(num_workers), Collector()
    stream = DrawStream(Damaged([3, 8, 12, 13]), data.seed_transform(), data.seed, "held-out seeds")
    expected = torch.stack([stream(index)[0] for index in range(25)])
    assert stream.images.num_skipped >= 4
    # A file, which loader processes share.
    handler = logging.FileHandler(tmp_path / "log", delay=True)
    logging.getLogger("dat_lightning").addHandler(handler)
    try:
        test(tmp_path, data, Counting(), collector)
    finally:
        logging.getLogger("dat_lightning").removeHandler(handler)
        handler.close()
    assert torch.equal(torch.cat([batch.seeds for batch in collector.batches]), expected)
    logged = [line.partition(": ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert {line.partition(" is ")[0] for line in logged} == {f"crop {index}" for index in (3, 8, 12, 13)}
    # The comparison with the training images names each once, and so does each process that makes seeds.
    assert len(logged) == 8 if num_workers == 0 else 8 <= len(logged) <= 16


@pytest.mark.parametrize(("num_workers", "max_skipped_share"), [(0, 0.003), (2, 0.0)])
def test_too_many_corrupt_seeds_end_the_run_whoever_reads_them(
    num_workers: int, max_skipped_share: float, tmp_path: Path
) -> None:
    """Of 14 images four are corrupt: three are allowed in the first case, and none in the second."""
    data, collector = DamagedSeeds(0), Collector()
    data.max_skipped_share = max_skipped_share
    message = rf"images could not be read, and \d+ could, more than data.max_skipped_share {max_skipped_share:g} allows"
    with pytest.raises(InputError, match=message):
        test(tmp_path, Foreign(data.held_out_seeds(), num_workers), Counting(batch_size=5), collector)
    # Samples of the batches before were handed out.
    stream = DamagedSeeds(0).held_out_seeds()
    failed = next(i for i in (0, *range(25)) if stream(i) and stream.images.num_skipped > 1000 * max_skipped_share)
    assert len(collector.batches) == failed // 5


# Random numbers.


class References(Collector):
    """Notes the states of all random numbers where it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[list[bytes]] = []

    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        self.states.append(random_states())

    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append(random_states())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_does_not_move_the_random_numbers_of_training(num_workers: int, tmp_path: Path) -> None:
    """From before the reference of the Fréchet distance is made until all samples are there."""
    notes = References()
    fid = FrechetDistance(DigitsFeatures(), cache_dir=str(tmp_path / "cache"), batch_size=500)
    test(tmp_path, tiny.digits(num_workers=num_workers), Counting(), notes, fid)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    before, after = notes.states
    assert before == after


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_beside_training_leave_its_random_numbers_alone(num_workers: int) -> None:
    data = tiny.digits(num_workers=num_workers)
    trainer = SimpleNamespace(
        datamodule=data, global_rank=0, world_size=1, is_global_zero=True, progress_bar_callback=None
    )
    reference = ReferenceImages(cast(Trainer, trainer), data.reference_data(), 500, "A test")
    batches = SeedBatches(data.held_out_seeds(), BATCHES, torch.empty(0), num_workers)
    data.eval_batch_size = 120
    loaders: list[Callable[[], Iterator[Any]]] = [
        lambda: iter(reference),
        lambda: iter(batches),
        lambda: iter(data.test_dataloader()),
    ]
    for loader in loaders:
        before = random_states()
        assert len(list(loader())) == 3
        assert random_states() == before


# Failures.


class Failing:
    """Seeds of which one cannot be had.

    Args:
        fail: What happens at seed 11, in a loader process.
    """

    def __init__(self, fail: Callable[[], None]) -> None:
        self.fail = fail

    def __call__(self, index: int) -> tuple[Tensor, None]:
        if index == 11 and torch.utils.data.get_worker_info() is not None:
            self.fail()
        return plain(index)


def gone() -> None:
    raise FileNotFoundError("no image at /nowhere/11.png")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_of_a_loader_process_is_that_error() -> None:
    with closing(iter(SeedBatches(Failing(gone), BATCHES, torch.empty(0), 2))) as batches:
        assert torch.equal(next(batches), torch.stack([plain(index)[0] for index in range(5)]))
        next(batches)
        with pytest.raises(FileNotFoundError, match=r"no image at /nowhere/11\.png"):
            next(batches)
        assert multiprocessing.active_children() == []


def test_a_killed_loader_process_is_an_error_that_says_so() -> None:
    """Whenever torch notices: it looks for it in the main process at any moment."""
    with (
        pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)") as caught,
        closing(iter(SeedBatches(Failing(killed), BATCHES, torch.empty(0), 2))) as batches,
    ):
        list(batches)
    assert "a loader process (pid" in (error_sentence(caught.value) or "")


# Start methods.


@pytest.fixture
def spawn() -> Iterator[None]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawn")
def test_seeds_that_cannot_be_pickled_are_read_in_the_main_process(tmp_path: Path) -> None:
    noting, collector = Noting(tmp_path), Collector()
    with pytest.warns(UserWarning, match=r"lambda.* cannot be pickled .* num_workers=2 needs .* by 'spawn': seeds are"):
        test(tmp_path / "run", Foreign(lambda index: noting(index), 2), Counting(), collector)
    assert torch.equal(collector.batches[2].seeds, torch.stack([noting(index)[0] for index in range(20, 25)]))
    assert set.union(*noting.read().values()) == {os.getpid()}


@pytest.mark.slow
@pytest.mark.usefixtures("spawn")
def test_seeds_are_the_same_in_spawned_processes() -> None:
    data = DamagedSeeds(0)
    assert all(map(torch.equal, read(data.held_out_seeds(), 2), read(data.held_out_seeds(), 0)))


# A GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_seeds_come_to_a_gpu_from_everywhere(num_workers: int) -> None:
    there = [plain(index)[0].cuda() for index in range(13)]
    for seeds in (plain, lambda index: (there[index], None)):
        found = torch.cat(list(SeedBatches(seeds, BATCHES, torch.empty(0, device="cuda"), num_workers)))
        assert found.is_cuda
        assert torch.equal(found, torch.stack(there))


def test_a_sampler_takes_a_data_module_without_workers(tmp_path: Path) -> None:
    data, collector = Foreign(Noting(tmp_path), 0), Collector()
    del data.num_workers
    test(tmp_path / "run", data, PGDSampler(num_samples=3, num_steps=[1], batch_size=2), collector)
    assert [len(batch.seeds) for batch in collector.batches] == [2, 1]
