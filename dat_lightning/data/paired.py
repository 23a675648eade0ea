"""The base of all DataModules: in-distribution images paired with out-of-distribution seeds."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from dat_lightning.core.errors import InputError, require_choice, require_counts
from dat_lightning.data.draws import (
    DrawBatches,
    DrawSource,
    DrawStream,
    EvaluationBatches,
    OrderedStream,
    PairedDraws,
    ResumableLoader,
    ShardedBatches,
    Transform,
)
from dat_lightning.data.entries import SizedDataset, check_share
from dat_lightning.data.fingerprint import shared_images
from dat_lightning.data.transforms import squash

Stream = Literal["gen", "clf", "ood"]
Split = Literal["train", "val", "test"]
OODSplit = Literal["train", "held_out"]
SeedTransform = Literal["augment", "squash"]


class PairedDataModule(LightningDataModule):
    """Training batches of ``x_gen, y_gen, x_clf, y_clf, x_ood`` and ``draw``; evaluation batches of ``x, y, index``.

    The generative data define the epoch; all streams go on endlessly, reshuffled each pass, and one counter, which the
    checkpoint keeps, says where they are (see :class:`~dat_lightning.data.draws.DrawStream`).

    Override :meth:`in_distribution` and :meth:`out_of_distribution` to supply data, :meth:`transform` to supply
    augmentations, and :meth:`evaluation_transform` for what evaluation, reference statistics and seeds have in common.

    Args:
        batch_size: Global batch size in training, shared evenly by all processes.
        eval_batch_size: Examples per batch and process in evaluation.
        num_workers: Loader processes per rank; 0 loads in the training process.
        streams: Which parts a training batch has. Stage 1 needs ``clf`` alone.
        seed: Seed of data order and augmentation.
        max_skipped_share: Share of a stream's images that may be corrupt; those are skipped and logged with their
            paths. More of them stop the run.
        seed_transform: How held-out images become seeds of samples: ``augment``, in a random order and by
            :meth:`seed_transform`, which crops and flips as in training unless it is overridden; or ``squash``, in the
            order in which they are stored, both sides resized to those of evaluation's images by PIL, without crop or
            flip, as the paper's published code does.

    Raises:
        InputError: If a size is not positive, or a stream or ``seed_transform`` is unknown; on set-up, if the OOD
            images are training images, as far as :func:`~dat_lightning.data.shared_images` sees it, or there are none
            although ``ood`` is among the streams; during a run, if too many images are corrupt.
    """

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        streams: Sequence[Stream] = ("gen", "clf", "ood"),
        seed: int = 0,
        max_skipped_share: float = 0.01,
        seed_transform: SeedTransform = "augment",
    ) -> None:
        super().__init__()
        require_counts(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        require_counts(0, num_workers=num_workers)
        unknown = [s for s in streams if s not in get_args(Stream)]
        if unknown or not streams:
            raise InputError(f"streams must be some of {get_args(Stream)}, got {list(streams)}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.streams = tuple(streams)
        self.seed = seed
        check_share(max_skipped_share)
        self.max_skipped_share = max_skipped_share
        require_choice(get_args(SeedTransform), seed_transform=seed_transform)
        # Of that name is the method.
        self._seed_transform = seed_transform
        # Draws consumed when training (re)started, and the trainer's count of processed batches at that moment.
        self._start_draw = 0
        self._start_batch = 0
        self._stream_sizes: dict[str, int] = {}

    # What a subclass supplies.

    @abstractmethod
    def in_distribution(self, split: Split) -> SizedDataset:
        """Returns the labelled data set of a split: (image, label) pairs."""

    @abstractmethod
    def out_of_distribution(self, split: OODSplit) -> SizedDataset | None:
        """Returns OOD images without labels; those of the two splits are disjoint; ``None`` if there are none."""

    @abstractmethod
    def transform(self, stream: Stream) -> Transform:
        """Returns the augmentation of a training stream: weak for ``gen`` and ``ood``, strong for ``clf``."""

    @abstractmethod
    def evaluation_transform(self) -> Transform:
        """Returns the deterministic transform of evaluation and of reference statistics."""

    def seed_transform(self) -> Transform:
        """Returns the transform of held-out OOD seeds under ``augment``; by default that of OOD images in training."""
        return self.transform("ood")

    def stored_seeds(self) -> SizedDataset:
        """Returns the held-out OOD images as they are taken under ``squash``: in the order in which they are stored."""
        return self._require_ood("held_out")

    # What everybody else uses.

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the labelled images, where that is known without reading them; the modules check it."""
        return None

    @property
    def training_size(self) -> int:
        """Number of in-distribution training images, which define the epoch."""
        return len(self.in_distribution("train"))

    @property
    def num_batches(self) -> int:
        """Training batches in an epoch; what is left over begins the next one."""
        return max(1, self.training_size // self.batch_size)

    @property
    def draws_consumed(self) -> int:
        """Number of draws that training has used so far, over all ranks."""
        # A checkpoint's loop counters are restored later than the DataModule, hence the max.
        return self._start_draw + max(0, self._batches_processed() - self._start_batch) * self.batch_size

    @property
    def seed_settings(self) -> dict[str, str]:
        """How held-out images become seeds, as figures of samples have it among their settings."""
        return {"seed_transform": self._seed_transform}

    def training_stream(self, name: Stream) -> DrawSource:
        """Returns the endless draws of a stream, as training batches have them."""
        return self._draws(self._dataset(name), self.transform(name), name)

    def held_out_seeds(self) -> DrawStream:
        """Returns the endless stream of OOD seeds for generation: seed i is a pure function of i.

        Raises:
            InputError: If the data have no OOD images.
        """
        if self._seed_transform == "squash":
            seeds, few = self.stored_seeds(), self.in_distribution("test")
            # Evaluation's images say what the network takes; one of the first can be read.
            height, width = EvaluationBatches(few, self.evaluation_transform())[range(min(8, len(few)))]["x"].shape[-2:]
            transform = squash((height, width))
            return OrderedStream(seeds, transform, self.seed, "held-out seeds", self.max_skipped_share)
        return self._draws(self._require_ood("held_out"), self.seed_transform(), "held-out seeds")

    def reference_data(self) -> EvaluationBatches:
        """Returns the training images as evaluation sees them: the reference of the Fréchet distance."""
        return EvaluationBatches(self.in_distribution("train"), self.evaluation_transform())

    def setup(self, stage: str) -> None:
        """Checks that OOD data exist where they are needed and are not the training data; a new Trainer starts anew."""
        others: dict[tuple[str, str], SizedDataset] = {}
        if "ood" in self.streams and stage == "fit":
            what = "out-of-distribution images", "Stage 2 would push up the energy of its own data"
            others[what] = self._require_ood("train")
        held_out = self.out_of_distribution("held_out")
        if held_out is not None and len(held_out) > 0:
            others["held-out seeds", "Samples that begin at them would be copies"] = held_out
        self._check_apart(others)
        if stage == "fit" and self._batches_processed() == 0:
            self._start_draw, self._start_batch, self._stream_sizes = 0, 0, {}

    def train_dataloader(self) -> ResumableLoader:
        """Returns batches of the chosen streams, this rank's part.

        Raises:
            InputError: If the Trainer is to overfit some batches: draws are endless and never repeat.
        """
        overfit: float = getattr(self.trainer, "overfit_batches", 0.0)
        if overfit:
            raise InputError(
                f"trainer.overfit_batches={overfit} cannot work with an endless stream of draws; use a data set of"
                " a few images, or trainer.limit_train_batches"
            )
        streams: dict[str, DrawSource] = {name: self.training_stream(name) for name in self.streams}
        self._note_sizes(streams)
        sampler = DrawBatches(self.batch_size, self.num_batches, lambda: self.draws_consumed, *self._rank())
        return self._loader(PairedDraws(streams), sampler)

    def val_dataloader(self) -> ResumableLoader:
        """Returns the validation split, this rank's share."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> ResumableLoader:
        """Returns the test split, this rank's share."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Returns the test split, this rank's share."""
        return self._evaluation_loader("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch, but for the numbers of its draws: they name random streams, which the host reads."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return {**moved, "draw": batch["draw"]} if "draw" in batch else moved

    def on_exception(self, exception: BaseException) -> None:
        """Adds what it means, and how the run goes on, to the error of a process that lost contact with another one."""
        # Gloo raises bare RuntimeErrors, of which these words are typical.
        from_gloo = any(words in str(exception) for words in ("gloo/", "caused pair closure"))
        if (from_gloo or isinstance(exception, getattr(torch.distributed, "DistError", ()))) and self._rank()[1] > 1:
            rank, size = self._rank()
            exception.args = (
                f"{exception}\nprocess {rank} of {size} has lost contact with another one, which was killed, failed, or"
                " is on a machine that is gone; look at its own output first. This run is over; start all of its"
                " processes again, with --ckpt_path last, and it goes on from its last checkpoint.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the data and the settings that give it its meaning."""
        return {
            "draws_consumed": self.draws_consumed,
            "batches_processed": self._batches_processed(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "stream_sizes": dict(self._stream_sizes),
            "num_processes": self._rank()[1],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the checkpoint stopped; batch size and number of processes may differ, the seed may not.

        An evaluation continues nothing, and takes a checkpoint of any seed.

        Raises:
            InputError: If the checkpoint was made with another seed, so that images would repeat and others be missed;
                or if its position is none.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        position = {name: state.get(name) for name in ("draws_consumed", "batches_processed")}
        require_counts(0, **position)
        sizes = dict(state.get("stream_sizes", {}))
        require_counts(0, **{f"stream_sizes of {name}": size for name, size in sizes.items()})
        require_counts(1, batch_size=state.get("batch_size"), num_processes=state.get("num_processes") or 1)
        if state["seed"] != self.seed:
            raise InputError(
                f"data.seed is {self.seed}, but the checkpoint was trained with {state['seed']}: the data order would"
                " not continue. Set it back, or start a new run from the weights alone (model.init_from)."
            )
        before, now = state.get("num_processes"), self._rank()[1]
        if before not in (None, now):
            rank_zero_warn(
                f"the checkpoint was written by {_processes(before)}, now there {'is' if now == 1 else 'are'} {now}:"
                " the run goes on at the same image, with the same weights, averages, optimiser and number of"
                " contrastive steps. Not exact any more are the last bits of sums over the batch; and in Stage 1,"
                " unless trainer.sync_batchnorm is true, batch norm, which sees the share of one process:"
                f" {state['batch_size'] // before} images before, {self.batch_size // now} now"
            )
        self._stream_sizes = dict(state.get("stream_sizes", {}))
        self._start_draw = state["draws_consumed"]
        self._start_batch = state["batches_processed"]

    # Parts.

    def _note_sizes(self, streams: Mapping[str, DrawSource]) -> None:
        """Remembers how many images each stream has, which gives the position its meaning."""
        before, self._stream_sizes = self._stream_sizes, {name: stream.size for name, stream in streams.items()}
        now = self._stream_sizes
        changed = [f"{name}: {before[name]} → {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
        if changed and self._start_draw > 0:
            rank_zero_warn(
                f"the number of images has changed since the checkpoint ({', '.join(changed)}): in the current pass"
                " some come twice and others not at all; from the next one on all is as in a new run"
            )

    def _check_apart(self, others: Mapping[tuple[str, str], SizedDataset]) -> None:
        """Takes what images are, and what would come of it if they were the training images."""
        overlaps = shared_images(self.in_distribution("train"), *others.values()) if others else []
        for (what, so), overlap in zip(others, overlaps, strict=True):
            if overlap > 0.1:
                raise InputError(
                    f"the {what} of {type(self).__name__} are the training images: {overlap:.0%} of those compared are"
                    f" equal. {so}; use other images."
                )

    def _dataset(self, name: Stream) -> SizedDataset:
        return self._require_ood("train") if name == "ood" else self.in_distribution("train")

    def _draws(self, dataset: SizedDataset, transform: Transform, name: str) -> DrawStream:
        return DrawStream(dataset, transform, self.seed, name, self.max_skipped_share)

    def _require_ood(self, split: OODSplit) -> SizedDataset:
        dataset = self.out_of_distribution(split)
        if dataset is None or len(dataset) == 0:
            raise InputError(
                f"{type(self).__name__} has no out-of-distribution images ({split}): Stage 2 and generation start from"
                " them. Give the data module an OOD source; Stage 1 alone can do without (data.streams: [clf])."
            )
        return dataset

    def _batches_processed(self) -> int:
        if self.trainer is None:
            return 0
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _evaluation_loader(self, split: Split) -> ResumableLoader:
        dataset = self.in_distribution(split)
        sampler = ShardedBatches(len(dataset), self.eval_batch_size, *self._rank())
        # A generator of its own: a loader draws a number when an iteration begins, and would move those of training.
        batches = EvaluationBatches(dataset, self.evaluation_transform(), self.max_skipped_share)
        return self._loader(batches, sampler, torch.Generator())

    def _loader(
        self,
        dataset: PairedDraws | EvaluationBatches,
        sampler: DrawBatches | ShardedBatches,
        generator: torch.Generator | None = None,
    ) -> ResumableLoader:
        return ResumableLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=generator,
        )


def _processes(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"
