"""What a module checks before it trains or evaluates: network and data fit together, as do schedule and length."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from torch import Tensor, nn

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.curriculum import AUCCurriculum
from dat_lightning.core.energy import EnergyModel
from dat_lightning.core.errors import InputError, require_counts
from dat_lightning.data.batches import check_energy, check_pixels, check_precision, class_labels, logits_of


def check_first_batch(energy_model: EnergyModel, batch: Mapping[str, Tensor], who: str, declared: object) -> None:
    """Looks at values, which waits for a device; an error says so before a GPU fails on a label too large.

    Args:
        energy_model: The network.
        batch: Images and labels by name.
        who: Who needs them, for messages.
        declared: How many classes the data say they have, if they do.

    Raises:
        InputError: If pixels are not in [0, 1], a label is no integer or not below the number of logits, or the network
            cannot take the images or gives no logits.
    """
    for key in ("x", "x_gen", "x_clf", "x_ood"):
        if key in batch:
            check_pixels(batch[key], f"{key} of {who}", allow_nan=True)
            check_precision(batch[key], energy_model, f"{key} of {who}")
    parts = [name for name in ("", "_gen", "_clf") if f"x{name}" in batch and f"y{name}" in batch]
    for name in parts:
        with torch.no_grad(), no_trace(energy_model):
            num_classes = _first_logits(energy_model, batch[f"x{name}"], who).shape[1]
        if isinstance(declared, int) and declared > num_classes:
            raise InputError(
                f"the network has {num_classes} logits, but the data have {declared} classes: set the backbone's"
                " num_classes to that"
            )
        labels = class_labels(batch[f"y{name}"], f"y{name} of {who}")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise InputError(
                f"the network has {num_classes} logits, but y{name} has labels {int(labels.min())} …"
                f" {int(labels.max())}: set the backbone's num_classes to the number of classes of the data"
            )


def _first_logits(energy_model: EnergyModel, x: Tensor, who: str) -> Tensor:
    """Logits of the first images, or a sentence if these have other channels, or the network gives something else."""
    name = type(energy_model.backbone).__name__
    try:
        logits = logits_of(energy_model, x[:2], f"{who} with the network {name}")
    except RuntimeError as error:
        first = next((layer for layer in energy_model.modules() if isinstance(layer, nn.Conv2d)), None)
        if first is None or first.in_channels == x.shape[1]:
            raise
        shape = "×".join(str(n) for n in x.shape[1:])
        raise InputError(
            f"the network's first convolution takes {first.in_channels} channels, but the data's images are {shape}"
            " (channels, height, width): set the backbone's in_channels, and mean and std, to those of the data"
        ) from error
    check_energy(logits, f"the network {name}")
    return logits


def check_restored(module: LightningModule, contents: Mapping[str, Any], to_train: bool) -> None:
    """Looks in a checkpoint for what no run of the module has saved, and what nobody would notice once it is restored.

    Names and shapes of weights are not compared.

    Args:
        module: Of the run that goes on, with its initial weights or any others.
        contents: The checkpoint's.
        to_train: Whether training goes on from it.

    Raises:
        InputError: If weights are not finite or of another type, T lies beyond the curriculum, a count is none, or the
            optimiser's state is one of other parameters.
    """
    own = module.state_dict()
    for entry in ("state_dict", "current_model_state"):
        saved = contents.get(entry) or {}
        for name, target in own.items():
            value = saved.get(name, target)
            if value.is_floating_point() != target.is_floating_point():
                raise InputError(f"{name} holds {value.dtype} instead of {target.dtype}")
        check_finite((name, saved[name]) for name in own if name in saved and name.startswith("energy_model."))
        for name, part in module.named_modules():
            if isinstance(part, AUCCurriculum) and (steps := saved.get(f"{name}.num_steps")) is not None:
                _check_steps(f"{name}.num_steps", steps, part)
    if to_train:
        require_counts(0, network_evaluations=contents.get("network_evaluations", 0))
        _check_optimizers(contents.get("optimizer_states") or [], [p for p in module.parameters() if p.requires_grad])


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises an InputError, which names it, if a tensor holds NaN or infinite numbers."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinite numbers")


def _check_steps(name: str, steps: Tensor, curriculum: AUCCurriculum) -> None:
    if steps.numel() != 1 or not 0 <= int(steps) <= curriculum.max_steps:
        found = int(steps) if steps.numel() == 1 else "no number"
        raise InputError(
            f"{name}, the number T of contrastive steps, must lie between 0 and max_steps, {curriculum.max_steps}; got"
            f" {found}"
        )


# What torch's optimisers keep of each parameter, in its shape.
_OF_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg")


def _check_optimizers(states: list[Mapping[str, Any]], parameters: list[nn.Parameter]) -> None:
    numbers = [n for each in states for group in each.get("param_groups") or [] for n in group.get("params") or []]
    if len(states) != 1 or len(numbers) != len(parameters):
        return  # several optimisers, or one of other parameters, which it refuses itself
    for number, parameter in zip(numbers, parameters, strict=True):
        state = (states[0].get("state") or {}).get(number) or {}
        for name in _OF_PARAMETERS:
            value = state.get(name)
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise InputError(
                    f"the optimiser's {name} of parameter {number} has the shape {tuple(value.shape)}, and the"
                    f" parameter {tuple(parameter.shape)}"
                )


def check_layout(energy_model: EnergyModel) -> None:
    """Raises an InputError if a parameter has no place in the layout ``channels_last``."""
    named = [*energy_model.named_parameters(), *energy_model.named_buffers()]
    wrong = next((name for name, tensor in named if tensor.dim() == 5), None)
    if wrong is not None:
        raise InputError(
            f"{wrong} of the network has five dimensions, which the layout channels_last has no place for: set"
            " execution.memory_format to contiguous"
        )


def check_callbacks(callbacks: list[Callback], *, freezes_batch_norm: bool, has_schedule: bool) -> None:
    """Raises an InputError for Lightning's callbacks that do not get along with a module."""
    if freezes_batch_norm and any(isinstance(c, StochasticWeightAveraging) for c in callbacks):
        raise InputError(
            "StochasticWeightAveraging estimates the statistics of batch norm anew, which this module freezes: use"
            " dat_lightning.ExponentialMovingAverage"
        )
    if has_schedule and any(isinstance(c, LearningRateFinder) for c in callbacks):
        raise InputError(
            "LearningRateFinder finds a constant rate, which lr_scheduler would overwrite: set lr_scheduler to null"
            " while it searches"
        )


def check_schedules(trainer: Trainer) -> None:
    """Raises an InputError if a learning rate schedule does not go with the length of the training."""
    for config in trainer.lr_scheduler_configs:
        _check_cosine(trainer, config.scheduler, config.interval)
        total = getattr(config.scheduler, "total_steps", None)
        if total is not None and config.interval == "step" and total < trainer.estimated_stepping_batches:
            raise InputError(
                f"lr_scheduler has total_steps={total}, but trainer.max_epochs and max_steps ask for"
                f" {trainer.estimated_stepping_batches} steps; set total_steps to that"
            )


def _check_cosine(trainer: Trainer, scheduler: object, interval: str) -> None:
    if not isinstance(scheduler, torch.optim.lr_scheduler.CosineAnnealingLR):
        return
    ends = trainer.estimated_stepping_batches if interval == "step" else trainer.max_epochs
    if ends is not None and 0 < scheduler.T_max < ends < math.inf:
        raise InputError(
            f"lr_scheduler has T_max={scheduler.T_max}, but training has {ends} {interval}s: the rate would rise"
            " again after its minimum; set T_max to that"
        )
