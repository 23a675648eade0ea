"""Weights into a network: everything has to fit, or a sentence says what does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dat_lightning.core.energy import EnergyModel
from dat_lightning.core.errors import InputError
from dat_lightning.weights.layouts import FoundWeights, find_weights
from dat_lightning.weights.reading import read_checkpoint
from dat_lightning.weights.shipped import located
from dat_lightning.weights.values import fault_of

# How far a normaliser in someone else's file may be from the network's: files round to three or four digits.
_TOLERANCE = 1e-3
_SHOWN = 5


@dataclass(frozen=True)
class LoadedWeights:
    """Says where weights came from and what was left out.

    Args:
        layout: Where in the file they were: entry, prefix, whether averaged.
        ignored: Names in the file that belong to no part of the network, such as copies.
        initialised: Names in the network that keep their initial values: the head, where that was asked for.
        normalisation: What the file says about the normalisation of images.
    """

    layout: str
    ignored: tuple[str, ...]
    initialised: tuple[str, ...]
    normalisation: str

    def __str__(self) -> str:
        parts = [self.layout, self.normalisation]
        parts += [f"ignored {_shortened(self.ignored)}"] * bool(self.ignored)
        parts += [f"initial values kept for {_shortened(self.initialised)}"] * bool(self.initialised)
        return "; ".join(parts)


def load_weights(model: EnergyModel, path: str | Path, new_head: bool = False) -> LoadedWeights:
    """Loads the weights in a file into a model; every name and shape has to match.

    Takes our checkpoints and state dicts, and state dicts of the backbone as other projects save them: in an entry such
    as ``model`` or ``ema``, below prefixes such as ``module.``, beside a normaliser, which has to be that of the model
    within 1e-3. Counters of batch norm that a file lacks become 0.

    Args:
        model: The network.
        path: A file, the folder that huggingface_hub's mixin writes, or the name of a model that ships.
        new_head: Whether the last linear layer keeps its initial values if it has other classes than in the file.

    Returns:
        What was loaded.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the file is no checkpoint, or does not fit the network: names, shapes and types that differ,
            numbers that are not finite, or another input normalisation (the first faults are listed).
    """
    contents = read_checkpoint(located(path))
    own = model.state_dict()
    try:
        found = find_weights(contents, own)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    weights = _with_counters(found.weights, own)
    head = _head_of_other_classes(model, weights, own)
    kept = {name: own[name] for name in head} if new_head else {}
    elsewhere = _name_faults(weights, own, found) + _normalisation_faults(found, own)
    faults = elsewhere + _value_faults({name: value for name, value in weights.items() if name not in kept}, own)
    if faults:
        hint = ""
        if head and not new_head and not elsewhere and len(faults) == len(head):
            hint = "; only the number of classes differs: new_head=True (--model.new_head true) starts with a new head"
        raise InputError(f"{path} does not fit the network: {_shortened(faults)}{hint}")
    for name in {"mean", "std"} & own.keys():
        if not found.strict or weights[name].element_size() < own[name].element_size():
            kept[name] = own[name]
    model.load_state_dict({**weights, **kept})
    return LoadedWeights(found.layout, found.ignored, head if new_head else (), _about_normalisation(found, own))


def _with_counters(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    counters = [name for name in own if name.endswith(".num_batches_tracked") and name not in weights]
    return {**weights, **{name: torch.zeros_like(own[name]) for name in counters}}


def _head_of_other_classes(
    model: EnergyModel, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Returns the names of the last linear layer's weights if they, and they alone, differ in the number of classes."""
    layers = [
        (name.replace("_orig_mod.", ""), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    ]
    if not layers:
        return ()
    prefix, layer = layers[-1]
    expected = {f"{prefix}.{name}" for name, _ in layer.named_parameters()}
    differing = {name for name in own if name in weights and weights[name].shape != own[name].shape}
    same_inputs = all(weights[name].shape[1:] == own[name].shape[1:] for name in differing)
    classes = {weights[name].shape[:1] for name in differing}
    if differing != expected or not same_inputs or len(classes) != 1:
        return ()
    return tuple(sorted(differing))


def _name_faults(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], found: FoundWeights) -> list[str]:
    beside = () if found.strict else ("mean", "std")
    faults = [f"missing {name}" for name in own if name not in weights and name not in beside]
    return faults + [f"unexpected {found.sources[name]}" for name in weights if name not in own]


def _value_faults(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    faults = []
    for name, target in own.items():
        value = weights.get(name, target)
        if value.shape != target.shape:
            faults.append(f"{name} has shape {tuple(value.shape)} instead of {tuple(target.shape)}")
        elif fault := fault_of(name, value, target):
            faults.append(fault)
    return faults


def _normalisation_faults(found: FoundWeights, own: Mapping[str, Tensor]) -> list[str]:
    if found.strict:
        both = [name for name in ("mean", "std") if name in own and name in found.weights]
        # Ours as exactly as the file can say it: one in half precision has rounded.
        rounded = {name: own[name].to(found.weights[name].dtype).to(own[name]) for name in both}
        return [
            f"{name} is {found.weights[name].flatten().tolist()} instead of {own[name].flatten().tolist()}"
            for name in both
            if found.weights[name].shape == own[name].shape
            and not torch.allclose(found.weights[name].to(own[name]), rounded[name])
        ]
    if found.normalisation is None:
        return []
    ours = (own["mean"], own["std"]) if "mean" in own else (torch.zeros(1), torch.ones(1))
    if all(_is_close(a, b) for a, b in zip(found.normalisation, ours, strict=True)):
        return []
    return [
        f"its input normalisation is {_numbers(found.normalisation)}, the network's"
        f" {_numbers(ours) if 'mean' in own else 'none'}"
    ]


def _is_close(theirs: Tensor, ours: Tensor) -> bool:
    theirs, ours = theirs.flatten().double(), ours.flatten().double()
    # One number stands for all channels.
    sizes = {len(theirs), len(ours)} - {1}
    return len(sizes) <= 1 and 0 not in sizes and bool(((theirs - ours).abs() <= _TOLERANCE).all())


def _numbers(pair: tuple[Tensor, Tensor]) -> str:
    mean, std = ([round(number, 4) for number in part.flatten()[:8].tolist()] for part in pair)
    return f"mean {mean}, std {std}"


def _about_normalisation(found: FoundWeights, own: Mapping[str, Tensor]) -> str:
    if found.strict or found.normalisation is not None:
        return "same input normalisation"
    ours = _numbers((own["mean"], own["std"])) if "mean" in own else "none"
    return f"the file says nothing about input normalisation, the network's is {ours}"


def _shortened(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more
