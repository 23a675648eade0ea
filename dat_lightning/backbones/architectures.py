"""Networks by registered name: what made a module can be written down, and read back without importing anything."""

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, cast

from torch import nn

from dat_lightning.core.errors import InputError

_Factory = TypeVar("_Factory", bound=Callable[..., nn.Module])
_ATTRIBUTE = "_dat_lightning_architecture"


class _Entry(NamedTuple):
    factory: Callable[..., nn.Module]
    signature: inspect.Signature
    arguments: frozenset[str]


_registry: dict[str, _Entry] = {}


def register_architecture(name: str, omit: Collection[str] = ()) -> Callable[[_Factory], _Factory]:
    """Returns a decorator that registers an ``nn.Module`` class, or a function that returns an ``nn.Module``.

    Every module made through it remembers the name and its arguments, also through ``copy.deepcopy`` and ``pickle``.
    A subclass is another architecture: it needs a registration of its own.

    Args:
        name: What the architecture is called in files.
        omit: Parameters that change how a module starts or runs but not what it computes; descriptions lack them.

    Raises:
        InputError: If the name belongs to another class or function, or a parameter is variable or unknown.
    """

    def register(factory: _Factory) -> _Factory:
        signature = inspect.signature(factory)
        parameters = signature.parameters.values()
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters):
            raise InputError(f"architecture {name!r} must name its parameters, got {signature}")
        if not set(omit) <= signature.parameters.keys():
            raise InputError(f"omit must hold parameters of {name!r}, got {sorted(omit)} for {signature}")
        old = _registry.get(name)
        # A notebook's cell may run twice.
        if old is not None and _place(old.factory) != _place(factory):
            raise InputError(f"architecture {name!r} is already {'.'.join(_place(old.factory))}; choose another name")
        recording: Callable[..., nn.Module]
        recording = _recording_class(name, factory) if isinstance(factory, type) else _recording_function(name, factory)
        _registry[name] = _Entry(recording, signature, frozenset(signature.parameters) - frozenset(omit))
        return cast(_Factory, recording)

    return register


def architecture_of(module: object) -> dict[str, Any] | None:
    """Returns ``{"name": ..., "arguments": {...}}`` as JSON can hold it, defaults among the arguments.

    ``None`` for a module that no registered class or function made, or one made from arguments that are more than
    numbers, strings and sequences or mappings of them.
    """
    return copy.deepcopy(getattr(module, "__dict__", {}).get(_ATTRIBUTE))


def is_registered(factory: object) -> bool:
    """Returns whether it is a class or function of a registered architecture."""
    return any(entry.factory is factory for entry in _registry.values())


def build_architecture(description: object) -> nn.Module:
    """Returns a new module from a description that :func:`architecture_of` gave; nothing but registered names is used.

    Raises:
        InputError: If it is no description, its name is not registered, or the architecture refuses the arguments.
    """
    if not isinstance(description, Mapping) or description.keys() != {"name", "arguments"}:
        raise InputError(f"an architecture must be {{'name': ..., 'arguments': {{...}}}}, got {_short(description)}")
    name, arguments = description["name"], description["arguments"]
    entry = _registry.get(name) if isinstance(name, str) else None
    if entry is None:
        raise InputError(
            f"architecture {_short(name)} is not registered; known are {', '.join(sorted(_registry))}; one of your own"
            " is known once the file that has @register_architecture is imported"
        )
    if not isinstance(arguments, Mapping) or not arguments.keys() <= entry.arguments:
        raise InputError(f"architecture {name!r} has the arguments {sorted(entry.arguments)}, got {_short(arguments)}")
    try:
        return entry.factory(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"architecture {name!r} refuses {_short(dict(arguments))}: {error}") from error


def _short(value: object) -> str:
    """What a file says, as far as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _place(factory: Callable[..., nn.Module]) -> tuple[str, str]:
    return factory.__module__, factory.__qualname__


def _recording_class(name: str, cls: type[nn.Module]) -> type[nn.Module]:
    original = cls.__init__

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:
            _record(self, name, args, kwargs)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


def _recording_function(name: str, function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> nn.Module:
        module = function(*args, **kwargs)
        _record(module, name, args, kwargs)
        return module

    return make


def _record(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    entry = _registry[name]
    bound = entry.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    try:
        arguments = {key: _plain(value) for key, value in bound.arguments.items() if key in entry.arguments}
    except TypeError:
        description = None
    else:
        description = {"name": name, "arguments": arguments}
    module.__dict__[_ATTRIBUTE] = description


def _plain(value: object) -> Any:
    """A copy as JSON reads it back."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # NumPy's numbers, and sequences such as OmegaConf's.
    if isinstance(value, Integral | Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError
