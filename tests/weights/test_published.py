"""Files of published robust networks, in full size by name and shape, load strictly into the recipes' networks.

Values are one number, repeated without memory, and the networks live on the meta device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dat_lightning import EnergyModel, WideResNet, convnext_convstem, resnet50, wide_resnet50_2, wide_resnet50_4
from dat_lightning.weights import load_weights, loading

Shapes = dict[str, tuple[int, ...]]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def norm(name: str, width: int) -> Shapes:
    values: Shapes = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return values | {f"{name}.num_batches_tracked": ()}


def wide_resnet(depth: int, widen: int, classes: int) -> Shapes:
    """The common CIFAR WideResNet: conv1, block{1,2,3}.layer.{i}.{bn1,conv1,bn2,conv2,convShortcut}, bn1, fc."""
    widths = [16, 16 * widen, 32 * widen, 64 * widen]
    shapes: Shapes = {"conv1.weight": (16, 3, 3, 3)}
    for group in (1, 2, 3):
        for i in range((depth - 4) // 6):
            block, before = f"block{group}.layer.{i}", widths[group - 1] if i == 0 else widths[group]
            shapes |= norm(f"{block}.bn1", before) | norm(f"{block}.bn2", widths[group])
            shapes[f"{block}.conv1.weight"] = (widths[group], before, 3, 3)
            shapes[f"{block}.conv2.weight"] = (widths[group], widths[group], 3, 3)
            if before != widths[group]:
                shapes[f"{block}.convShortcut.weight"] = (widths[group], before, 1, 1)
    return shapes | norm("bn1", widths[3]) | {"fc.weight": (classes, widths[3]), "fc.bias": (classes,)}


def convnext(depths: tuple[int, ...], widths: tuple[int, ...], stem: tuple[int, ...]) -> Shapes:
    """Names of timm, with the stem of arXiv 2303.01870 as ``stem.stem.{0,1,3,4,6,7}``."""
    shapes: Shapes = {}

    def both(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    for n, (inner, outer) in enumerate(zip((3, *stem), stem, strict=False)):
        both(f"stem.stem.{3 * n}", outer, inner, 3, 3)
        both(f"stem.stem.{3 * n + 1}", outer)
    for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if s > 0:
            both(f"stages.{s}.downsample.0", widths[s - 1])
            both(f"stages.{s}.downsample.1", width, widths[s - 1], 2, 2)
        for b in range(depth):
            block = f"stages.{s}.blocks.{b}"
            shapes[f"{block}.gamma"] = (width,)
            both(f"{block}.conv_dw", width, 1, 7, 7)
            both(f"{block}.norm", width)
            both(f"{block}.mlp.fc1", 4 * width, width)
            both(f"{block}.mlp.fc2", width, 4 * width)
    both("head.norm", widths[-1])
    both("head.fc", 1000, widths[-1])
    return shapes


def torchvision_resnet(width_per_group: int) -> Shapes:
    bottleneck = torchvision.models.resnet.Bottleneck
    with torch.device("meta"):
        network = torchvision.models.ResNet(bottleneck, [3, 4, 6, 3], width_per_group=width_per_group)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def filled(shapes: Shapes, prefix: str = "") -> dict[str, Tensor]:
    dtype = {True: torch.long, False: torch.float32}
    return {
        f"{prefix}{name}": torch.zeros((), dtype=dtype[name.endswith("num_batches_tracked")]).expand(shape)
        for name, shape in shapes.items()
    }


def madrylab(shapes: Shapes) -> dict[str, Any]:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    state = filled(shapes, "module.model.") | filled(shapes, "module.attacker.model.")
    for place in ("module.normalizer", "module.attacker.normalize"):
        state |= {f"{place}.new_mean": mean, f"{place}.new_std": std}
    return {"model": state, "optimizer": {}, "schedule": None, "epoch": 90, "amp": None}


def averaged(shapes: Shapes) -> dict[str, Any]:
    return {"state_dict": filled(shapes, "module.module.") | {"module.n_averaged": torch.tensor(7)}}


CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], Shapes, bool]] = {
    "WRN-34-10": (WideResNet, {}, wide_resnet(34, 10, 10), False),
    "WRN-28-10, 100 classes": (WideResNet, {"depth": 28, "num_classes": 100}, wide_resnet(28, 10, 100), False),
    "WRN-70-16": (
        WideResNet,
        {"depth": 70, "widen_factor": 16, "activation": "silu"},
        wide_resnet(70, 16, 10),
        False,
    ),
    "ResNet-50": (resnet50, {}, torchvision_resnet(64), True),
    "WRN-50-2": (wide_resnet50_2, {}, torchvision_resnet(128), True),
    "WRN-50-4": (wide_resnet50_4, {}, torchvision_resnet(256), True),
    "ConvNeXt-T + ConvStem": (
        convnext_convstem,
        {"size": "tiny"},
        convnext((3, 3, 9, 3), (96, 192, 384, 768), (48, 96)),
        False,
    ),
    "ConvNeXt-S + ConvStem": (
        convnext_convstem,
        {"size": "small"},
        convnext((3, 3, 27, 3), (96, 192, 384, 768), (48, 96)),
        False,
    ),
    "ConvNeXt-B + ConvStem": (
        convnext_convstem,
        {"size": "base"},
        convnext((3, 3, 27, 3), (128, 256, 512, 1024), (64, 96, 128)),
        False,
    ),
    "ConvNeXt-L + ConvStem": (
        convnext_convstem,
        {"size": "large"},
        convnext((3, 3, 27, 3), (192, 384, 768, 1536), (96, 144, 192)),
        False,
    ),
}


# The largest ones take seconds to be made.
LARGE = ("WRN-70-16", "WRN-50-4")


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in CASES]
)
def test_a_published_network_loads_with_every_name_and_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, arguments, shapes, normalised = CASES[name]
    with torch.device("meta"):
        network = build(**arguments)
    model = EnergyModel(network, *IMAGENET) if normalised else EnergyModel(network)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes

    def load(contents: Mapping[str, Any]) -> loading.LoadedWeights:
        monkeypatch.setattr(loading, "read_checkpoint", lambda path: contents)
        return load_weights(model, "published.pt")

    files = [madrylab(shapes)] if normalised else [filled(shapes, "module."), filled(shapes, "base_model.")]
    for contents in [*files, averaged(shapes), {"state_dict": filled(shapes)}]:
        report = load(contents)
        assert report.initialised == ()
    lacking = dict(list(shapes.items())[:-1])
    missing = list(shapes)[-1]
    with pytest.raises(ValueError, match=rf"missing backbone\.{missing}"):
        load(filled(lacking, "module."))
    with pytest.raises(ValueError, match=r"unexpected module\.surplus\.weight"):
        load(filled({**shapes, "surplus.weight": (3,)}, "module."))
