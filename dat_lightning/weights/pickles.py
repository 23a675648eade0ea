"""A reader of pickles that builds data alone: it imports nothing and calls nothing that a file names."""

import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dat_lightning.weights.names import ForbiddenNameError, is_forbidden


@dataclass(frozen=True, slots=True)
class StandIn:
    """Takes the place of an object that is not built; it holds the name and nothing else.

    Args:
        name: Full name of the class or function in the file.
    """

    name: str


@dataclass(frozen=True, slots=True)
class _Builder:
    """What a pickle may call: one of the functions below."""

    build: Callable[..., Any]


def _mapping(*args: Any) -> dict[Any, Any]:
    # Python 2 wrote an OrderedDict with a list of pairs, a defaultdict has its factory.
    pairs = args[0] if args and isinstance(args[0], list) else []
    return _dict([part for pair in pairs for part in pair])


def _dict(items: list[Any]) -> dict[Any, Any]:
    pairs = zip(items[::2], items[1::2], strict=True)
    return {key: value for key, value in pairs if isinstance(key, _KEYS)}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, torch.storage.TypedStorage) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor whose size or stride are no natural numbers")
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # torch would enlarge a storage that is too small by memory that holds anything.
    if 0 not in size and (last + 1) * dtype.itemsize > storage.nbytes():
        raise pickle.UnpicklingError(f"a tensor of size {size} in a storage of {storage.nbytes()} bytes")
    return torch.empty(0, dtype=dtype).set_(storage.untyped(), offset, tuple(size), tuple(stride))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _subclass(build: Any, kind: Any, args: Any, state: Any) -> Any:
    if not isinstance(build, _Builder):
        raise pickle.UnpicklingError("a tensor of an unknown kind")
    return build.build(*args)


def _size(values: Any) -> tuple[Any, ...]:
    return tuple(values)


_KEYS = (str, bytes, int, float, type(None))

_BUILDERS = {
    "collections.OrderedDict": _Builder(_mapping),
    "collections.defaultdict": _Builder(_mapping),
    "torch.Size": _Builder(_size),
    "torch._utils._rebuild_tensor": _Builder(_tensor),
    "torch._utils._rebuild_tensor_v2": _Builder(_tensor),
    "torch._utils._rebuild_tensor_v3": _Builder(_tensor),
    "torch._utils._rebuild_parameter": _Builder(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Builder(_parameter),
    "torch._tensor._rebuild_from_type_v2": _Builder(_subclass),
}


class Unpickler:
    """Reads one pickle into tensors, numbers, strings, lists, tuples and dicts; for ``torch.load``'s ``pickle_module``.

    No module is imported, no attribute looked up and no method called that a file asks for. What a pickle names falls
    into three classes: tensors, mappings and types of numbers are built by functions of this module; functions of
    ``builtins`` and of ``torch``, and all of ``os``, ``sys``, ``subprocess``, ``importlib`` and the like are refused,
    called or not; everything else becomes a :class:`StandIn`, and so does whatever a pickle makes of it. Sets become
    stand-ins too, and entries of dicts under keys other than strings, bytes and numbers are left out.

    Args:
        file: At the start of a pickle; afterwards behind its end.
        encoding: Not used; strings of Python 2 are read as Latin-1.
    """

    def __init__(self, file: BinaryIO, *, encoding: str = "latin1") -> None:
        self._file = file
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # torch.load puts its reader of storages here.
        self.persistent_load: Callable[[Any], Any] | None = None

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name: one of our own functions, a type of numbers, or a stand-in.

        Raises:
            ForbiddenNameError: If the name has no place in a checkpoint.
        """
        path = f"{module}.{name}"
        if path in _BUILDERS:
            return _BUILDERS[path]
        if path == "torch.storage.UntypedStorage":
            return torch.UntypedStorage
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if is_forbidden(path):
            raise ForbiddenNameError(path)
        return StandIn(path)

    def load(self) -> Any:
        """Returns the contents of the pickle.

        Raises:
            pickle.UnpicklingError: If it is damaged, or does what data do not need.
            ForbiddenNameError: If it names something that has no place in a checkpoint.
        """
        for opcode, argument, _ in pickletools.genops(self._file):
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _OPERATIONS:
                _OPERATIONS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise pickle.UnpicklingError(f"a pickle with the opcode {opcode.name}")
        raise pickle.UnpicklingError("a pickle without an end")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise pickle.UnpicklingError("a pickle that takes more than it holds")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _mark(self) -> None:
        self._below_marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below_marks.pop()
        return items

    def _push_marked(self, make: Callable[[list[Any]], Any]) -> None:
        items = self._pop_mark()
        self._stack.append(make(items))

    def _drop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:  # the mark itself
            self._pop_mark()

    def _drop_marked(self) -> None:
        self._pop_mark()

    def _name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self.find_class(module, name))

    def _name_on_stack(self) -> None:
        module, name = self._pop(2)
        if not (type(module) is str and type(name) is str):
            raise pickle.UnpicklingError("a name that is no string")
        self._stack.append(self.find_class(module, name))

    def _call(self, function: Any, args: Any) -> None:
        if isinstance(function, _Builder) and isinstance(args, tuple):
            self._stack.append(function.build(*args))
        elif isinstance(function, StandIn):
            self._stack.append(function)
        else:
            raise pickle.UnpicklingError(f"a pickle that calls a {type(function).__name__}")

    def _call_with_names(self) -> None:
        function, args, _ = self._pop(3)
        self._call(function if isinstance(function, StandIn) else None, args)

    def _call_marked(self) -> None:
        function, *args = self._pop_mark()
        self._call(function, tuple(args))

    def _call_named(self, argument: str) -> None:
        args = tuple(self._pop_mark())
        self._name(argument)
        self._call(self._stack.pop(), args)

    def _build(self) -> None:
        target, _ = self._pop(2)
        if not isinstance(target, (dict, StandIn, Tensor)):
            raise pickle.UnpicklingError(f"a pickle that changes a {type(target).__name__}")
        self._stack.append(target)

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, StandIn):
            raise pickle.UnpicklingError(f"a pickle that appends to a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, (dict, StandIn)) or len(items) % 2:
            raise pickle.UnpicklingError(f"a pickle that sets items of a {type(target).__name__}")
        if isinstance(target, dict):
            target.update(_dict(items))

    def _storage(self) -> None:
        (identifier,) = self._pop(1)
        kind = identifier[0] if isinstance(identifier, tuple) and identifier else None
        if kind == "module":  # of torch before 0.4: a network, with its source
            self._stack.append(StandIn("torch.nn.Module"))
            return
        if kind != "storage" or len(identifier) not in (5, 6) or self.persistent_load is None:
            raise pickle.UnpicklingError("a reference to something other than a storage")
        _, storage_type, key, location, numel, *_ = identifier
        if isinstance(storage_type, StandIn) or not (isinstance(key, str) and isinstance(location, str)):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage whose length is no natural number")
        self._stack.append(self.persistent_load(identifier))

    def _remember(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]


def load(file: BinaryIO, *, encoding: str = "latin1") -> Any:
    """Returns the contents of one pickle; see :class:`Unpickler`."""
    return Unpickler(file, encoding=encoding).load()


_VALUES = frozenset(
    re.findall(
        r"\w+",
        """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
        STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8""",
    )
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_SET": StandIn("builtins.set")}
_OPERATIONS: dict[str, Callable[[Unpickler, Any], None]] = {
    "EMPTY_LIST": lambda reader, _: reader._stack.append([]),
    "EMPTY_DICT": lambda reader, _: reader._stack.append({}),
    "LIST": lambda reader, _: reader._push_marked(list),
    "TUPLE": lambda reader, _: reader._push_marked(tuple),
    "TUPLE1": lambda reader, _: reader._stack.append(tuple(reader._pop(1))),
    "TUPLE2": lambda reader, _: reader._stack.append(tuple(reader._pop(2))),
    "TUPLE3": lambda reader, _: reader._stack.append(tuple(reader._pop(3))),
    "DICT": lambda reader, _: reader._push_marked(_dict),
    "FROZENSET": lambda reader, _: reader._push_marked(lambda _: StandIn("builtins.frozenset")),
    "APPEND": lambda reader, _: reader._append(reader._pop(1)),
    "APPENDS": lambda reader, _: reader._append(reader._pop_mark()),
    "ADDITEMS": lambda reader, _: reader._append(reader._pop_mark()),
    "SETITEM": lambda reader, _: reader._set_items(reader._pop(2)),
    "SETITEMS": lambda reader, _: reader._set_items(reader._pop_mark()),
    "MARK": lambda reader, _: reader._mark(),
    "POP": lambda reader, _: reader._drop(),
    "POP_MARK": lambda reader, _: reader._drop_marked(),
    "DUP": lambda reader, _: reader._stack.append(reader._stack[-1]),
    "GET": lambda reader, index: reader._stack.append(reader._memo[index]),
    "BINGET": lambda reader, index: reader._stack.append(reader._memo[index]),
    "LONG_BINGET": lambda reader, index: reader._stack.append(reader._memo[index]),
    "PUT": lambda reader, index: reader._remember(index),
    "BINPUT": lambda reader, index: reader._remember(index),
    "LONG_BINPUT": lambda reader, index: reader._remember(index),
    "MEMOIZE": lambda reader, _: reader._remember(None),
    "GLOBAL": lambda reader, argument: reader._name(argument),
    "STACK_GLOBAL": lambda reader, _: reader._name_on_stack(),
    "REDUCE": lambda reader, _: reader._call(*reader._pop(2)),
    "NEWOBJ": lambda reader, _: reader._call(*reader._pop(2)),
    "NEWOBJ_EX": lambda reader, _: reader._call_with_names(),
    "OBJ": lambda reader, _: reader._call_marked(),
    "INST": lambda reader, argument: reader._call_named(argument),
    "BUILD": lambda reader, _: reader._build(),
    "BINPERSID": lambda reader, _: reader._storage(),
}
