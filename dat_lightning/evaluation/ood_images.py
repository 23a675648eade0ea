"""What evaluators share that measure further images beside the test loader's, out-of-distribution ones above all."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from tqdm.auto import tqdm

from dat_lightning.core.energy import first_weight
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.random_streams import RandomPermutation
from dat_lightning.data.batches import check_pixels, stacked
from dat_lightning.data.draws import EvaluationBatches
from dat_lightning.data.entries import SizedDataset
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.results.digests import image_digests, set_identity
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.progress import is_silent

Transform = Callable[[Any], Tensor]


class OODEvaluator(Evaluator):
    """An evaluator that measures other sets of images too: those given, or else the DataModule's held-out ones.

    Args:
        datasets: Name → OOD images, any data set of images, or of pairs that begin with one; by default the
            DataModule's held-out seeds, under the name ``held_out``.
        num_images: Images of each set, at most; a seeded choice, corrupt ones among it are left out.
        transform: Maps an OOD image to a tensor (C, H, W) in [0, 1]; by default the DataModule's for evaluation.
        batch_size: Images per batch and rank, of each set but the test images.
        seed: Seed of the choice and of random starts.
        dirpath: See :class:`Evaluator`.

    Raises:
        InputError: If a number is not positive; in a test, if a data set is empty, or its name cannot be part of a
            figure's and of a file's.
    """

    def __init__(
        self,
        datasets: Mapping[str, SizedDataset] | None = None,
        num_images: int = 1024,
        transform: nn.Module | Transform | None = None,
        batch_size: int = 256,
        seed: int = 0,
        dirpath: str | None = None,
    ) -> None:
        super().__init__(dirpath)
        require_at_least(1, num_images=num_images, batch_size=batch_size)
        self.datasets = datasets
        self.num_images = num_images
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed

    def ood_images(self, trainer: Trainer) -> dict[str, tuple[SizedDataset, Transform]]:
        """Returns OOD data by name, each with its transform; none if none were given and the DataModule has none."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        transform = self.transform
        if transform is None:
            own = getattr(data, "evaluation_transform", None)
            transform = own() if callable(own) else _unchanged
        if self.datasets is None:
            source, seeds = (getattr(data, name, None) for name in ("out_of_distribution", "held_out_seeds"))
            if not callable(source) and callable(seeds):
                # They are images in [0, 1] already.
                return {"held_out": (HeldOutSeeds(seeds(), self.num_images), _unchanged)}
            held_out = source("held_out") if callable(source) else None
            return {} if held_out is None or len(held_out) == 0 else {"held_out": (held_out, transform)}
        for name, dataset in self.datasets.items():
            who = f"{type(self).__name__}.datasets"
            if not re.fullmatch(r"\w+", name):
                raise InputError(f"{who}: a name must consist of letters, digits and underscores, got {name!r}")
            if len(dataset) == 0:
                raise InputError(f"{who}: {name!r} has no images")
        return {name: (dataset, transform) for name, dataset in self.datasets.items()}

    def evaluate_images(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        name: str,
        dataset: SizedDataset,
        transform: Transform,
        compute: Callable[[Mapping[str, Tensor]], Values],
    ) -> tuple[Values, str, dict[str, Any]]:
        """Returns the values of a set's chosen images, sorted by index, their identity, and details for figures.

        The images are dealt to the ranks in turn; every rank must call it, and gets everything.

        Args:
            trainer: The Trainer.
            pl_module: The module that is tested.
            name: Name of the set; it begins the names of files.
            dataset: Entries are images, or pairs that begin with one.
            transform: Maps an image to a tensor (C, H, W) in [0, 1].
            compute: Maps a batch with ``x`` and ``index`` to values per example.

        Raises:
            InputError: If the transform gives something else, or no image can be read.
        """
        chosen = choose(len(dataset), self.num_images, self.seed, name)
        mine = chosen[trainer.global_rank :: trainer.world_size]
        dtype = first_weight(pl_module, torch.empty(0, dtype=torch.float32)).dtype
        values: list[Values] = []
        firsts, reader = range(0, len(mine), self.batch_size), EvaluationBatches(dataset, transform)
        for first in tqdm(firsts, desc=f"{type(self).__name__}: {name}", leave=False, disable=is_silent(trainer)):
            read = reader.read(mine[first : first + self.batch_size])
            if read:
                kept, images, _ = zip(*read, strict=True)
                x = stacked(images, f"the images of {name!r}")
                check_pixels(x, f"the images of {name!r}, after their transform,")
                batch = {"x": x.to(pl_module.device, dtype), "index": torch.tensor(kept)}
                with torch.no_grad():
                    found = self.remember(pl_module, batch, compute, name)
                digests = image_digests(batch["x"], torch.zeros(len(x)))
                values.append({"index": batch["index"], "digest": digests, **found})
        everything = gather(values, f"no image of {name!r} could be read: {reader.images.last}")
        details = {"seed": self.seed, "num_skipped": len(chosen) - len(everything["index"])}
        return everything, set_identity(everything["digest"]), details


class HeldOutSeeds:
    """The first seeds of a DataModule's ``held_out_seeds()`` as a data set, for those that name no data set itself."""

    def __init__(self, seeds: Callable[[int], Any], size: int) -> None:
        self.seeds = seeds
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.seeds(index)


def choose(size: int, count: int, seed: int, name: str) -> list[int]:
    """Returns ``count`` different indices below ``size`` in an order that seed and name determine, or all of them."""
    permutation = RandomPermutation(size, seed, "evaluated images", name)
    return [permutation[k] for k in range(min(size, count))]


def _unchanged(image: Tensor) -> Tensor:
    return image
