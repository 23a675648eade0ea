"""Faster forms of a network: compiled for the batch sizes that come again, with batch norm folded, or both."""

from typing import Literal, cast

from torch import Tensor, nn

from dat_lightning.core.folding import FoldedNetwork

CompileMode = bool | Literal["reduce-overhead", "max-autotune"]
"""Whether to compile, or ``torch.compile``'s mode; on a GPU both of these let ascents replay CUDA graphs."""

# By mode: torch's for ascents, and for all other passes.
_TORCH_MODES: dict[CompileMode, tuple[str | None, str | None]] = {
    True: (None, None),
    "reduce-overhead": ("reduce-overhead", None),
    "max-autotune": ("max-autotune", "max-autotune-no-cudagraphs"),
}


class CompiledNetwork(nn.Module):
    """Runs a network's compiled graph where a batch has an expected size, and its own code otherwise.

    A graph holds for one batch size, and takes longer to make than many passes: the rest of an evaluation set, or the
    images that an attack has left over, are not worth one. Weights are the network's. A copy runs the own code.

    Args:
        network: Maps images (N, C, H, W) to logits (N, K).
        mode: ``torch.compile``'s. Results of CUDA graphs are overwritten by the next call.
        expected_sizes: The batch sizes N; the set may grow later.
    """

    def __init__(self, network: nn.Module, mode: str | None, expected_sizes: set[int]) -> None:
        super().__init__()
        self.network = network
        self.expected_sizes = expected_sizes
        # A module of its own: the network may be compiled in two modes, and stays as it is.
        self._graph = _OwnCode(network)
        # T steps are T calls, so that T is no constant of the graph.
        self._graph.compile(dynamic=False, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the network's logits."""
        return cast(Tensor, self._graph(x) if len(x) in self.expected_sizes else self.network(x))


class NetworkForms:
    """Makes the forms in which a module calls its network, each at its first use.

    Args:
        compile: Whether, or how, to compile. CUDA graphs serve ascents alone, which keep neither logits nor gradients
            over a step; other passes are compiled without.
        fold_batch_norm: Whether ascents climb a :class:`~dat_lightning.core.FoldedNetwork`.
    """

    def __init__(self, compile: CompileMode, fold_batch_norm: bool) -> None:
        if compile is not False and compile not in _TORCH_MODES:
            raise ValueError(f"compile must be true, false, 'reduce-overhead' or 'max-autotune', got {compile!r}")
        self.compile: CompileMode = compile
        self.fold_batch_norm = fold_batch_norm
        self._expected_sizes: set[int] = set()
        self._source: nn.Module | None = None
        self._folded: FoldedNetwork | None = None
        self._compiled: dict[str, CompiledNetwork] = {}

    def expect(self, *sizes: int) -> None:
        """Says that batches of these sizes come again."""
        self._expected_sizes.update(sizes)

    def for_passes(self, network: nn.Module) -> nn.Module:
        """Returns the form for training and evaluation: any mode, logits that last."""
        self._forget_other_than(network)
        return self._compile("passes", network)

    def for_ascents(self, network: nn.Module) -> nn.Module:
        """Returns the form that ascents in eval mode climb, with the current weights.

        Raises:
            ValueError: If batch norm is to be folded, and cannot be.
        """
        self._forget_other_than(network)
        if not self.fold_batch_norm:
            return self._compile("ascents", network)
        if self._folded is None:
            self._folded = FoldedNetwork(network)
        else:
            self._folded.refresh()
        return self._compile("ascents", self._folded)

    def _compile(self, purpose: Literal["ascents", "passes"], network: nn.Module) -> nn.Module:
        if self.compile is False:
            return network
        if purpose not in self._compiled:
            mode = _TORCH_MODES[self.compile][purpose == "passes"]
            self._compiled[purpose] = CompiledNetwork(network, mode, self._expected_sizes)
        return self._compiled[purpose]

    def _forget_other_than(self, network: nn.Module) -> None:
        """Drops the forms of a network that another one has replaced."""
        if self._source is not network:
            self._source, self._folded = network, None
            self._compiled.clear()


class _OwnCode(nn.Module):
    """Calls a network past its hooks, which graphs would have to be broken for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.network.forward(x))
