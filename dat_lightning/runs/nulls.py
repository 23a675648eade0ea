"""``null`` in a configuration, where a class has no use for it: the parser lets it pass for any type."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

from dat_lightning.core.errors import InputError
from dat_lightning.weights.classes import makers_of


def check_nulls(config: Any, where: str = "", kind: Any = None) -> None:
    """Looks for arguments that are ``null`` although their types do not include it.

    Args:
        config: A parsed configuration, or a part of it.
        where: Its dotted name.
        kind: The class that it describes the arguments of, if that is known.

    Raises:
        InputError: Naming the first.
    """
    if isinstance(config, list):
        for place, part in enumerate(config):
            check_nulls(part, f"{where}.{place}")
        return
    if not isinstance(config, Mapping | Namespace):
        return
    settings = vars(config) if isinstance(config, Namespace) else config
    if isinstance(settings.get("class_path"), str):
        check_nulls(settings.get("init_args"), f"{where}.init_args", _imported(settings["class_path"]))
        return
    hints = _hints(kind)
    for name, value in settings.items():
        path, hint = f"{where}.{name}".lstrip("."), hints.get(str(name), Any)
        if value is None and not _takes_none(hint):
            raise InputError(f"{path} must not be null: leave it out for its default")
        check_nulls(value, path, hint if isinstance(hint, type) else None)


def _imported(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None  # of which the parser has words of its own


def _hints(kind: Any) -> dict[str, Any]:
    """Types of the arguments of a function, or of a class and its bases; a default of ``None`` allows it as well."""
    found: dict[str, Any] = {}
    for maker in makers_of(kind):
        try:
            parameters, hints = inspect.signature(maker).parameters, get_type_hints(maker)
        except (NameError, TypeError, ValueError):
            continue
        found |= {n: Any if p.default is None else hints.get(n, Any) for n, p in parameters.items()}
    return found


def _takes_none(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_takes_none(each) for each in get_args(hint))
    return hint in (None, NoneType, Any, object)
