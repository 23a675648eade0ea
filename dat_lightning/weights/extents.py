"""How much a file stands for: bounded before anything in it is built, compared or shown."""

import pickletools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dat_lightning.core.errors import InputError

MAX_VALUES = 2_000_000
"""Of a file, each counted as often as it is reached; a run's with ConvNeXt-L, its average and AdamW has 42 000."""
MAX_DEPTH = 100
"""Of collections within collections."""

_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
_GET = ("GET", "BINGET", "LONG_BINGET")
# What fills the collection below it on the stack.
_FILL = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")
_TEXT = 16  # so many characters count as a value
_EXPANDED = 65_536  # so many numbers may be the same ones again
_MARK = pickletools.markobject

Opcode = tuple[pickletools.OpcodeInfo, Any, int | None]
"""One of a pickle, its argument and its place, as ``pickletools.genops`` gives them."""


@dataclass(eq=False, slots=True)
class _Value:
    """A value of a pickle: how many it stands for, itself among them, and how deep they are nested."""

    count: int = 1
    depth: int = 0
    within_another: bool = False

    def take(self, parts: Iterable["_Value"]) -> None:
        for part in parts:
            part.within_another = True
            self.count += part.count
            self.depth = max(self.depth, part.depth + 1)
        if self.count > MAX_VALUES:
            raise InputError(f"it stands for more than {MAX_VALUES} values, most of them the same ones again")
        if self.depth > MAX_DEPTH:
            raise InputError(f"its collections are nested more than {MAX_DEPTH} deep")


def check_pickle(opcodes: Iterable[Opcode]) -> None:
    """Counts the values that a pickle stands for, without making one.

    A pickle may name a value again and again: a dozen lists of a dozen references each are a file of a kilobyte, and
    10¹² values for whoever walks through them, compares them or prints them, and even for whoever hashes a tuple.

    Args:
        opcodes: Of one pickle, to its end.

    Raises:
        InputError: If it stands for too many values, nests them too deep, or a collection contains itself.
        Exception: Whatever a reader of damaged bytes stumbles over.
    """
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    for opcode, argument, _ in opcodes:
        parts: list[_Value] = []
        number = 0 if opcode.name == "MEMOIZE" else len(opcode.stack_before)
        if _MARK in opcode.stack_before:
            while (value := stack.pop()) is not None:
                parts.append(value)
            number = opcode.stack_before.index(_MARK)
        elif opcode.name == "POP" and stack and stack[-1] is None:
            stack.pop()
            continue
        below = [value for value in (stack.pop() for _ in range(number)) if value is not None][::-1]
        if opcode.name in _PUT or opcode.name == "MEMOIZE":
            top = stack[-1]
            if top is not None:
                memo[len(memo) if opcode.name == "MEMOIZE" else int(argument)] = top
        elif opcode.name in _GET:
            stack.append(memo[int(argument)])
        elif opcode.name == "DUP":
            stack += [below[0], below[0]]
        elif opcode.name in _FILL or opcode.name == "BUILD":
            filled = below[0]
            filled.take(below[1:] + parts)
            # Of an object that is built, the state is not kept.
            if filled.within_another and opcode.name in _FILL:
                raise InputError("one of its collections contains itself")
            stack.append(filled)
        else:
            for kind in opcode.stack_after:
                made = None if kind is _MARK else _Value()
                if made is not None:
                    # A long text is shown as often as it is reached, too.
                    made.count += len(argument) // _TEXT if isinstance(argument, str | bytes) else 0
                    made.take(below + parts)
                stack.append(made)


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
