import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from dat_lightning import (
    EnergyModel,
    ThreatModel,
    architecture_of,
    ascend,
    build_architecture,
    resnet50,
    timm_model,
    wide_resnet50_2,
    wide_resnet50_4,
)
from dat_lightning.core import batch_norm_layers, cross_entropy, input_gradient, no_trace

Network = Callable[..., nn.Module]


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def reference(name: str) -> nn.Module:
    """The network of the same name that torchvision has."""
    bottleneck = torchvision.models.resnet.Bottleneck
    networks: dict[str, Callable[[], nn.Module]] = {
        "resnet50": torchvision.models.resnet50,
        "wide_resnet50_2": torchvision.models.wide_resnet50_2,
        "wide_resnet50_4": lambda: torchvision.models.ResNet(bottleneck, [3, 4, 6, 3], width_per_group=256),
    }
    return networks[name]()


def expected_parameters(widening: int, num_classes: int, in_channels: int) -> int:
    """Bottlenecks of 1×1, 3×3 and 1×1 convolutions, each with two numbers per batch norm channel."""
    total = in_channels * 64 * 49 + 2 * 64
    before = 64
    for blocks, base in ((3, 64), (4, 128), (6, 256), (3, 512)):
        inner, outer = base * widening, 4 * base
        for block in range(blocks):
            total += before * inner + 9 * inner**2 + inner * outer + 2 * (2 * inner + outer)
            total += before * outer + 2 * outer if block == 0 else 0
            before = outer
    return total + (before + 1) * num_classes


NETWORKS = [(resnet50, 1, "25.6"), (wide_resnet50_2, 2, "68.9"), (wide_resnet50_4, 4, "223.4")]


@pytest.mark.parametrize(("network", "widening", "millions"), NETWORKS)
def test_the_number_of_parameters_is_the_published_one(network: Network, widening: int, millions: str) -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in network(*sizes).parameters()) for sizes in ((), (7, 1))]
    assert counts == [expected_parameters(widening, 1000, 3), expected_parameters(widening, 7, 1)]
    assert f"{counts[0] / 1e6:.1f}" == millions


@pytest.mark.parametrize("name", ["resnet50", "wide_resnet50_2", "wide_resnet50_4"])
def test_names_and_shapes_are_torchvision_s(name: str) -> None:
    with torch.device("meta"):
        network = build_architecture({"name": name, "arguments": {}})
        assert shapes(network) == shapes(reference(name))
        assert network(torch.empty(2, 3, 224, 224)).shape == network(torch.empty(2, 3, 256, 192)).shape == (2, 1000)


def test_torchvision_s_weights_give_torchvision_s_logits() -> None:
    torch.manual_seed(0)
    theirs = reference("resnet50").eval()
    ours = resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [resnet50, wide_resnet50_2, wide_resnet50_4])
def test_classes_and_channels_are_free_and_described(network: Network) -> None:
    with torch.device("meta"):
        made = network(num_classes=7, in_channels=1, grad_checkpointing=True)
        assert made(torch.empty(2, 1, 64, 64)).shape == (2, 7)
        name = getattr(network, "__name__", "")
        assert architecture_of(made) == {"name": name, "arguments": {"num_classes": 7, "in_channels": 1}}
        assert shapes(build_architecture(architecture_of(made))) == shapes(made)


def test_any_network_of_timm_comes_by_its_name() -> None:
    with torch.device("meta"):
        network = timm_model("resnet10t", 7, 1)
        assert shapes(network) == shapes(timm.create_model("resnet10t", num_classes=7, in_chans=1))
        tagged = timm_model("resnet10t.c3_in1k", 7, 1)
    assert shapes(tagged) == shapes(network)
    arguments = {"name": "resnet10t", "num_classes": 7, "in_channels": 1}
    assert architecture_of(network) == {"name": "timm_model", "arguments": arguments}


def test_pretrained_weights_are_asked_for_once_and_not_by_a_description(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = timm.create_model

    def create_model(name: str, pretrained: bool, **kwargs: Any) -> Any:
        asked.append(pretrained)
        return original(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    with torch.device("meta"):
        build_architecture(architecture_of(timm_model("resnet10t", pretrained=True)))
        timm_model("resnet10t")
    assert asked == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet5"}, "name must be a network of timm, got 'resnet5'; close ones are .*resnet50"),
        ({"name": "no such thing"}, "got 'no such thing'; timm.list_models.. lists them"),
        ({"name": "hf-hub:someone/something"}, "got 'hf-hub:someone/something'"),
        ({"name": "local-dir:/tmp"}, "got 'local-dir:/tmp'"),
        ({"name": "resnet50.no_such_tag"}, "got 'resnet50.no_such_tag'; close ones are resnet50"),
        ({"name": "resnet10t", "num_classes": 0}, "num_classes=0"),
        ({"name": "resnet10t", "in_channels": 0}, "in_channels=0"),
        ({"name": "vgg11", "grad_checkpointing": True}, "grad_checkpointing must be false for 'vgg11'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        timm_model(**arguments)


class CountForwards:
    """Counts how often the first block of a timm ResNet starts."""

    def __init__(self, network: Any) -> None:
        self.count = 0
        network.layer1[0].register_forward_pre_hook(self.note)  # computing again stops early, before a forward hook

    def note(self, *args: object) -> None:
        self.count += 1


def pair() -> tuple[nn.Module, nn.Module]:
    """The same small network with and without checkpointing."""
    torch.manual_seed(0)
    plain = timm_model("resnet10t", 4, 3)
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1)  # timm starts residual branches at zero
    checkpointed = timm_model("resnet10t", 4, 3, grad_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    return plain, checkpointed


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_checkpointing_leaves_input_gradients_with_frozen_parameters_as_they_are(mode: Any) -> None:
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([3, 1])
    gradients, counts = [], []
    for network in pair():
        counter = CountForwards(network)
        with no_trace(network.train(), mode):
            gradients.append(input_gradient(network, x, y, cross_entropy))
        counts.append(counter.count)
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    # Eval mode, in which attacks and samples run, is not slowed down.
    assert counts == ([1, 1] if mode == "eval" else [1, 2])


def test_checkpointing_trains_as_before_and_computes_activations_twice() -> None:
    x = torch.rand(2, 3, 32, 32)
    gradients, counts = [], []
    for network in pair():
        model = EnergyModel(network)
        model.freeze_batch_norm()
        model.train()
        counter = CountForwards(network)
        adversarial = ascend(model, x, torch.tensor([0, 1]), cross_entropy, ThreatModel(eps=1.0, num_steps=2))
        assert counter.count == 2
        model(adversarial).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
        counts.append(counter.count)
    assert counts == [3, 4]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_checkpointing_survives_a_copy() -> None:
    network = copy.deepcopy(pair()[1]).train()
    counter = CountForwards(network)
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    assert counter.count == 2


def test_all_batch_norm_layers_freeze() -> None:
    with torch.device("meta"):
        model = EnergyModel(resnet50())
    model.freeze_batch_norm()
    layers = batch_norm_layers(model.train())
    # One after the stem, three a block, one per stage's first shortcut.
    assert len(layers) == 1 + 3 * (3 + 4 + 6 + 3) + 4
    assert not any(layer.training for layer in layers)


def test_a_network_has_no_dropout_and_no_drop_path() -> None:
    x = torch.rand(2, 3, 32, 32)
    networks: list[nn.Module] = [timm_model("resnet10t", 4), timm_model("convnext_atto", 4)]
    for network in networks:
        model = EnergyModel(network)
        model.freeze_batch_norm()
        outputs: list[Tensor] = [model.train()(x) for _ in range(2)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], model.eval()(x))
