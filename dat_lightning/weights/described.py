"""The network that a run's hyperparameters describe, made by registered names alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dat_lightning.backbones.architectures import build_architecture
from dat_lightning.backbones.resnet import NOT_DESCRIBED
from dat_lightning.backbones.sizes import build_within
from dat_lightning.core.errors import InputError
from dat_lightning.weights.hub import EnergyModel


def described_network(settings: Mapping[str, Any], numbers: Sequence[int]) -> EnergyModel:
    """Returns the network that a file's hyperparameters describe, with random weights; it downloads none.

    Args:
        settings: The hyperparameters, as the command line stores them.
        numbers: How many numbers each of the file's storages has; the network is no larger.

    Raises:
        InputError: If they describe none, one whose class is not registered, or a larger one.
    """
    section = _mapping(settings.get("energy_model"))
    arguments = dict(_mapping(section.get("init_args")))
    backbone = _mapping(arguments.pop("backbone", None))
    if not backbone:
        raise InputError("it does not say which network its weights belong to")
    places = [str(part.get("class_path", "")).rpartition(".") for part in (section, backbone)]
    if places[0][2] != "EnergyModel" or any(place[0].partition(".")[0] != "dat_lightning" for place in places):
        foreign = next((".".join(p[::2]) for p in places if not p[0].startswith("dat_lightning")), "another model")
        raise InputError(f"it has weights of {foreign}, which is not imported at a file's word")
    given = _mapping(backbone.get("init_args"))
    left_out = {"pretrained", *NOT_DESCRIBED}
    plain = {name: value for name, value in given.items() if name not in left_out}
    description = {"name": places[1][2], "arguments": plain}
    try:
        with torch.random.fork_rng(devices=[]):
            return build_within(lambda: EnergyModel(build_architecture(description), **arguments), numbers, plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"it describes no network of this version: {error}") from error


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
