"""Networks that a file describes, built only as far as the file has weights for them."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from dat_lightning.core.errors import InputError

_Model = TypeVar("_Model", bound=nn.Module)


def build_within(build: Callable[[], _Model], sizes: Sequence[int], arguments: object) -> _Model:
    """Returns what a function builds, unless it is a larger network than a file has weights for.

    A file of a kilobyte may ask for a million layers or 10¹⁰ classes. The network is built without memory first (on
    torch's device ``meta``), where its kind allows that, and given up as soon as it has more than twice the file's
    tensors and numbers, and then some: layers may be replaced in the course of building.

    Args:
        build: Makes the network.
        sizes: How many numbers each of the file's tensors has, those that share memory once.
        arguments: What the file says of the network: numbers, texts, and collections of them.

    Raises:
        InputError: If it is larger, or there is no memory for it.
        Exception: Whatever ``build`` raises.
    """
    tensors, numbers = 2 * len(sizes) + 1000, 2 * sum(sizes) + (1 << 22)
    largest = max(_integers(arguments), default=0)
    if largest > numbers:
        raise InputError(f"the network is to have {largest} of something, but the file has {sum(sizes)} weights in all")
    # InputError is a ValueError, and passes.
    with suppress(NotImplementedError, RuntimeError), _limited(tensors, numbers), torch.device("meta"):
        build()
    with _limited(tensors, numbers):
        try:
            return build()
        except RuntimeError as error:
            raise InputError(f"the network cannot be made: {str(error).splitlines()[0]}") from error


@contextmanager
def _limited(tensors: int, numbers: int) -> Iterator[None]:
    """Has torch give up a module that is being built in this thread and grows beyond limits."""
    thread, counts = threading.get_ident(), {"tensors": 0, "numbers": 0, "modules": 0}
    limits = {"tensors": tensors, "numbers": numbers, "modules": 10 * tensors}

    def count(**more: int) -> None:
        if threading.get_ident() != thread:
            return
        for name, number in more.items():
            counts[name] += number
            if counts[name] > limits[name]:
                raise InputError("the network is larger than its file: it has more layers or weights than are there")

    def on_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and not isinstance(tensor, nn.UninitializedParameter):
            count(tensors=1, numbers=tensor.numel())

    def on_module(module: nn.Module, name: str, inner: nn.Module | None) -> None:
        count(modules=1)

    handles = [
        register_module_parameter_registration_hook(on_tensor),
        register_module_buffer_registration_hook(on_tensor),
        register_module_module_registration_hook(on_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _integers(value: object) -> Iterator[int]:
    if isinstance(value, int):
        yield abs(value)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _integers(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for inner in value:
            yield from _integers(inner)
