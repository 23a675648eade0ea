from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_lightning import WideResNet


def expected_parameters(depth: int, width: int, num_classes: int, in_channels: int = 3) -> int:
    """Convolutions without bias, two numbers per batch norm channel, one linear layer."""
    blocks = (depth - 4) // 6
    widths = [16, 16 * width, 32 * width, 64 * width]
    total = 9 * in_channels * 16
    for before, after in pairwise(widths):
        first = 2 * before + 9 * before * after + 2 * after + 9 * after**2
        first += before * after if before != after else 0
        total += first + (blocks - 1) * (4 * after + 18 * after**2)
    return total + 2 * widths[-1] + (widths[-1] + 1) * num_classes


def meta(depth: int, widen_factor: int, num_classes: int = 10) -> WideResNet:
    """The network without memory for its weights, which would be 185 MB."""
    with torch.device("meta"):
        return WideResNet(depth, widen_factor, num_classes)


@pytest.mark.parametrize(
    ("depth", "widen_factor", "num_classes", "millions"),
    [
        (34, 10, 10, "46.16"),
        (28, 10, 10, "36.48"),
        (28, 10, 100, "36.54"),
        (70, 16, 10, "266.80"),
        (16, 2, 10, "0.69"),
        (10, 1, 10, "0.08"),
    ],
)
def test_the_number_of_parameters_is_the_published_one(
    depth: int, widen_factor: int, num_classes: int, millions: str
) -> None:
    count = sum(p.numel() for p in meta(depth, widen_factor, num_classes).parameters())
    assert count == expected_parameters(depth, widen_factor, num_classes)
    assert f"{count / 1e6:.2f}" == millions


@pytest.mark.parametrize(("depth", "widen_factor"), [(34, 10), (28, 10)])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_the_output_has_a_logit_per_class(depth: int, widen_factor: int, num_classes: int) -> None:
    network = meta(depth, widen_factor, num_classes)
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, num_classes)


def test_resolutions_and_widths_of_the_groups() -> None:
    network = WideResNet(10, 2, num_classes=7, in_channels=1)
    h = network.conv1(torch.rand(1, 1, 28, 28))
    shapes = [h.shape[1:]]
    for group in (network.block1, network.block2, network.block3):
        h = group(h)
        shapes.append(h.shape[1:])
    assert shapes == [(16, 28, 28), (32, 28, 28), (64, 14, 14), (128, 7, 7)]
    assert network(torch.rand(3, 1, 28, 28)).shape == (3, 7)


def test_parameters_have_the_public_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in meta(34, 10).named_parameters()}
    published = {
        "conv1.weight": (16, 3, 3, 3),
        "block1.layer.0.bn1.weight": (16,),
        "block1.layer.0.conv1.weight": (160, 16, 3, 3),
        "block1.layer.0.convShortcut.weight": (160, 16, 1, 1),
        "block1.layer.4.bn2.bias": (160,),
        "block2.layer.0.conv1.weight": (320, 160, 3, 3),
        "block2.layer.0.convShortcut.weight": (320, 160, 1, 1),
        "block3.layer.0.conv2.weight": (640, 640, 3, 3),
        "block3.layer.4.conv2.weight": (640, 640, 3, 3),
        "bn1.weight": (640,),
        "fc.weight": (10, 640),
        "fc.bias": (10,),
    }
    assert {name: shapes.get(name) for name in published} == published
    # One shortcut for each change of width and no more; five blocks a group.
    assert len([name for name in shapes if "convShortcut" in name]) == 3
    assert {name.split(".")[2] for name in shapes if ".layer." in name} == set("01234")


def test_the_network_equals_its_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    network = WideResNet(10, 1, num_classes=3).double().eval()
    state = network.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.endswith("conv1.weight"):
            tensor.uniform_(0.1, 1, generator=generator)

    def normalize(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)

    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    h = F.conv2d(x, state["conv1.weight"], padding=1)
    for group, stride in (("block1", 1), ("block2", 2), ("block3", 2)):
        block = f"{group}.layer.0"
        active = normalize(h, f"{block}.bn1")
        # The shortcut convolution, where there is one, reads the activated input.
        key = f"{block}.convShortcut.weight"
        shortcut = F.conv2d(active, state[key], stride=stride) if key in state else h
        inner = normalize(F.conv2d(active, state[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn2")
        h = shortcut + F.conv2d(inner, state[f"{block}.conv2.weight"], padding=1)
    expected = normalize(h, "bn1").mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(network(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("depth", "widen_factor"), [(10, 1), (70, 16)])
def test_the_activation_is_everywhere_the_one_asked_for(depth: int, widen_factor: int) -> None:
    with torch.device("meta"):
        relu, silu = (WideResNet(depth, widen_factor, activation=name) for name in ("relu", "silu"))
    assert {type(m) for m in silu.modules()} & {nn.ReLU, nn.SiLU} == {nn.SiLU}
    assert {type(m) for m in relu.modules()} & {nn.ReLU, nn.SiLU} == {nn.ReLU}
    assert silu.state_dict().keys() == relu.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 4}, "depth .* 4"),
        ({"depth": 30}, "depth must be 6n . 4 .* 30"),
        ({"depth": 10, "activation": "gelu"}, "activation .* 'gelu'"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WideResNet(**arguments)
