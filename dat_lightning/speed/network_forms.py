"""Faster forms of a network: compiled for the batch sizes that come again, with batch norm folded, or both."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dat_lightning.core.errors import InputError
from dat_lightning.speed.folding import FoldedNetwork

CompileMode = bool | Literal["reduce-overhead", "max-autotune"]
"""Whether to compile, or ``torch.compile``'s mode; on a GPU both of these let ascents replay CUDA graphs."""

_Purpose = Literal["ascents", "passes"]

# By mode: torch's for ascents, and for all other passes.
_TORCH_MODES: dict[CompileMode, tuple[str | None, str | None]] = {
    True: (None, None),
    "reduce-overhead": ("reduce-overhead", None),
    "max-autotune": ("max-autotune", "max-autotune-no-cudagraphs"),
}


class CompiledNetwork(nn.Module):
    """Runs a network's compiled graph where a batch has an expected size, and its own code otherwise.

    A graph holds for one batch size, and takes longer to make than many passes: the rest of an evaluation set, or the
    images that an attack has left over, are not worth one. Weights are the network's. A copy makes graphs of its own.

    Args:
        network: Maps images (N, C, H, W) to logits (N, K).
        mode: ``torch.compile``'s. Results of CUDA graphs are overwritten by the next call.
        expected_sizes: The batch sizes N; the set may grow later.

    Attributes:
        in_training: Whether to expect every size, as training has one or few.
    """

    def __init__(self, network: nn.Module, mode: str | None, expected_sizes: set[int]) -> None:
        super().__init__()
        self.network = network
        self.mode = mode
        self.expected_sizes = expected_sizes
        self.in_training = False
        self._graph = _compiled(network, mode)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the network's logits."""
        compiled = self.in_training or len(x) in self.expected_sizes
        return cast(Tensor, self._graph(x) if compiled else self.network(x))

    def __getstate__(self) -> dict[str, Any]:
        # A graph is of one network, and a copy's network is another.
        return {name: value for name, value in self.__dict__.items() if name != "_graph"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._graph = _compiled(self.network, self.mode)


class NetworkForms:
    """Makes the forms in which a module calls its network, each at its first use.

    Where a layer or a parameter of the network is replaced by another one, forms are made anew.

    Args:
        compile: Whether, or how, to compile: for any batch size in train mode, for sizes that :meth:`expect` was told
            of in eval mode. CUDA graphs serve ascents alone, which keep neither logits nor gradients over a step; other
            passes are compiled without.
        fold_batch_norm: Whether ascents climb a :class:`~dat_lightning.speed.FoldedNetwork`.

    Raises:
        InputError: If there is no such mode.
    """

    def __init__(self, compile: CompileMode, fold_batch_norm: bool) -> None:
        if compile is not False and compile not in _TORCH_MODES:
            raise InputError(f"compile must be true, false, 'reduce-overhead' or 'max-autotune', got {compile!r}")
        self.compile: CompileMode = compile
        self.fold_batch_norm = fold_batch_norm
        self._expected_sizes: dict[_Purpose, set[int]] = {"ascents": set(), "passes": set()}
        self._parts: list[object] = []
        self._folded: FoldedNetwork | None = None
        self._compiled: dict[_Purpose, CompiledNetwork] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own: the copied network may never be called, as that of a moving average.
        return {**self.__dict__, "_parts": [], "_folded": None, "_compiled": {}}

    def expect(self, size: int, purposes: Sequence[_Purpose] = ("ascents", "passes")) -> None:
        """Says that batches of this size come again in evaluation."""
        for purpose in purposes:
            self._expected_sizes[purpose].add(size)

    def clear(self) -> None:
        """Drops all forms, and with them their weights and the memory of CUDA graphs."""
        self._parts, self._folded = [], None
        self._compiled.clear()

    def for_passes(self, network: nn.Module) -> nn.Module:
        """Returns the form for training and evaluation: any mode, logits that last."""
        if self.compile is False:
            return network
        self._forget_other_than(network)
        return self._compile("passes", network, network.training)

    def for_ascents(self, network: nn.Module) -> nn.Module:
        """Returns the form that ascents in eval mode climb, with the current weights.

        Raises:
            InputError: If batch norm is to be folded, and cannot be.
        """
        if self.compile is False and not self.fold_batch_norm:
            return network
        self._forget_other_than(network)
        if not self.fold_batch_norm:
            return self._compile("ascents", network, network.training)
        if self._folded is None:
            self._folded = FoldedNetwork(network)
        else:
            self._folded.refresh()
        return self._compile("ascents", self._folded, network.training)

    def _compile(self, purpose: _Purpose, network: nn.Module, in_training: bool) -> nn.Module:
        if self.compile is False:
            return network
        if purpose not in self._compiled:
            mode = _TORCH_MODES[self.compile][purpose == "passes"]
            self._compiled[purpose] = CompiledNetwork(network, mode, self._expected_sizes[purpose])
        # Ascents change the mode before they call the network, so it is told here.
        self._compiled[purpose].in_training = in_training
        return self._compiled[purpose]

    def _forget_other_than(self, network: nn.Module) -> None:
        """Drops the forms of a network that is another one now, in whole or in part."""
        parts = [*network.modules(), *network.parameters()]
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            self.clear()
            self._parts = parts


def _compiled(network: nn.Module, mode: str | None) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return cast(Tensor, network(x))

    # torch limits the graphs of one piece of code, so each network has its own. T steps are T calls of it: T is no
    # constant of the graph.
    call.__code__ = call.__code__.replace()
    return torch.compile(call, dynamic=False, mode=mode)
