"""A stand-in for ``torch.compile``'s back ends, for tests: counts graphs, and treats results as CUDA graphs do."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

# torch's modes that replay CUDA graphs.
REPLAYING = ("reduce-overhead", "max-autotune")


class Compiler:
    """Runs graphs by their own operations, in the place of the real compiler.

    In a mode that replays CUDA graphs all that graphs returned is overwritten with NaN when the next forward pass
    begins: on a GPU they write to the same memory again.

    Attributes:
        graphs: Of each graph the mode, the shape of the images, and whether it has a backward pass.
    """

    def __init__(self) -> None:
        self.graphs: list[tuple[str | None, tuple[int, ...], bool]] = []
        self._results: list[Tensor] = []

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator["Compiler"]:
        """Takes the place of ``torch.compile``."""
        original = torch.compile

        def compile(function: Callable[..., Any], *, dynamic: bool, mode: str | None) -> Callable[..., Any]:
            return original(function, dynamic=dynamic, backend=self._backend(mode))

        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", compile)
            yield self
        torch._dynamo.reset()

    def _backend(self, mode: str | None) -> Callable[..., Any]:
        def forward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return self._replayed(graph, mode, begins=True)

        def backward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return self._replayed(graph, mode, begins=False)

        inner = aot_autograd(fw_compiler=forward, bw_compiler=backward)

        def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            images = max((t for t in inputs if isinstance(t, Tensor) and t.dim() == 4), key=lambda t: t.shape[-1])
            self.graphs.append((mode, tuple(images.shape), torch.is_grad_enabled()))
            return inner(graph, inputs)

        return backend

    def _replayed(self, graph: fx.GraphModule, mode: str | None, *, begins: bool) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            if begins and mode in REPLAYING:
                for old in self._results:
                    old.data.fill_(float("nan"))
                self._results.clear()
            results = graph(*inputs)
            if mode in REPLAYING:
                given = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
                self._results += [
                    t
                    for t in results
                    if isinstance(t, Tensor) and t.is_floating_point() and t.untyped_storage().data_ptr() not in given
                ]
            return results

        boxed: Callable[..., Any] = make_boxed_func(run)
        return boxed
