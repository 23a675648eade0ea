"""How much a file stands for: bounded before anything in it is built, compared or shown."""

import pickletools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import _weights_only_unpickler as torch_reader

from dat_lightning.core.errors import InputError

MAX_VALUES = 2_000_000
"""Of a file, each counted as often as it is reached; a run's with ConvNeXt-L, its average and AdamW has 42 000."""
MAX_DEPTH = 100
"""Of collections within collections."""

_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
_GET = ("GET", "BINGET", "LONG_BINGET")
# What fills the collection below it on the stack.
_FILL = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")
_FEW = 6  # parts of a reference to a storage, at most
_TEXT = 16  # so many characters count as a value
_EXPANDED = 65_536  # so many numbers may be the same ones again
_MARK = pickletools.markobject

Opcode = tuple[pickletools.OpcodeInfo, Any, int | None]
"""One of a pickle, its argument and its place, as ``pickletools.genops`` gives them."""


# Classes and functions of torch's restricted reader that take no more memory than what they are given. The others are
# storages, tensors and a bytearray of any size that a number asks for.
_CALLED = (
    "_codecs.encode",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
)
_REBUILD, _REBUILD_ANY = "torch._utils._rebuild_", "torch._tensor._rebuild_from_type_v2"


@dataclass(eq=False, slots=True)
class _Value:
    """A value of a pickle: how many it stands for, itself among them, and how deep they are nested.

    Of a class or function ``plain`` is the name, of a number or text the value; ``parts`` are those of a tuple.
    """

    plain: Any = None
    count: int = 1
    depth: int = 0
    within_another: bool = False
    parts: "tuple[_Value, ...]" = ()

    def take(self, parts: Iterable["_Value"]) -> None:
        for part in parts:
            part.within_another = True
            self.count += part.count
            self.depth = max(self.depth, part.depth + 1)
        if self.count > MAX_VALUES:
            raise InputError(f"it stands for more than {MAX_VALUES} values, most of them the same ones again")
        if self.depth > MAX_DEPTH:
            raise InputError(f"its collections are nested more than {MAX_DEPTH} deep")


def check_pickle(opcodes: Iterable[Opcode], size: int) -> dict[str, int]:
    """Counts the values and numbers that a pickle stands for, without making one.

    A pickle may name a value again and again: a dozen lists of a dozen references each are a file of a kilobyte, and
    10¹² values for whoever walks through them, compares them or prints them, and even for whoever hashes a tuple.

    Args:
        opcodes: Of one pickle, to its end.
        size: Of the file, in bytes.

    Returns:
        How many numbers each storage has, by its key.

    Raises:
        InputError: If it stands for too many values, nests them too deep, a collection contains itself, storages are
            larger than the file, or something is called that takes memory of any size.
        Exception: Whatever a reader of damaged bytes stumbles over.
    """
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    storages: dict[str, int] = {}
    for opcode, argument, _ in opcodes:
        if opcode.name == "POP" and stack and stack[-1] is None:
            stack.pop()
            continue
        parts = _taken(opcode, stack)
        if opcode.name in _PUT or opcode.name == "MEMOIZE":
            if (top := stack[-1]) is not None:
                memo[len(memo) if opcode.name == "MEMOIZE" else int(argument)] = top
        elif opcode.name in _GET:
            stack.append(memo[int(argument)])
        elif opcode.name == "DUP":
            stack += [parts[0], parts[0]]
        elif opcode.name in _FILL or opcode.name == "BUILD":
            parts[0].take(parts[1:])
            # Of an object that is built, the state is not kept.
            if parts[0].within_another and opcode.name in _FILL:
                raise InputError("one of its collections contains itself")
            stack.append(parts[0])
        else:
            if opcode.name in ("REDUCE", "NEWOBJ"):
                _check_call(*parts)
            elif opcode.name == "BINPERSID":
                _note_storage(parts[0].parts, storages, size)
            stack += [None if kind is _MARK else _made(opcode.name, argument, parts) for kind in opcode.stack_after]
    return storages


def _taken(opcode: pickletools.OpcodeInfo, stack: list[_Value | None]) -> list[_Value]:
    """Takes what an operation needs off the stack; returns it, the lowest first."""
    if opcode.name == "MEMOIZE":
        return []
    above: list[_Value] = []
    number = len(opcode.stack_before)
    if _MARK in opcode.stack_before:
        while (value := stack.pop()) is not None:
            above.append(value)
        number = opcode.stack_before.index(_MARK)
    below = [value for value in (stack.pop() for _ in range(number)) if value is not None]
    return below[::-1] + above[::-1]


def _made(opcode: str, argument: Any, parts: list[_Value]) -> _Value:
    value = _Value(argument.replace(" ", ".") if opcode == "GLOBAL" else argument)
    # A long text is shown as often as it is reached, too.
    value.count += len(argument) // _TEXT if isinstance(argument, str | bytes) else 0
    value.parts = tuple(parts) if opcode.startswith("TUPLE") and len(parts) <= _FEW else ()
    value.take(parts)
    return value


def _check_call(function: _Value, arguments: _Value) -> None:
    name = function.plain
    if name not in torch_reader._get_allowed_globals():
        return  # nothing that torch would call
    inner = arguments.parts[0].plain if arguments.parts else None
    rebuilds = name.startswith(_REBUILD) or (name == _REBUILD_ANY and str(inner).startswith(_REBUILD))
    if name not in _CALLED and not rebuilds:
        raise InputError(f"it calls {name}, which takes memory of any size")


def _note_storage(reference: tuple[_Value, ...], storages: dict[str, int], size: int) -> None:
    """Adds up what the reference to a storage says: its kind, type, key, device and number of elements."""
    if len(reference) >= _FEW - 1 and isinstance(reference[4].plain, int):
        storages[str(reference[2].plain)] = reference[4].plain
    else:
        raise InputError("it refers to a storage without saying how large it is")
    # Of more than a byte each; no more is known of old files before they are read.
    if reference[4].plain < 0 or sum(storages.values()) > size:
        raise InputError(f"its storages have more numbers than the {size} bytes of the file")


def check_tensors(contents: Any) -> None:
    """Looks for tensors with more numbers than the file has for them, as one that was expanded to any size.

    Args:
        contents: Of a file whose pickle :func:`check_pickle` has seen.

    Raises:
        InputError: If there is one.
    """
    for name, tensor in tensors_in(contents):
        if tensor.layout is not torch.strided:
            continue
        bytes_there = tensor.untyped_storage().nbytes()
        if tensor.numel() > _EXPANDED and tensor.numel() * tensor.element_size() > bytes_there:
            shape = "×".join(map(str, tensor.shape))
            raise InputError(f"its tensor {name!r} is {shape}, for which the file has {bytes_there} bytes")


def storages_in(contents: Any) -> list[int]:
    """Returns how many numbers each storage of a file has that a tensor stands on, those of no memory left out."""
    found: dict[int, int] = {}
    for _, tensor in tensors_in(contents):
        if tensor.layout is torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
    return list(found.values())


def tensors_in(contents: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of a file, with the key below which each is."""
    waiting = [("", contents)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            waiting += [(str(key)[:80], inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [(name, inner) for inner in value]
