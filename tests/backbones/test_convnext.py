import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_lightning import EnergyModel, architecture_of, build_architecture, convnext_convstem
from dat_lightning.backbones import ConvStem
from dat_lightning.backbones.convnext import ConvNeXtSize
from dat_lightning.core import batch_norm_layers, cross_entropy, input_gradient, no_trace

# Blocks of each stage and their widths (arXiv 2201.03545), channels of the stem (arXiv 2303.01870).
DEPTHS = {"tiny": (3, 3, 9, 3), "small": (3, 3, 27, 3), "base": (3, 3, 27, 3), "large": (3, 3, 27, 3)}
WIDTHS = {"tiny": 96, "small": 96, "base": 128, "large": 192}
STEMS = {"tiny": (48, 96), "small": (48, 96), "base": (64, 96, 128), "large": (96, 144, 192)}


def expected_parameters(size: str, num_classes: int, in_channels: int) -> int:
    """Weights and biases of convolutions and linear layers, two numbers per normalised channel, layer scales."""
    total = sum((9 * before + 1) * after + 2 * after for before, after in pairwise((in_channels, *STEMS[size])))
    widths = [WIDTHS[size] * factor for factor in (1, 2, 4, 8)]
    for width, depth in zip(widths, DEPTHS[size], strict=True):
        depthwise, norm, scale = 50 * width, 2 * width, width
        total += depth * (depthwise + norm + (width + 1) * 4 * width + (4 * width + 1) * width + scale)
    total += sum(2 * before + (4 * before + 1) * after for before, after in pairwise(widths))
    return total + 2 * widths[-1] + (widths[-1] + 1) * num_classes


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", "28.6"), ("small", "50.3"), ("base", "88.8"), ("large", "198.1")]
)
def test_the_number_of_parameters_is_the_published_one(size: ConvNeXtSize, millions: str) -> None:
    with torch.device("meta"):
        published = convnext_convstem(size)
        other = convnext_convstem(size, num_classes=7, in_channels=1)
        for image in ((224, 224), (256, 256)):
            assert published(torch.empty(2, 3, *image)).shape == (2, 1000)
        assert other(torch.empty(2, 1, 64, 96)).shape == (2, 7)
    counts = [sum(p.numel() for p in network.parameters()) for network in (published, other)]
    assert counts == [expected_parameters(size, 1000, 3), expected_parameters(size, 7, 1)]
    assert f"{counts[0] / 1e6:.1f}" == millions


def test_parameters_have_the_public_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in convnext_convstem("large").state_dict().items()}
    published = {
        "stem.stem.0.weight": (96, 3, 3, 3),
        "stem.stem.0.bias": (96,),
        "stem.stem.1.weight": (96,),
        "stem.stem.3.weight": (144, 96, 3, 3),
        "stem.stem.4.bias": (144,),
        "stem.stem.6.weight": (192, 144, 3, 3),
        "stem.stem.7.weight": (192,),
        "stages.0.blocks.0.gamma": (192,),
        "stages.0.blocks.0.conv_dw.weight": (192, 1, 7, 7),
        "stages.1.downsample.0.weight": (192,),
        "stages.1.downsample.1.weight": (384, 192, 2, 2),
        "stages.2.blocks.26.mlp.fc1.weight": (3072, 768),
        "stages.3.blocks.2.mlp.fc2.bias": (1536,),
        "head.norm.weight": (1536,),
        "head.fc.weight": (1000, 1536),
    }
    assert {name: shapes.get(name) for name in published} == published
    stem = {f"stem.stem.{place}.{part}" for place in (0, 1, 3, 4, 6, 7) for part in ("weight", "bias")}
    assert {name for name in shapes if name.startswith("stem")} == stem


@pytest.mark.parametrize("widths", [(4, 6), (4, 5, 6)])
def test_the_stem_equals_its_equation(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    stem = ConvStem(2, widths).double()
    for parameter in stem.parameters():
        nn.init.uniform_(parameter, -1, 1)
    state = stem.state_dict()
    x = h = torch.rand(2, 2, 13, 8, dtype=torch.float64)
    for place in range(len(widths)):
        convolution, norm = f"stem.{3 * place}", f"stem.{3 * place + 1}"
        stride = 2 if place < 2 else 1
        h = F.conv2d(h, state[f"{convolution}.weight"], state[f"{convolution}.bias"], stride, 1)
        h = channels_first_norm(h, state[f"{norm}.weight"], state[f"{norm}.bias"])
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
    assert h.shape == (2, widths[-1], 4, 2)
    torch.testing.assert_close(stem(x), h, rtol=1e-11, atol=1e-12)


def channels_first_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each place of each image, over its channels."""
    normalized = torch.empty_like(x)
    for n in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                values = x[n, :, i, j]
                centred = values - values.sum() / len(values)
                normalized[n, :, i, j] = centred / (centred.square().sum() / len(values) + 1e-6).sqrt()
    return normalized * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def small_network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    network = convnext_convstem("tiny", num_classes=3, **kwargs)
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1)  # timm starts residual branches at nearly zero
    return network


def test_checkpointing_leaves_input_gradients_and_training_as_they_are() -> None:
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([2, 0])
    inputs, gradients, starts = [], [], []
    for network in (small_network(), small_network(grad_checkpointing=True)):
        block: Any = network.get_submodule("stages.2.blocks.4")
        calls: list[bool] = []
        block.register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module.training))
        with no_trace(network.train()):
            inputs.append(input_gradient(network, x, y, cross_entropy))
        network(x).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
        starts.append(calls)
    assert starts == [[False, True], [False, True, True]]
    assert inputs[0].abs().amax((1, 2, 3)).min() > 0
    torch.testing.assert_close(inputs[1], inputs[0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_there_is_no_batch_norm_to_freeze_and_no_drop_path() -> None:
    model = EnergyModel(small_network())
    assert batch_norm_layers(model) == []
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_the_description_builds_the_same_network() -> None:
    with torch.device("meta"):
        network = convnext_convstem("base", 7, 1, grad_checkpointing=True)
        description = architecture_of(network)
        again = build_architecture(description)
    assert description == {
        "name": "convnext_convstem",
        "arguments": {"size": "base", "num_classes": 7, "in_channels": 1},
    }
    assert str(again) == str(network)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "size must be one of tiny, small, base, large, got 'huge'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"in_channels": 0}, "in_channels=0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        convnext_convstem(**arguments)
