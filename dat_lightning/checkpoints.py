"""Weights from files: our own checkpoints and plain state dicts, read without running code from them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_lightning.core.energy import EnergyModel

# How our LightningModules name their EnergyModel.
_PREFIX = "energy_model."


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Returns the contents of a ``.ckpt`` or ``.pt`` file, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, is damaged, or holds objects other than tensors and primitives.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a readable checkpoint: it is of another kind, or holds Python objects besides tensors and"
            " primitives, which are not loaded because that could run code"
        ) from error
    except Exception as error:  # whatever a reader of damaged bytes stumbles over
        raise ValueError(f"{path} is not a readable checkpoint: it is damaged or of another kind") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a checkpoint or state dict")  # noqa: TRY004
    return contents


def energy_model_weights(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the state dict for an :class:`EnergyModel` that a checkpoint holds; averaged weights if it has both.

    Accepts our Lightning checkpoints, whose ``state_dict`` is the average where an averaging callback ran, and plain
    state dicts of an :class:`EnergyModel`.

    Raises:
        ValueError: If there are no weights in it.
    """
    state = contents.get("state_dict", contents)
    pairs = state.items() if isinstance(state, Mapping) else ()
    weights = {name: value for name, value in pairs if isinstance(name, str) and isinstance(value, Tensor)}
    if any(name.startswith(_PREFIX) for name in weights):
        weights = {name[len(_PREFIX) :]: value for name, value in weights.items() if name.startswith(_PREFIX)}
    if not weights:
        raise ValueError(f"no weights found; the file has the entries {sorted(map(str, contents))[:8]}")
    return weights


def load_weights(model: EnergyModel, path: str | Path) -> None:
    """Loads the weights in a file into a model; every name and shape has to match.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, or does not fit the network: names and shapes that differ, or another
            input normalisation (the first faults are listed).
    """
    contents = read_checkpoint(path)
    try:
        weights = energy_model_weights(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    own = model.state_dict()
    faults = [f"missing {name}" for name in own if name not in weights]
    faults += [f"unexpected {name}" for name in weights if name not in own]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    faults += [
        f"{name} is {weights[name].flatten().tolist()} instead of {own[name].flatten().tolist()}"
        for name in ("mean", "std")
        if name in own and name in weights and weights[name].shape == own[name].shape
        if not torch.allclose(weights[name].to(own[name]), own[name])
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{path} does not fit the network: {', '.join(faults[:5])}{more}")
    model.load_state_dict(weights)
