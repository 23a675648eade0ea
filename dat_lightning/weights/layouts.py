"""Where the weights are in a checkpoint, and what their names mean: wrappers, normalisers, unused copies."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.weights.foreign import StandIn

_AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict")
_ENTRIES = (*_AVERAGED, "state_dict", "model", "model_state_dict", "net")
# In the order of preference: robustness keeps the network twice, as model and within the attacker.
_WRAPPERS = ("energy_model", "module", "base_model", "model", "net", "attacker", "backbone", "1")
_NORMALISER = re.compile(
    r"(?:(?:normali[sz]er?|normali[sz]ation|norm|preprocess|0)\.)?(?:mean|std|new_mean|new_std|mu|sigma)"
)
# How deep entries are nested at most.
_DEPTH = 4
_DEEPMIND = re.compile(r"(^|\.)layer\.\d+\.block\.\d+\.batchnorm_\d\.")


@dataclass(frozen=True)
class FoundWeights:
    """The weights in a checkpoint under the names of an :class:`EnergyModel`.

    Args:
        layout: Says where they were.
        weights: The tensors.
        sources: Their names in the file.
        strict: Whether the file is an :class:`EnergyModel`'s own, so that its normalisation is among the weights.
        normalisation: Mean and deviation of the normaliser in someone else's file.
        ignored: Names in the file that no network has, which are left out.
    """

    layout: str
    weights: dict[str, Tensor]
    sources: dict[str, str]
    strict: bool
    normalisation: tuple[Tensor, Tensor] | None
    ignored: tuple[str, ...]


def find_weights(contents: Mapping[str, Any], own: Collection[str] = ()) -> FoundWeights:
    """Returns the weights that a checkpoint holds, whatever wraps them there.

    Prefixes are taken off until the names are those of the network.

    Args:
        contents: The checkpoint.
        own: Names in the state dict of the :class:`EnergyModel` that is to be loaded.

    Raises:
        InputError: If there are no weights in it, or an object in place of a tensor, or two normalisers, or they are
            those of DeepMind's network.
    """
    entry, state = _unwrap(contents)
    level, strict = _level_of_network({name.replace("_orig_mod.", ""): name for name in state}, own)
    if not strict:
        level = _without_extras(level, own)
    sources = level.names if strict else {f"backbone.{name}": source for name, source in level.names.items()}
    weights = {name: _tensor(state, source) for name, source in sources.items()}
    normalisation = None if strict else _normalisation(level.normaliser, state)
    is_average = entry.startswith(_AVERAGED) or "n_averaged" in state or "current_model_state" in contents
    places = [f"entry {entry!r}"] * bool(entry) + [f"prefix {level.prefix!r}"] * bool(level.prefix)
    layout = ", ".join(["averaged"] * is_average + places) or "plain state dict"
    return FoundWeights(layout, weights, sources, strict, normalisation, level.ignored)


@dataclass(frozen=True)
class _Level:
    """Names in the file, below a number of prefixes, and what was beside them."""

    names: dict[str, str]
    prefix: str = ""
    normaliser: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


def _unwrap(contents: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Finds the state dict in nested entries, averaged ones first."""
    path: list[str] = []
    state: Mapping[str, Any] = contents
    for _ in range(_DEPTH):
        key = next((key for key in _ENTRIES if _holds_weights(state.get(key))), None)
        if key is None:
            break
        path.append(key)
        state = state[key]
    found = {name: value for name, value in state.items() if isinstance(name, str)}
    found = {name: value for name, value in found.items() if isinstance(value, (Tensor, StandIn))}
    if not any(isinstance(value, Tensor) for value in found.values()):
        objects = [f"; {key} is an object of {value.name}, which is not built" for key, value in found.items()]
        raise InputError(
            f"no weights found; the file has the entries {sorted(map(str, contents))[:8]}{''.join(objects[:2])}"
        )
    return ".".join(path), found


def _holds_weights(value: Any, depth: int = _DEPTH) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    tensors = any(isinstance(name, str) and isinstance(inner, Tensor) for name, inner in value.items())
    return tensors or any(_holds_weights(value.get(key), depth - 1) for key in _ENTRIES)


def _level_of_network(names: dict[str, str], own: Collection[str]) -> tuple[_Level, bool]:
    """Returns the level whose names the network has, and whether they are an EnergyModel's rather than a backbone's."""
    levels = [_Level(names)]
    while (inner := _peel(levels[-1])) is not None:
        levels.append(inner)
    for level in levels:
        if any(name in own for name in level.names if name.startswith("backbone.")):
            return level, True
        if any(f"backbone.{name}" in own for name in level.names):
            return level, False
    for level in levels:  # another network
        if any(_DEEPMIND.search(name) for name in level.names):
            raise InputError(
                "these are weights of DeepMind's CIFAR WideResNet (layer.0.block.0.batchnorm_0, …), which pads its"
                " strided convolutions otherwise than ours: they would give other logits, and cannot be converted"
            )
        if "backbone" in (first := _first(level.names)) and first <= {"backbone", "mean", "std"}:
            return level, True
    return levels[-1], False


def _peel(level: _Level) -> _Level | None:
    """Takes off one prefix, if all that is beside it is known."""
    first = _first(level.names)
    for wrapper in _WRAPPERS:
        if wrapper not in first:
            continue
        inner = {n.removeprefix(f"{wrapper}."): s for n, s in level.names.items() if n.startswith(f"{wrapper}.")}
        beside = {n: s for n, s in level.names.items() if not n.startswith(f"{wrapper}.")}
        if wrapper == "energy_model":  # the rest of our modules: curriculum, metrics
            return replace(level, names=inner, prefix=f"{level.prefix}{wrapper}.")
        normaliser = [(name, source) for name, source in beside.items() if _NORMALISER.fullmatch(name)]
        copies = [source for name, source in beside.items() if name == "n_averaged" or name.startswith("attacker.")]
        if len(normaliser) + len(copies) == len(beside):
            return _Level(
                inner, f"{level.prefix}{wrapper}.", (*level.normaliser, *normaliser), (*level.ignored, *copies)
            )
    return None


def _without_extras(level: _Level, own: Collection[str]) -> _Level:
    """Takes out a normaliser within the network, and the unused copy of the first block in some WideResNets."""
    foreign = {name: source for name, source in level.names.items() if f"backbone.{name}" not in own}
    normaliser = {name: source for name, source in foreign.items() if _NORMALISER.fullmatch(name)}
    has_block = "block1" in _first(level.names)
    copies = {name: source for name, source in foreign.items() if has_block and name.startswith("sub_block1.")}
    return replace(
        level,
        names={name: source for name, source in level.names.items() if name not in normaliser and name not in copies},
        normaliser=(*level.normaliser, *normaliser.items()),
        ignored=(*level.ignored, *copies.values()),
    )


def _normalisation(entries: tuple[tuple[str, str], ...], state: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    if not entries:
        return None
    is_mean = [(name.rpartition(".")[2] in ("mean", "new_mean", "mu"), source) for name, source in entries]
    mean, std = [s for m, s in is_mean if m], [s for m, s in is_mean if not m]
    if len(mean) != 1 or len(std) != 1:
        raise InputError(f"expected a mean and a deviation of one input normalisation, got {mean + std}")
    return _tensor(state, mean[0]), _tensor(state, std[0])


def _tensor(state: Mapping[str, Any], name: str) -> Tensor:
    value = state[name]
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is an object of {value.name} instead of a tensor")
    return value


def _first(names: Collection[str]) -> set[str]:
    return {name.split(".")[0] for name in names}
