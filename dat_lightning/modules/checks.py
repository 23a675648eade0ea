"""What a module checks before it trains or evaluates: network and data fit together, as do schedule and length."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from torch import Tensor, nn

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.curriculum import AUCCurriculum
from dat_lightning.core.energy import EnergyModel
from dat_lightning.core.errors import InputError, require_counts
from dat_lightning.data.batches import check_energy, check_pixels, check_precision, class_labels, logits_of
from dat_lightning.weights.values import fault_of


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
        InputError: If weights cannot be any, T lies beyond the curriculum, a count is none, or, to train, progress is
            missing or the optimiser's state is not one of this module's; or if a module that keeps more, and checks it
            in ``check_entries``, refuses that.
    """
    try:
        _check_restored(module, contents, to_train)
    except InputError:
        raise
    except Exception as error:  # whatever a reader of impossible contents stumbles over
        raise InputError(f"it holds what no run saves: {type(error).__name__}: {str(error)[:200]}") from error


def _check_restored(module: LightningModule, contents: Mapping[str, Any], to_train: bool) -> None:
    own = module.state_dict()
    for entry in ("state_dict", "current_model_state"):
        saved = contents.get(entry) or {}
        for name, target in own.items():
            if name in saved and (fault := fault_of(name, saved[name], target)):
                raise InputError(fault)
        for name, part in module.named_modules():
            if isinstance(part, AUCCurriculum):
                _check_curriculum(name, part, saved, _most_steps(contents), to_train)
    if to_train:
        require_counts(0, network_evaluations=contents.get("network_evaluations", 0))
        getattr(module, "check_entries", lambda contents: None)(contents)
        progress = (contents.get("loops") or {}).get("fit_loop") or {}
        if not {"epoch_progress", "epoch_loop.batch_progress"} <= progress.keys():
            raise InputError("it does not say how far training has come: loops.fit_loop lacks its progress")
        _check_optimizer(module, contents.get("optimizer_states") or [])


def check_entry(name: str, value: object, *shape: int | str, allow_nan: bool = False) -> None:
    """Checks a tensor of floats that a module keeps in checkpoints besides its weights.

    Args:
        name: Of the checkpoint's entry.
        value: What it is; there may be none.
        shape: What the tensor's has to be; a word stands for any number.
        allow_nan: Whether numbers need not be finite.

    Raises:
        InputError: With the name, if it is something else.
    """
    if value is None:
        return
    if fault := fault_of(f"the checkpoint's {name}", value, torch.empty(()), allow_nan=allow_nan):
        raise InputError(fault)
    check_entry_shape(name, cast(Tensor, value), *shape)


def check_entry_shape(name: str, tensor: Tensor, *shape: int | str) -> None:
    """Raises an InputError if such a tensor has another shape, which is known on the host."""
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, found, strict=True)):
        raise InputError(f"the checkpoint's {name} must have the shape ({', '.join(map(str, shape))}), got {found}")


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises an InputError, which names it, if a tensor holds NaN or infinite numbers."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinite numbers")


def _most_steps(contents: Mapping[str, Any]) -> int | None:
    """The run's own limit of T, as its hyperparameters say it; one that goes on may have a lower one."""
    section: Any = contents.get("hyper_parameters")
    for name in ("curriculum", "init_args", "max_steps"):
        section = section.get(name) if isinstance(section, Mapping) else None
    return section if isinstance(section, int) else None


def _check_curriculum(
    name: str, curriculum: AUCCurriculum, saved: Mapping[str, Tensor], most: int | None, to_train: bool
) -> None:
    for count in ("count", "window"):
        if (value := saved.get(f"{name}.{count}")) is not None:
            require_counts(0, **{f"{name}.{count}": int(value)})
    values = saved.get(f"{name}.values")
    if values is not None and not bool(((values >= 0) & (values <= 1)).all()):
        raise InputError(f"{name}.values must be areas between 0 and 1")
    if (steps := saved.get(f"{name}.num_steps")) is None or (most is None and not to_train):
        return
    limit = max(curriculum.max_steps, most or 0)
    if steps.numel() != 1 or not 0 <= int(steps) <= limit:
        found = int(steps) if steps.numel() == 1 else "no number"
        raise InputError(
            f"{name}.num_steps, the number T of contrastive steps, must lie between 0 and max_steps, {limit}; got"
            f" {found}"
        )


def _check_optimizer(module: LightningModule, states: list[Mapping[str, Any]]) -> None:
    """Compares an optimiser's state with what the module's optimiser keeps of a parameter after a step."""
    for group in (group for each in states for group in each["param_groups"]):
        for name, value in group.items():
            numbers = value if isinstance(value, list | tuple) and name == "betas" else [value]
            for number in numbers if name in ("lr", "eps", "weight_decay", "momentum", "betas") else ():
                if isinstance(number, bool) or not 0 <= float(number) < math.inf:
                    raise InputError(f"the optimiser's {name} must be a number of at least 0, got {str(value)[:80]}")
        if "lr" not in group:
            raise InputError("a group of the optimiser's parameters has no lr")
    make = getattr(module, "optimizer", None)
    parameters = [p for p in module.parameters() if p.requires_grad]
    numbers = [n for each in states for group in each["param_groups"] for n in group["params"]]
    if len(states) != 1 or len(numbers) != len(parameters) or make is None:
        return  # several optimisers, or one of other parameters, which it refuses itself
    kept_of = {dim: _kept_of(make, dim) for dim in {parameter.dim() for parameter in parameters}}
    for number, parameter in zip(numbers, parameters, strict=True):
        state = states[0]["state"].get(number) or {}
        for name, kept in kept_of[parameter.dim()].items() if state else ():
            value = state.get(name)
            if not kept.dim() and isinstance(value, int | float):  # of older versions of torch
                value = torch.tensor(float(value))
            expected = parameter.shape if kept.shape == _PROBE[: parameter.dim()] else kept.shape
            if not isinstance(value, Tensor) or value.shape != expected:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"the optimiser's {name} of parameter {number} must have the shape {tuple(expected)}, got {found}"
                )
            whose = f"the optimiser's {name} of parameter {number}"
            if fault := fault_of(whose, value, kept):
                raise InputError(fault)
            if not kept.dim() and float(value) < 0:
                raise InputError(f"{whose} is {float(value)}")


_PROBE = torch.Size((2, 3, 5, 7, 1))


def _kept_of(make: Any, dim: int) -> dict[str, Tensor]:
    """The tensors in the state of an optimiser of one small parameter, after a step; none if it wants more for that."""
    parameter = nn.Parameter(torch.zeros(_PROBE[:dim]))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer: torch.optim.Optimizer = make([parameter])
        optimizer.step()
    except Exception:  # one with conditions of its own
        return {}
    kept = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    # What has another shape than the parameter, or one number, depends on more than its dimensions.
    return {name: value for name, value in kept.items() if value.shape in (parameter.shape, torch.Size(()))}


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
