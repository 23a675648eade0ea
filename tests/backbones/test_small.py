from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_lightning import EnergyModel, SmallResNet, architecture_of, build_architecture
from dat_lightning.backbones.small import Activation, Normalization, PreActivationBlock
from dat_lightning.core import batch_norm_layers


def batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    shift = layer.bias - layer.running_mean * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def layer_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    normal = (x - mean) / (variance + layer.eps).sqrt()
    return normal * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


NORMS: list[Any] = [("batch", batch_norm), ("layer", layer_norm)]


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1, generator=generator)
    return module.double().eval()


@pytest.mark.parametrize(
    ("arguments", "shape", "logits"),
    [
        ({}, (2, 1, 16, 16), (2, 10)),
        ({"num_classes": 1, "in_channels": 3, "widths": (8,)}, (3, 3, 5, 7), (3, 1)),
        ({"widths": [4, 4, 8, 8], "activation": "relu"}, (2, 1, 8, 8), (2, 10)),
    ],
)
def test_the_output_has_a_logit_per_class(
    arguments: dict[str, Any], shape: tuple[int, ...], logits: tuple[int, ...]
) -> None:
    assert SmallResNet(**arguments)(torch.rand(shape)).shape == logits


@pytest.mark.parametrize(("norm", "normalized"), NORMS)
@pytest.mark.parametrize(("in_channels", "out_channels", "pool"), [(2, 2, False), (2, 2, True), (2, 3, True)])
def test_a_block_equals_its_equation(
    in_channels: int, out_channels: int, pool: bool, norm: Normalization, normalized: Callable[..., Tensor]
) -> None:
    block = randomized(PreActivationBlock(in_channels, out_channels, pool, "silu", norm))
    assert isinstance(block, PreActivationBlock)
    x = torch.rand(2, in_channels, 4, 4, dtype=torch.float64)

    def halve(z: Tensor) -> Tensor:
        quarters = (z[..., a::2, b::2] for a in (0, 1) for b in (0, 1))
        return sum(quarters, torch.zeros(())) / 4 if pool else z

    def silu(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-z))

    h = silu(normalized(block.bn1, x))
    same = in_channels == out_channels
    shortcut = halve(x) if same else F.conv2d(halve(h), block.state_dict()["shortcut.weight"])
    h = silu(normalized(block.bn2, F.conv2d(halve(h), block.conv1.weight, padding=1)))
    torch.testing.assert_close(block(x), shortcut + F.conv2d(h, block.conv2.weight, padding=1), rtol=1e-12, atol=0)


def test_blocks_after_the_first_halve_the_resolution() -> None:
    network = SmallResNet(widths=(4, 8, 8))
    h = network.stem(torch.rand(1, 1, 16, 16))
    shapes = [h.shape[1:]]
    for block in network.blocks:
        h = block(h)
        shapes.append(h.shape[1:])
    assert shapes == [(4, 16, 16), (4, 16, 16), (8, 8, 8), (8, 4, 4)]


def test_the_stem_averages_over_squares() -> None:
    network, x = SmallResNet(widths=(3,), stem_pool=2), torch.rand(2, 1, 6, 6)
    h = network.stem(x)
    squares = torch.stack([h[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    torch.testing.assert_close(network.stem_pool(h), squares)
    seen: list[Tensor] = []
    network.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(x)
    torch.testing.assert_close(seen[0], squares)


@pytest.mark.parametrize(("norm", "normalized"), NORMS)
def test_the_head_averages_over_all_places(norm: Normalization, normalized: Callable[..., Tensor]) -> None:
    network = randomized(SmallResNet(widths=(4,), norm=norm))
    assert isinstance(network, SmallResNet)
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    h = normalized(network.norm, network.blocks(network.stem(x)))
    pooled = (h / (1 + torch.exp(-h))).sum((2, 3)) / 16
    expected = pooled @ network.fc.weight.T + network.fc.bias
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("activation", "layer"), [("relu", nn.ReLU), ("silu", nn.SiLU), ("gelu", nn.GELU)])
def test_all_nonlinearities_are_the_one_asked_for(activation: Activation, layer: type[nn.Module]) -> None:
    kinds = {type(m) for m in SmallResNet(activation=activation).modules()} & {nn.ReLU, nn.SiLU, nn.GELU}
    assert kinds == {layer}


def test_layer_norm_is_each_images_own() -> None:
    network = SmallResNet(widths=(4, 8), norm="layer")
    assert not batch_norm_layers(network)
    assert not list(network.buffers())
    x = torch.rand(3, 1, 8, 8)
    alone = torch.cat([network(image[None]) for image in x])
    torch.testing.assert_close(network.train()(x), alone, rtol=1e-4, atol=1e-6)
    # Scale and level of an image's features are gone after a layer.
    features = torch.rand(3, 4, 8, 8)
    first = PreActivationBlock(4, 4, False, "silu", "layer").bn1
    torch.testing.assert_close(first(5 * features + 2), first(features), rtol=0, atol=1e-3)


def test_a_network_with_layer_norm_is_described_and_read_back(tmp_path: Path) -> None:
    model = EnergyModel(SmallResNet(widths=(4, 8), norm="layer"), mean=[0.3], std=[0.35]).eval()
    assert (architecture_of(model.backbone) or {})["arguments"]["norm"] == "layer"
    model.save_pretrained(tmp_path)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(EnergyModel.from_pretrained(tmp_path).eval()(x), model(x))


def test_a_description_from_before_the_choice_is_of_batch_norm() -> None:
    old = {"name": "SmallResNet", "arguments": {"widths": [4, 8]}}
    expected = SmallResNet(widths=(4, 8)).state_dict()
    assert {name: v.shape for name, v in build_architecture(old).state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert "norm.running_mean" in expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"widths": (8, 0)}, r"widths=\[8, 0\]"),
        ({"widths": ()}, r"widths=\[\]"),
        ({"stem_pool": 0}, "stem_pool=0"),
        ({"activation": "tanh"}, "activation .* 'tanh'"),
        ({"norm": "group"}, "norm must be 'batch' or 'layer', got 'group'"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallResNet(**arguments)
