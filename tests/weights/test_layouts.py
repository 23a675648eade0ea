"""Files as other projects write them, built with the names that are published."""

import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dat_lightning import EnergyModel, WideResNet
from dat_lightning.weights import load_weights
from dat_lightning.weights.layouts import find_weights

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
State = dict[str, Any]


def wide(seed: int, classes: int = 10) -> EnergyModel:
    torch.manual_seed(seed)
    model = EnergyModel(WideResNet(10, 1, num_classes=classes), MEAN, STD)
    for value in model.backbone.state_dict().values():
        value.copy_(torch.randint(1, 9, value.shape) if value.dtype == torch.int64 else torch.rand(value.shape))
    return model


def assert_same(model: nn.Module, source: nn.Module) -> None:
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def normaliser(prefix: str = "", mean: str = "mean", std: str = "std") -> State:
    return {f"{prefix}{mean}": torch.tensor(MEAN).view(1, 3, 1, 1), f"{prefix}{std}": torch.tensor(STD).view(3, 1, 1)}


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def averaged(state: State) -> State:
    """What AveragedModel saves."""
    network = WideResNet(10, 1)
    network.load_state_dict(state)
    return dict(AveragedModel(nn.Sequential(OrderedDict(module=network))).state_dict())


LAYOUTS: dict[str, tuple[Callable[[State], State], str]] = {
    "plain": (lambda s: s, "plain state dict"),
    "module.": (lambda s: prefixed(s, "module."), "prefix 'module.'"),
    "nested prefixes": (lambda s: prefixed(s, "module.base_model.model."), "prefix 'module.base_model.model.'"),
    "compiled": (lambda s: prefixed(s, "_orig_mod."), "plain state dict"),
    "compiled within": (lambda s: prefixed(s, "module._orig_mod."), "prefix 'module.'"),
    "energy model": (
        lambda s: prefixed(
            prefixed(s, "backbone.") | EnergyModel(nn.Identity(), MEAN, STD).state_dict(), "energy_model."
        ),
        "prefix 'energy_model.'",
    ),
    "AveragedModel": (averaged, "averaged, prefix 'module.module.'"),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 1}, "entry 'state_dict'"),
    "model_state_dict": (lambda s: {"model_state_dict": s}, "entry 'model_state_dict'"),
    "net": (lambda s: {"net": prefixed(s, "module."), "acc": 93.1}, "entry 'net', prefix 'module.'"),
    "ema": (lambda s: {"ema": s, "model": other(s)}, "averaged, entry 'ema'"),
    "model_ema": (lambda s: {"state_dict": other(s), "model_ema": {"state_dict": s}}, "entry 'model_ema.state_dict'"),
    "state_dict_ema": (lambda s: {"state_dict": other(s), "state_dict_ema": s}, "averaged, entry 'state_dict_ema'"),
    "ema_state_dict": (lambda s: {"ema_state_dict": s, "model_state_dict": other(s)}, "averaged"),
    "no average yet": (lambda s: {"model_ema": None, "ema": {}, "model": s}, "entry 'model'"),
    "normalize, model": (lambda s: prefixed(s, "model.") | normaliser("normalize."), "prefix 'model.'"),
    "DDP, normalize, model": (
        lambda s: {"model": prefixed(s, "module.model.") | normaliser("module.normalize.")},
        "prefix 'module.model.'",
    ),
    "Sequential": (lambda s: prefixed(s, "1.") | normaliser("0."), "prefix '1.'"),
    "within the network": (lambda s: prefixed(s | normaliser("", "mu", "sigma"), "module."), "prefix 'module.'"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_backbone_loads_from_wherever_it_is(name: str, tmp_path: Path) -> None:
    build, said = LAYOUTS[name]
    source, model = wide(1), wide(0)
    torch.save(build(source.backbone.state_dict()), tmp_path / "weights.pt")
    report = load_weights(model, tmp_path / "weights.pt")
    assert_same(model, source)
    assert said in report.layout
    assert report.layout.startswith("averaged") == (said.startswith("averaged") or name == "model_ema")
    assert set(report.ignored) == ({"n_averaged"} if name == "AveragedModel" else set())
    assert report.initialised == ()


def test_a_backbone_under_its_name_is_an_energy_model_without_normalisation(tmp_path: Path) -> None:
    source = wide(1)
    torch.save({"model": prefixed(source.backbone.state_dict(), "module.backbone.")}, tmp_path / "weights.pt")
    model = EnergyModel(wide(0).backbone)
    load_weights(model, tmp_path / "weights.pt")
    assert_same(model.backbone, source.backbone)
    with pytest.raises(ValueError, match=r"missing mean, missing std$"):
        load_weights(wide(0), tmp_path / "weights.pt")


def narrow_resnet(seed: int = 0, classes: int = 5) -> EnergyModel:
    torch.manual_seed(seed)
    block = torchvision.models.resnet.Bottleneck
    network = torchvision.models.ResNet(block, [1, 1, 1, 1], width_per_group=4, num_classes=classes)
    return EnergyModel(network, MEAN, STD)


def robustness(state: State, mean: list[float] = MEAN) -> State:
    """What MadryLab's robustness saves from a DataParallel AttackerModel."""
    normalise = {"mean": torch.tensor(mean)[:, None, None], "std": torch.tensor(STD)[:, None, None]}
    network: State = {}
    for place, norm in (("module.", "normalizer"), ("module.attacker.", "normalize")):
        network |= {f"{place}{norm}.new_{name}": value for name, value in normalise.items()}
        network |= prefixed(state, f"{place}model.")
    return {
        "model": OrderedDict(network),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "schedule": {"base_lrs": [0.1], "lr_lambdas": [None]},
        "epoch": 90,
        "amp": None,
    }


@pytest.fixture
def cox(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class of a module that is there when a file is written."""
    parameters = type("Parameters", (), {"__module__": "cox.utils"})
    utils = types.ModuleType("cox.utils")
    utils.Parameters = parameters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cox", types.ModuleType("cox"))
    monkeypatch.setitem(sys.modules, "cox.utils", utils)
    return parameters


@pytest.mark.parametrize("zipped", [True, False])
def test_a_robustness_file_loads_without_its_libraries(
    zipped: bool, cox: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = narrow_resnet(1), narrow_resnet(0)
    source.backbone.state_dict()["bn1.running_mean"].fill_(0.7)
    args = cox()
    args.adv_train, args.eps, args.out = 1, 3.0, Path("out")
    contents = robustness(source.backbone.state_dict()) | {"args": args}
    torch.save(contents, tmp_path / "imagenet_l2_3_0.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "cox.utils")
    monkeypatch.delitem(sys.modules, "cox")
    report = load_weights(model, tmp_path / "imagenet_l2_3_0.pt")
    assert_same(model, source)
    assert report.layout == "entry 'model', prefix 'module.model.'"
    assert all(name.startswith("module.attacker.") for name in report.ignored)
    assert len(report.ignored) == len(source.backbone.state_dict()) + 2
    assert "cox.utils" not in sys.modules


def test_the_network_within_the_attacker_is_taken_where_it_is_alone(tmp_path: Path) -> None:
    source, model = narrow_resnet(1), narrow_resnet(0)
    state = robustness(source.backbone.state_dict())["model"]
    alone = {name: value for name, value in state.items() if name.startswith("module.attacker.")}
    torch.save({"model": alone}, tmp_path / "attacker.pt")
    assert load_weights(model, tmp_path / "attacker.pt").layout == "entry 'model', prefix 'module.attacker.model.'"
    assert_same(model, source)


RESNET50 = {
    "conv1.weight": (64, 3, 7, 7),
    "bn1.num_batches_tracked": (),
    "layer1.0.downsample.0.weight": (256, 64, 1, 1),
    "layer3.5.conv2.weight": (256, 256, 3, 3),
    "layer4.2.bn3.running_var": (2048,),
    "fc.weight": (1000, 2048),
    "fc.bias": (1000,),
}


def test_the_full_size_names_of_robustness_are_those_of_torchvision() -> None:
    with torch.device("meta"):
        own = torchvision.models.resnet50().state_dict()
    state = {name: torch.zeros(()).expand(value.shape) for name, value in own.items()}
    found = find_weights(robustness(state), [f"backbone.{name}" for name in own])
    assert len(found.weights) == 320
    assert {name: tuple(found.weights[f"backbone.{name}"].shape) for name in RESNET50} == RESNET50
    assert found.weights.keys() == {f"backbone.{name}" for name in own}
    assert found.sources["backbone.fc.bias"] == "module.model.fc.bias"


def test_the_names_of_convnext_with_a_conv_stem_are_kept() -> None:
    with torch.device("meta"):
        own = timm.create_model("convnext_tiny").state_dict()
    state = {name: value for name, value in own.items() if not name.startswith("stem.")}
    state |= {f"stem.stem.{k}.{kind}": torch.zeros(1) for k in (0, 1, 3, 4) for kind in ("weight", "bias")}
    names = {f"backbone.{name}" for name in state}
    assert {"backbone.stages.0.blocks.0.conv_dw.weight", "backbone.head.fc.weight", "backbone.head.norm.bias"} <= names
    for file in (
        prefixed(state, "module."),
        {"model": prefixed(state, "module.model.") | normaliser("module.normalize.")},
        prefixed(state, "base_model."),
    ):
        found = find_weights(file, names)
        assert found.weights.keys() == names
        assert found.ignored == ()


def test_the_unused_copy_of_the_first_block_is_ignored_and_said(
    tmp_path: Path,
) -> None:
    source, model = wide(1), wide(0)
    state = source.backbone.state_dict()
    copies = {f"sub_{name}": value + 1 for name, value in state.items() if name.startswith("block1.")}
    torch.save({"state_dict": prefixed(state | copies, "module.")}, tmp_path / "wrn.pt")
    report = load_weights(model, tmp_path / "wrn.pt")
    assert_same(model, source)
    assert set(report.ignored) == {f"module.{name}" for name in copies}
    line = str(report)
    assert line.startswith("entry 'state_dict', prefix 'module.'; ")
    assert "ignored module.sub_block1.layer.0." in line
    assert "the file says nothing about input normalisation, the network's is mean [0.485, 0.456, 0.406], std" in line


def test_the_copy_is_loaded_where_the_network_has_it(tmp_path: Path) -> None:
    class Copied(WideResNet):
        def __init__(self) -> None:
            super().__init__(10, 1)
            self.sub_block1 = nn.Linear(2, 2)

    source, model = EnergyModel(Copied()), EnergyModel(Copied())
    torch.save(source.backbone.state_dict(), tmp_path / "wrn.pt")
    load_weights(model, tmp_path / "wrn.pt")
    assert_same(model, source)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_deepminds_network_is_recognised(prefix: str, tmp_path: Path) -> None:
    state = {
        "init_conv.weight": torch.zeros(16, 3, 3, 3),
        "layer.0.block.0.batchnorm_0.weight": torch.zeros(16),
        "layer.0.block.0.conv_0.weight": torch.zeros(16, 16, 3, 3),
        "logits.weight": torch.zeros(10, 64),
    }
    torch.save({"model_state_dict": prefixed(state, prefix)}, tmp_path / "deepmind.pt")
    with pytest.raises(ValueError, match=r"deepmind\.pt: these are weights of DeepMind's CIFAR WideResNet .* pads"):
        load_weights(wide(0), tmp_path / "deepmind.pt")


def test_a_folder_and_a_file_of_safetensors_load(tmp_path: Path) -> None:
    source = wide(1)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    state = {name: value.clone() for name, value in source.state_dict().items()}
    save_file(state, tmp_path / "hub" / "model.safetensors")
    save_file(prefixed(state, "module."), tmp_path / "other.safetensors")
    for path in (tmp_path / "hub", str(tmp_path / "hub" / "model.safetensors"), tmp_path / "other.safetensors"):
        model = wide(0)
        load_weights(model, path)
        assert_same(model, source)


def test_another_normaliser_is_refused_and_both_are_printed(tmp_path: Path) -> None:
    state = narrow_resnet(1).backbone.state_dict()
    torch.save(robustness(state, mean=[0.485, 0.456, 0.408]), tmp_path / "far.pt")
    both = (
        r"normalisation is mean \[0\.485, 0\.456, 0\.408\], std .*, the network's mean \[0\.485, 0\.456, 0\.406\], std"
    )
    with pytest.raises(ValueError, match=both):
        load_weights(narrow_resnet(0), tmp_path / "far.pt")
    raw = EnergyModel(narrow_resnet(0).backbone)
    with pytest.raises(ValueError, match=r"normalisation is mean \[0\.485, .*, the network's none"):
        load_weights(raw, tmp_path / "far.pt")
    torch.save(robustness(state, mean=[0.4855, 0.4565, 0.4055]), tmp_path / "near.pt")
    model = narrow_resnet(0)
    load_weights(model, tmp_path / "near.pt")
    assert model.mean is not None
    assert model.mean.flatten().tolist() == pytest.approx(MEAN, abs=1e-7)


def test_a_normaliser_that_changes_nothing_is_none(tmp_path: Path) -> None:
    source, model = narrow_resnet(1), EnergyModel(narrow_resnet(0).backbone)
    identity = {"normalize.mean": torch.zeros(3), "normalize.std": torch.ones(1)}
    torch.save(prefixed(source.backbone.state_dict(), "model.") | identity, tmp_path / "raw.pt")
    load_weights(model, tmp_path / "raw.pt")
    assert_same(model.backbone, source.backbone)


def test_a_normaliser_of_other_channels_or_nan_is_refused(tmp_path: Path) -> None:
    state = prefixed(narrow_resnet(1).backbone.state_dict(), "model.")
    for mean in (torch.tensor([0.485, 0.456]), torch.tensor([float("nan")] * 3), torch.zeros(0)):
        torch.save(state | {"normalize.mean": mean, "normalize.std": torch.tensor(STD)}, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match="input normalisation is mean"):
            load_weights(narrow_resnet(0), tmp_path / "odd.pt")


@pytest.mark.parametrize("extra", [{"mu": torch.zeros(3)}, normaliser("norm.") | normaliser("", "mu", "sigma")])
def test_half_a_normaliser_and_two_are_refused(extra: State, tmp_path: Path) -> None:
    torch.save(wide(1).backbone.state_dict() | extra, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="expected a mean and a deviation of one input normalisation"):
        load_weights(wide(0), tmp_path / "odd.pt")


def test_a_prefix_beside_unknown_weights_is_kept(tmp_path: Path) -> None:
    state = prefixed(wide(1).backbone.state_dict(), "model.") | {"discriminator.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="does not fit the network: missing"):
        load_weights(wide(0), tmp_path / "two.pt")


class Normalising(nn.Sequential):
    """A backbone that normalises by itself, with a name that is a common prefix."""

    def __init__(self) -> None:
        super().__init__(OrderedDict(flatten=nn.Flatten(), model=nn.Linear(12, 2)))
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("std", torch.rand(3))


@pytest.mark.parametrize("build", [lambda m: m.state_dict(), lambda m: prefixed(m.backbone.state_dict(), "module.")])
def test_names_of_the_network_itself_are_no_wrapping(build: Callable[[EnergyModel], State], tmp_path: Path) -> None:
    source, model = EnergyModel(Normalising()), EnergyModel(Normalising())
    torch.save(build(source), tmp_path / "weights.pt")
    load_weights(model, tmp_path / "weights.pt")
    assert_same(model, source)


def test_weights_of_another_network_are_listed(tmp_path: Path) -> None:
    torch.save(robustness(narrow_resnet(1).backbone.state_dict()), tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"missing backbone\.block1\.layer\.0\.bn1\.weight, .* and \d+ more$"):
        load_weights(wide(0), tmp_path / "resnet.pt")


def rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.flatten().tolist()]


def test_a_network_that_loads_gives_the_logits_of_the_one_that_was_saved(tmp_path: Path) -> None:
    source, model = narrow_resnet(1).eval(), narrow_resnet(0).eval()
    torch.save(robustness(source.backbone.state_dict()), tmp_path / "resnet.pt")
    load_weights(model, tmp_path / "resnet.pt")
    x = torch.rand(2, 3, 32, 32)
    by_hand = source.backbone((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    assert rounded(model(x)) == rounded(by_hand)
