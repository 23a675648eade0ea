"""The check where batches enter: labels become int64, pairs are numbered, pixels lie in [0, 1], or a sentence says so.

Shapes and types are looked at without waiting for a device; values are, so that loops which train look at them once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from dat_lightning.core.energy import first_weight
from dat_lightning.core.errors import InputError
from dat_lightning.core.pixels import require_pixels


def check_images(images: Tensor, what: str) -> None:
    """Raises an InputError unless images are of a floating type; waits for no device."""
    if not images.is_floating_point():
        raise InputError(f"{what} must be float images in [0, 1], got {images.dtype}: divide eight-bit pixels by 255")
    if images.dim() < 2:
        raise InputError(f"{what} must be images (N, C, H, W), got shape {tuple(images.shape)}")


def check_precision(images: Tensor, network: nn.Module | None, what: str) -> None:
    """Raises an InputError unless images are float32 or of the type of the network's weights; waits for no device."""
    weight = images if network is None else first_weight(network, images)
    if images.dtype not in (torch.float32, weight.dtype):
        raise InputError(
            f"{what} must be images of {weight.dtype}, as the network's weights are, got {images.dtype}: let the data"
            " give torch.float32"
        )


def check_pixels(images: Tensor, what: str, *, allow_nan: bool = False) -> None:
    """Raises an InputError as :func:`check_images` and :func:`~dat_lightning.core.pixels.require_pixels` do."""
    check_images(images, what)
    require_pixels(images, what, allow_nan=allow_nan)


def stacked(images: Sequence[Any], what: str) -> Tensor:
    """Returns a float32 batch of images (C, H, W) of any precision.

    Raises:
        InputError: If they are no float tensors of three dimensions, or have several shapes.
    """
    for image in images:
        if not (isinstance(image, Tensor) and image.is_floating_point() and image.dim() == 3):
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise InputError(f"{what} must be float tensors (C, H, W) in [0, 1] after their transform, got {found}")
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise InputError(
            f"{what} have several shapes, {shapes[0]} and {shapes[1]} among them: their transform has to bring them to"
            " one size and number of channels"
        )
    return torch.stack([image.float() for image in images])


def class_labels(labels: Tensor, what: str, *, check_values: bool = True) -> Tensor:
    """Returns labels as int64 (N,), from any type and from shape (N, 1).

    Args:
        labels: Class indices.
        what: Their name, for messages.
        check_values: Whether to look for floats that are no integers, which waits for a device.

    Raises:
        InputError: If there is not one label per image, or one is no integer.
    """
    flat = labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
    if flat.dim() != 1 or flat.is_complex():
        raise InputError(
            f"{what} must be class indices, integers (N,), got {labels.dtype} of shape {tuple(labels.shape)}: of"
            " one-hot and soft labels give the largest entry's index, argmax(1)"
        )
    if flat.is_floating_point() and check_values:
        wrong = flat[(flat != flat.floor()) | ~flat.isfinite()]
        if len(wrong):
            raise InputError(f"{what} must be class indices, integers (N,), got {float(wrong[0]):g} among them")
    return flat.long()


def check_classes(labels: Tensor, logits: Tensor, who: str, least: int = 2) -> None:
    """Raises an InputError unless logits (N, K) are of at least ``least`` classes, and labels lie below K."""
    if logits.shape[1] < least:
        raise InputError(f"{who} needs logits (N, K) of at least {least} classes, got shape {tuple(logits.shape)}")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= logits.shape[1]:
        raise InputError(f"{who}: labels must lie in 0 … {logits.shape[1] - 1}, got {low} … {high}")


def logits_of(network: Callable[[Tensor], Any], x: Tensor, who: str, least: int = 1) -> Tensor:
    """Returns the logits (N, K) of images (N, C, H, W), as any network gives them; waits for no device.

    Args:
        network: Maps images to logits; modules of other projects may return something else.
        x: Images.
        who: Who needs the logits, for messages.
        least: Least number of classes.

    Raises:
        InputError: If it is no tensor, or of another shape.
    """
    logits = network(x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < least:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"{who} needs logits (N, K) of at least {least} classes, and {type(network).__name__} gave {found} for"
            f" {len(x)} images: let its forward return the logits alone"
        )
    return logits


def require_finite(logits: Tensor, who: str) -> None:
    """Raises an InputError if a logit of (N, K) is NaN or infinite."""
    wrong = int((~logits.isfinite()).any(1).sum())
    if wrong:
        raise InputError(f"{who} needs finite logits, got NaN or infinite ones for {wrong} of {len(logits)} images")


def check_energy(logits: Tensor, who: str) -> None:
    """Raises an InputError if logits (N, K) look like probabilities or their logarithms, which leave no energy.

    One image says nothing: its energy may be 0 by chance.
    """
    values = logits.detach().float()
    constant = {"log_softmax": values.exp().sum(1), "softmax": values.sum(1) + (values < 0).any(1)}
    for ending, totals in constant.items() if min(logits.shape) > 1 else ():
        if bool(((totals - 1).abs() < 1e-4).all()):
            raise InputError(f"{who} seems to end in {ending}, which leaves no energy: let it return logits")


def batch_part(batch: Any, key: str, who: str) -> Tensor:
    """Returns an entry of a batch: float images, or labels as int64; waits for no device.

    Args:
        batch: A mapping.
        key: ``x`` or ``y``, or one that begins with ``x_`` or ``y_``.
        who: Who needs it, for messages.

    Raises:
        InputError: If it is missing, whereby the message says who supplies it, or has another shape or type.
    """
    if not (isinstance(batch, Mapping) and key in batch):
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        stream = key.partition("_")[2]
        supplier = f"PairedDataModule gives it when data.streams has {stream!r}" if stream else _EVALUATION_LOADERS
        raise InputError(f"{who} needs {key!r} in its batch, got {found}; {supplier}")
    value: Tensor = batch[key]
    if key.startswith("y"):
        return class_labels(value, f"{key} of {who}", check_values=False)
    check_images(value, f"{key} of {who}")
    return value


_EVALUATION_LOADERS = (
    "an evaluation loader of PairedDataModule gives x, y and index, and one of (image, label) pairs does as well"
)


def only_loader(loaders: Any, who: str) -> Any:
    """Returns a loader, or the one in a list, dictionary or CombinedLoader.

    Raises:
        InputError: If there is none, or several.
    """
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    # An empty collection counts as a loader there.
    found = [loader for loader in combined.flattened if not isinstance(loader, list | tuple | dict)]
    if len(found) != 1:
        raise InputError(f"{who} evaluates one loader, got {len(found) or 'none'}; evaluate them one by one")
    return found[0]


def _as_mapping(batch: Any) -> Any:
    """Images alone, or with labels, under their names; anything else as it is."""
    parts = [batch] if isinstance(batch, Tensor) else batch
    if not isinstance(parts, tuple | list) or not parts or not isinstance(parts[0], Tensor):
        return batch
    return {key: part for key, part in zip("xy", parts, strict=False) if isinstance(part, Tensor)}


class EvaluationEntry:
    """Brings the batches of one evaluation loader into form, one after another: mappings with ``x``, ``y``, ``index``.

    Pairs that begin with images and labels become mappings, labels int64, and examples without ``index`` are numbered
    by their place in a loader that does not shuffle, through all of its batches.

    Args:
        who: Who evaluates, for messages.
        loader: The loader, which says how examples are dealt to the ranks; see :func:`only_loader`.
        trainer: Knows the rank, and the network.
        parts: What the batches must have.
        values: Whether to look at the values of every batch, of the first one, where NaN passes, or of none.
    """

    def __init__(
        self,
        who: str,
        loader: Any,
        trainer: Trainer,
        parts: Sequence[str] = ("x", "y"),
        values: Literal["every", "first", "none"] = "every",
    ) -> None:
        self.who = who
        self.loader = only_loader(loader, who)
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        self.network = trainer.lightning_module
        self.parts = tuple(parts)
        self.values = values
        self.num_seen = 0

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Returns the next batch in form.

        Raises:
            InputError: If it lacks a part, or one has another shape, type or range of values.
        """
        batch = _as_mapping(batch)
        found = {key: batch_part(batch, key, self.who) for key in self.parts}
        found = {**batch, **found}
        check_precision(found["x"], self.network, f"x of {self.who}")
        size = len(found["x"])
        if self.values == "every" or (self.values == "first" and self.num_seen == 0):
            check_pixels(found["x"], f"x of {self.who}", allow_nan=self.values == "first")
            if "y" in self.parts:
                class_labels(batch["y"], f"y of {self.who}")
        if "index" not in found:
            found["index"] = self._places(size).to(found["x"].device)
        sizes = {key: tuple(found[key].shape) for key in (*self.parts, "index")}
        if any(shape[:1] != (size,) for shape in sizes.values()) or found["index"].dim() != 1:
            raise InputError(f"{self.who} needs one y and one index for each image, got the shapes {sizes}")
        self.num_seen += size
        return found

    def _places(self, size: int) -> Tensor:
        """Places in the data set of the next examples of this rank."""
        places = self.num_seen + torch.arange(size)
        if self.world_size == 1 or not self._is_dealt():
            return places
        # The r-th of R ranks has the examples r, r + R, r + 2R, …, and some twice, so that all have equally many.
        places = places * self.world_size + self.rank
        dataset: Any = getattr(self.loader, "dataset", None)
        return places % len(dataset) if hasattr(dataset, "__len__") else places

    def _is_dealt(self) -> bool:
        """Whether each rank has its own examples: not where a loader was left without the Trainer's sampler."""
        if not isinstance(self.loader, DataLoader) or isinstance(self.loader.dataset, IterableDataset):
            return True
        samplers = (self.loader.sampler, self.loader.batch_sampler, getattr(self.loader.batch_sampler, "sampler", None))
        return any(isinstance(sampler, DistributedSampler) for sampler in samplers)
