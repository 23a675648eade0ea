"""Batch norm folded away: the same function, which follows the network's weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dat_lightning import EnergyModel, SmallResNet, WideResNet, ascend, resnet50, unbounded_ascent
from dat_lightning.core import batch_norm_layers, no_trace, targeted_logit
from dat_lightning.speed import FoldedNetwork
from dat_lightning.speed.folding import _FoldedConvolution


class Odd(nn.Module):
    """A convolution with two readers, one used twice, a bias, groups, reflected borders, a norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice = nn.Conv2d(3, 6, 3, padding=1)
        self.used_twice = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 6, 3, stride=2, groups=3, bias=True)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(4)])
        self.plain_norm = nn.BatchNorm2d(6, affine=False, eps=0.1)
        self.last_norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.read_twice(x)
        b = self.norms[0](a) + a
        c = torch.tanh(self.norms[1](self.used_twice(b)))
        d = torch.tanh(self.norms[2](self.used_twice(c)))
        e = self.plain_norm(self.norms[3](self.grouped(d)))
        logits: Tensor = self.head(self.last_norm(e.mean((2, 3))))
        return logits


def randomize(network: nn.Module, seed: int) -> None:
    """Gives batch norm layers weights and statistics that no initialisation has."""
    generator = torch.Generator().manual_seed(seed)
    for layer in batch_norm_layers(network):
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(layer, name)
            if value is not None:
                value.data.copy_(torch.rand(value.shape, generator=generator) + 0.3)


def build(name: str) -> EnergyModel:
    torch.manual_seed(0)
    networks: dict[str, Callable[[], nn.Module]] = {
        "small": lambda: SmallResNet(widths=(4, 8), in_channels=3),
        "wide": lambda: WideResNet(10, 1, activation="silu"),
        "resnet50": lambda: resnet50(num_classes=5),
        "odd": Odd,
    }
    # Single channels of ResNet-50's 50 layers may grow large; float64 forgives that.
    network = EnergyModel(networks[name](), [0.4, 0.5, 0.6], [0.2, 0.3, 0.2])
    randomize(network, 1)
    return network.double()


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def convolution_weights(folded: FoldedNetwork) -> list[Tensor]:
    return [layer.weight for layer in folded._layers if isinstance(layer, _FoldedConvolution)]


def logits_and_gradient(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    logits = network(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient


@pytest.mark.parametrize(
    ("name", "kinds"), [("small", (2, 3)), ("wide", (3, 4)), ("resnet50", (53, 0)), ("odd", (1, 5))]
)
def test_logits_and_gradients_are_those_of_the_network(name: str, kinds: tuple[int, int]) -> None:
    network = build(name)
    folded = FoldedNetwork(network)
    names = [type(layer).__name__ for layer in folded._layers]
    assert (names.count("_FoldedConvolution"), names.count("_Affine")) == kinds
    assert not batch_norm_layers(folded)
    # The network is left in its mode, and folding always means running statistics.
    assert network.training
    expected = logits_and_gradient(copy.deepcopy(network).eval(), images())
    for found, value in zip(logits_and_gradient(folded, images()), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12 * float(value.abs().max()))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](input=self.convolution(input=x))
        logits: Tensor = self.norms[1](input=torch.tanh(h)).mean((2, 3))
        return logits


def test_layers_may_be_called_by_keyword() -> None:
    network = Keywords().double()
    randomize(network, 3)
    folded = FoldedNetwork(network)
    assert len(folded._layers) == 2
    torch.testing.assert_close(folded(images()), network.eval()(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "parametrisation", "hook of the norm"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_layers_with_hooks_and_parametrisations_stay_as_they_are(how: str) -> None:
    network = Keywords().double()
    randomize(network, 3)
    if how == "weight_norm":
        torch.nn.utils.weight_norm(network.convolution)
    elif how == "spectral_norm":
        torch.nn.utils.spectral_norm(network.convolution)
    elif how == "parametrisation":
        torch.nn.utils.parametrizations.spectral_norm(network.convolution)
    else:
        network.norms[0].register_forward_hook(lambda layer, args, result: 2 * result)
    folded = FoldedNetwork(network)
    state = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.3)
    folded.refresh()
    with no_trace(folded):
        found = folded(images())
    with no_trace(network):
        torch.testing.assert_close(found, network(images()), rtol=1e-10, atol=1e-10)
    # Power iterations belong to training.
    for name, value in network.named_buffers():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


class Noisy(Keywords):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn(3, 1, 1))


def test_what_a_trace_would_lose_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Noisy cannot be traced.*its forward makes tensors"):
        FoldedNetwork(Noisy())
    network = Keywords()
    network.register_forward_hook(lambda layer, args, result: 2 * result)
    with pytest.raises(ValueError, match=r"Keywords cannot be traced.*it has forward hooks"):
        FoldedNetwork(network)


def test_features_keep_the_type_of_autocast() -> None:
    network = build("wide").float().eval()
    folded = FoldedNetwork(network)
    seen: list[torch.dtype] = []
    for layer in folded._layers:
        layer.register_forward_hook(lambda layer, args, result: seen.append(result.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = folded(images().float())
    assert seen == [torch.bfloat16] * 7
    torch.testing.assert_close(logits.float(), network(images().float()), rtol=0.1, atol=0.1)


def test_it_follows_the_weights_when_refreshed() -> None:
    network = build("wide").eval()
    folded = FoldedNetwork(network)
    before = folded(images())
    addresses = [weight.data_ptr() for weight in convolution_weights(folded)]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
        for layer in batch_norm_layers(network):
            assert isinstance(layer.running_var, Tensor)
            layer.running_var.mul_(0.5)
    with torch.inference_mode():
        folded.refresh()
    torch.testing.assert_close(folded(images()), network(images()), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(folded(images()), before)
    # A graph that was compiled for these addresses stays valid.
    assert addresses == [weight.data_ptr() for weight in convolution_weights(folded)]


def test_it_follows_the_network_to_another_type_and_layout() -> None:
    network = build("small").eval()
    folded = FoldedNetwork(network)
    network.float().to(memory_format=torch.channels_last)
    folded.refresh()
    x = images().float()
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)
    weights = convolution_weights(folded)
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_an_ascent_reaches_the_same_images() -> None:
    network, chain, y = build("wide"), unbounded_ascent(0.3, 6), torch.tensor([0, 3, 7])
    expected = ascend(network, images(), y, targeted_logit, chain)
    folded = FoldedNetwork(network)
    with torch.no_grad():
        found = ascend(folded, images(), y, targeted_logit, chain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - images()).abs().max() > 0.1
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_copy_follows_the_copied_network() -> None:
    network = build("small").eval()
    twin, folded = copy.deepcopy((network, FoldedNetwork(network)))
    randomize(twin, 5)
    folded.refresh()
    torch.testing.assert_close(folded(images()), twin(images()), rtol=1e-10, atol=1e-10)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.norm(x).mean((2, 3))
        return logits if x.mean() > 0 else -logits


def test_what_cannot_be_folded_says_so() -> None:
    with pytest.raises(ValueError, match=r"Branching cannot be traced.*set fold_batch_norm to false.*control flow"):
        FoldedNetwork(Branching())
    with pytest.raises(ValueError, match="Linear has no batch norm to fold"):
        FoldedNetwork(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="SmallResNet has no batch norm to fold"):
        FoldedNetwork(SmallResNet(widths=(4,), norm="layer"))
    with pytest.raises(ValueError, match="no running statistics"):
        FoldedNetwork(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)))
