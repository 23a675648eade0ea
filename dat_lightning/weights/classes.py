"""Which classes a file may have made: ours that only compute, torch's optimisers, and registered networks."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from dat_lightning.backbones.architectures import is_registered
from dat_lightning.core.errors import InputError

# What is made from these does nothing but hold its arguments, and, for networks, random weights.
_COMPUTING = tuple(f"dat_lightning.{room}." for room in ("core", "backbones", "speed", "modules", "weights"))
_OPTIMISERS = ("torch.optim.", "lightning.pytorch.cli.ReduceLROnPlateau")
_MOST_SETTINGS = 2000  # what takes them apart needs the square of their number
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def settings_in(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a module's hyperparameters out of a checkpoint; empty if it has none."""
    found = contents.get("hyper_parameters")
    return dict(found) if isinstance(found, Mapping) else {}


def check_classes(settings: Mapping[str, Any], allowed: Sequence[str], own: type) -> None:
    """Checks the classes that a file's hyperparameters name, before anything is imported or made.

    Args:
        settings: The hyperparameters, as the command line stores them.
        allowed: Classes that the caller trusts beyond those that are known, by their full names, or packages of them.
        own: The class that is to be made.

    Raises:
        InputError: If there is one that is not known, or there are more settings than any module has.
    """
    if _has_more(settings, _MOST_SETTINGS):
        raise InputError(f"the file has more than {_MOST_SETTINGS} settings of a module, which has some hundred")
    for name in _class_paths(settings):
        if not _is_known(name, own) and not any(name == each or name.startswith(f"{each}.") for each in allowed):
            raise InputError(
                f"the file names the class {name[:200]}, which is not made at a file's word; if you trust it, pass"
                f" allowed_classes=[{name[:200]!r}]"
            )
    if settings.get("_instantiator", _INSTANTIATOR) != _INSTANTIATOR:
        raise InputError(f"the file wants to be made by {str(settings['_instantiator'])[:200]}, and not by Lightning's")


def without_downloads(value: Any) -> Any:
    """Returns hyperparameters in which no network asks for weights from elsewhere: the file has them."""
    if isinstance(value, Mapping):
        return {key: False if key == "pretrained" else without_downloads(inner) for key, inner in value.items()}
    return [without_downloads(inner) for inner in value] if isinstance(value, list | tuple) else value


def _has_more(settings: Mapping[str, Any], most: int) -> bool:
    """Whether there are more values, each counted as often as it is reached, than so many; no more are looked at."""
    waiting: list[Any] = [settings]
    for _ in range(most + 1):
        if not waiting:
            return False
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return True


def _class_paths(value: Any, top: bool = True) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "class_path" or (top and key == "_class_path"):
                yield str(inner)
            yield from _class_paths(inner, top=False)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _class_paths(inner, top=False)


def _is_known(name: str, own: type) -> bool:
    module, _, attribute = name.rpartition(".")
    if not module:
        return True  # looked for among the classes that are loaded
    # Only this package is imported to find out, and torch's optimisers are there.
    here = module == "dat_lightning" or module.startswith("dat_lightning.")
    try:
        found = getattr(import_module(module) if here else sys.modules.get(module), attribute, None)
    except ImportError:
        return False
    if found is None:
        return False
    if found is own or is_registered(found):
        return True
    place = f"{getattr(found, '__module__', '')}.{attribute}"
    return place.startswith((*_COMPUTING, *_OPTIMISERS))
