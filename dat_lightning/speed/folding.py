"""Frozen batch norm folded into the convolutions before it: the same function, with fewer passes over the features."""

from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.energy import batch_norm_layers
from dat_lightning.core.errors import InputError


class FoldedNetwork(nn.Module):
    """A network's eval-mode function for input gradients, with batch norm folded away.

    A batch norm layer that follows a convolution, and alone reads it, becomes part of its weights; any other is one
    multiplication and addition per channel. All other layers are the network's own, among them those with hooks or
    parametrisations. Nothing here is a parameter or enters a state dict, and what an optimiser, an average or a
    checkpoint changes shows after :meth:`refresh`. Python values that ``forward`` reads are those of the construction.

    Args:
        network: Batch norm layers use their running statistics, whatever mode they are in.

    Raises:
        InputError: If the network cannot be traced, since its path depends on its input or it makes tensors of its own,
            has hooks on the whole of it, or has no batch norm to fold.

    Source: Jacob et al. 2018 (arXiv 1712.05877), Eq. 14, on folding.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not batch_norm_layers(network):
            raise InputError(f"{type(network).__name__} has no batch norm to fold: set fold_batch_norm to false")
        try:
            # In eval mode: what depends on the mode is decided by the trace.
            with no_trace(network):
                graph = fx.symbolic_trace(network)
            self._layers = _replace_batch_norm(graph)
            _check_kept(network, graph)
        except Exception as error:  # whatever a network's own code does with a proxy
            raise InputError(
                f"{type(network).__name__} cannot be traced, so its batch norm cannot be folded: set fold_batch_norm to"
                f" false ({type(error).__name__}: {error})"
            ) from error
        self._network = (network,)
        self.graph_module = graph
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the network's current weights and running statistics."""
        # Under inference mode the tensors could not be saved for a backward pass.
        with torch.inference_mode(False):
            for layer in self._layers:
                layer.refresh()
        # Moving a network replaces its buffers.
        for node in self.graph_module.graph.find_nodes(op="get_attr"):
            owner, _, name = str(node.target).rpartition(".")
            setattr(self.graph_module.get_submodule(owner), name, getattr(self._network[0].get_submodule(owner), name))

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the network in eval mode returns, up to rounding."""
        return cast(Tensor, self.graph_module(x))


class _FoldedConvolution(nn.Module):
    """A convolution and the batch norm after it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, convolution: nn.modules.conv._ConvNd, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        # In a tuple they are no submodules, and their parameters not those of the folded network.
        self._source = (convolution, norm)
        # Buffers, whose addresses CUDA graphs take as fixed instead of copying the weights in every pass.
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self.register_buffer("bias", torch.empty(0), persistent=False)

    def refresh(self) -> None:
        convolution, norm = self._source
        mean, variance = _statistics(norm)
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        self.weight, self.bias = _updated(self.weight, weight), _updated(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        # Past forward(), which would take the weights of the source: padding modes are handled there.
        return self._source[0]._conv_forward(x, self.weight, self.bias)


class _Affine(nn.Module):
    """A batch norm that cannot be folded, as a scale and a shift for each channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self._source = (norm,)
        self.register_buffer("scale", torch.empty(0), persistent=False)
        self.register_buffer("shift", torch.empty(0), persistent=False)

    def refresh(self) -> None:
        (norm,) = self._source
        mean, variance = _statistics(norm)
        scale = (variance + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - mean * scale
        self.scale, self.shift = _updated(self.scale, scale), _updated(self.shift, shift)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        # In the features' type: under autocast float32 would make all that follows float32, as batch norm does not.
        scale, shift = (value.view(shape).to(x.dtype) for value in (self.scale, self.shift))
        return torch.addcmul(shift, x, scale)


_Layer = _FoldedConvolution | _Affine


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    if norm.running_mean is None or norm.running_var is None:
        raise InputError(
            "a batch norm layer has no running statistics, so it cannot be folded: set fold_batch_norm to false"
        )
    return norm.running_mean, norm.running_var


def _updated(old: Tensor, new: Tensor) -> Tensor:
    """The new values, at the old address where possible, so that a compiled graph stays valid."""
    new = new.detach()
    same = (old.shape, old.stride(), old.dtype, old.device) == (new.shape, new.stride(), new.dtype, new.device)
    return old.copy_(new) if same else new.clone(memory_format=torch.preserve_format)


def _replace_batch_norm(graph: fx.GraphModule) -> list[_Layer]:
    """Replaces every batch norm layer of a traced network that can be replaced, and returns the new layers."""
    layers: list[_Layer] = []
    modules = dict(graph.named_modules())
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    for node in list(graph.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or _has_more_than_its_code(norm):
            continue
        before = node.args[0] if node.args else node.kwargs["input"]
        convolution = modules.get(str(before.target)) if before.op == "call_module" else None
        # A convolution that is called twice, or that something else reads, needs its own weights there.
        alone = len(before.users) == 1 and calls.count(str(before.target)) == 1
        plain = isinstance(convolution, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not _has_more_than_its_code(convolution)
        if plain and alone:
            layer: _Layer = _FoldedConvolution(cast(nn.modules.conv._ConvNd, convolution), norm)
            name, source = f"folded_{len(layers)}", before.args or (before.kwargs["input"],)
        else:
            layer, name, source = _Affine(norm), f"affine_{len(layers)}", (before,)
        layers.append(layer)
        graph.add_submodule(name, layer)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.call_module(name, source))
        graph.graph.erase_node(node)
        if name.startswith("folded"):
            graph.graph.erase_node(before)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return layers


def _has_more_than_its_code(layer: nn.Module) -> bool:
    """Whether hooks or parametrisations, such as those of weight and spectral norms, belong to the layer's function."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks) or parametrize.is_parametrized(layer)


def _check_kept(network: nn.Module, graph: fx.GraphModule) -> None:
    """Raises an error for what a trace loses without a word."""
    if network._forward_hooks or network._forward_pre_hooks:
        raise TypeError("it has forward hooks, which a trace leaves out")
    names = [str(node.target) for node in graph.graph.find_nodes(op="get_attr")]
    if any(name.startswith("_tensor_constant") for name in names):
        raise TypeError("its forward makes tensors that do not come from its input, which a trace would fix")
