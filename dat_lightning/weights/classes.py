"""Which classes a file may have made: ours that only compute, torch's optimisers, and registered networks."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dat_lightning.backbones.architectures import is_registered
from dat_lightning.core.errors import InputError

# What is made from these does nothing but hold its arguments, and, for networks, random weights.
_COMPUTING = tuple(f"dat_lightning.{room}." for room in ("core", "backbones", "speed", "modules", "weights"))
_OPTIMISERS = ("torch.optim.", "lightning.pytorch.cli.ReduceLROnPlateau")
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
_MOST_SETTINGS = 2000  # what takes them apart needs the square of their number


def settings_in(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a module's hyperparameters out of a checkpoint; empty if it has none."""
    found = contents.get("hyper_parameters")
    return dict(found) if isinstance(found, Mapping) else {}


def check_classes(settings: Mapping[str, Any], allowed: Sequence[str], own: type) -> None:
    """Checks the classes and functions that a file's hyperparameters name, before anything is imported or made.

    Whoever makes objects of settings takes a text for the name of a class or function wherever one is expected, so a
    text may stand only where the argument's type is one. Settings that the command line has not saved are given to
    ``own`` as they are, and nothing is made of them.

    Args:
        settings: The hyperparameters, as the command line stores them.
        allowed: Classes that the caller trusts beyond those that are known, by their full names, or packages of them.
        own: The class that is to be made.

    Raises:
        InputError: If there is one that is not known, or there are more settings than any module has.
    """
    if not {"_class_path", "_instantiator"} & settings.keys():
        return
    if _has_more(settings, _MOST_SETTINGS):
        raise InputError(f"the file has more than {_MOST_SETTINGS} settings of a module, which has some hundred")
    if settings.get("_instantiator", _INSTANTIATOR) != _INSTANTIATOR:
        raise InputError(f"the file wants to be made by {str(settings['_instantiator'])[:200]}, and not by Lightning's")
    name = settings.get("_class_path")
    made = own if name is None else _known(name, own, allowed)
    hints = _hints(made)
    for key, value in settings.items():
        if key not in ("_class_path", "_instantiator"):
            _check(value, hints.get(key, Any), own, allowed)


def without_downloads(value: Any) -> Any:
    """Returns hyperparameters in which no network asks for weights from elsewhere: the file has them."""
    if isinstance(value, Mapping):
        return {key: False if key == "pretrained" else without_downloads(inner) for key, inner in value.items()}
    return [without_downloads(inner) for inner in value] if isinstance(value, list | tuple) else value


def _check(value: Any, hint: Any, own: type, allowed: Sequence[str]) -> None:
    if isinstance(value, str) and not _takes_text(hint):
        _known(value, own, allowed)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check(inner, hint, own, allowed)
    elif isinstance(value, Mapping):
        kind = _known(value["class_path"], own, allowed) if "class_path" in value else hint
        hints = _hints(kind)
        for key, inner in value.items():
            if key in ("init_args", "dict_kwargs") and isinstance(inner, Mapping):
                for name, argument in inner.items():
                    _check(argument, hints.get(name, Any), own, allowed)
            elif key != "class_path":
                _check(inner, hints.get(key, Any), own, allowed)


def _known(name: object, own: type, allowed: Sequence[str]) -> Any:
    """The class or function of a name that a file may use; only this package and what is allowed is imported."""
    module, _, attribute = str(name).rpartition(".")
    trusted = any(name == each or str(name).startswith(f"{each}.") for each in allowed)
    here = module == "dat_lightning" or module.startswith("dat_lightning.")
    try:
        found = getattr(import_module(module) if here or trusted else sys.modules.get(module), attribute, None)
    except (ImportError, ValueError):
        found = None
    place = f"{getattr(found, '__module__', '')}.{attribute}"
    known = found is own or is_registered(found) or place.startswith((*_COMPUTING, *_OPTIMISERS))
    if not (trusted or (found is not None and known)):
        raise InputError(
            f"the file names the class {str(name)[:200]}, which is not made at a file's word; if you trust it, pass"
            f" allowed_classes=[{str(name)[:200]!r}]"
        )
    return found


def _takes_text(hint: Any) -> bool:
    """Whether a text is an argument of a type as it is, and not the name of something to import."""
    if hint in (str, Path) or get_origin(hint) is Literal:
        return True
    if get_origin(hint) is Callable or hint in (Any, NoneType):
        return False
    return any(_takes_text(inner) for inner in get_args(hint))


def _hints(kind: Any) -> dict[str, Any]:
    """Types of the arguments of a function, or of a class and those of its bases that it hands others to."""
    if get_origin(kind) in (Union, UnionType):
        return {name: hint for member in get_args(kind) for name, hint in _hints(member).items()}
    found: dict[str, Any] = {}
    for maker in makers_of(kind):
        with suppress(NameError, TypeError):  # of which nothing is known: no texts then
            found |= get_type_hints(inspect.unwrap(maker))
    return found


def makers_of(kind: Any) -> list[Callable[..., Any]]:
    """Returns what takes the arguments of a function, or of a class and of those bases that it hands others to."""
    bases = reversed(kind.__mro__) if isinstance(kind, type) else ()
    makers = [vars(each)["__init__"] for each in bases if "__init__" in vars(each)]
    return makers or ([kind] if callable(kind) else [])


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
