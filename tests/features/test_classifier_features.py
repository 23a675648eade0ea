import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from dat_lightning import EnergyModel, FrechetDistance
from dat_lightning.features import ClassifierFeatures, ClassifierJudge
from dat_lightning.features.gaussian_stats import FeatureMoments, frechet_distance
from dat_lightning.features.layers import LayerReader, extract_features
from dat_lightning.results.digests import network_digest
from dat_lightning.sampling.reference import reference_key
from tests import tiny


class ColourNet(nn.Module):
    """Average colour of each quarter of an image (N, 3, H, W), then two linear layers, batch norm and dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.inner, self.norm, self.outer = nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)
        self.dropout = nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.pool(x).flatten(1))
        logits: Tensor = self.outer(self.dropout(torch.tanh(self.norm(h))))
        return logits


def colours(seed: int = 0) -> EnergyModel:
    return EnergyModel(ColourNet(seed), mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])


def pixels(count: int = 5, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def by_hand(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The features of :func:`colours`, written out in float64."""
    weights = {name.removeprefix("backbone."): value.double() for name, value in state.items()}
    x = (images.double() / 255 - weights["mean"]) / weights["std"]
    half = x.shape[-1] // 2
    quarters = [x[..., i : i + half, j : j + half].mean((2, 3)) for i in (0, half) for j in (0, half)]
    h = torch.stack(quarters, dim=2).flatten(1) @ weights["inner.weight"].T + weights["inner.bias"]
    h = (h - weights["norm.running_mean"]) / (weights["norm.running_var"] + 1e-5).sqrt()
    return torch.tanh(h * weights["norm.weight"] + weights["norm.bias"])


def test_features_are_what_the_last_linear_layer_sees_in_eval_mode() -> None:
    model, images = colours().train(), pixels()
    features = ClassifierFeatures(model)(images)
    assert features.shape == (5, 7)
    assert not features.requires_grad
    torch.testing.assert_close(features.double(), by_hand(model.state_dict(), images), rtol=1e-5, atol=1e-6)


def test_images_of_another_size_are_resized_first() -> None:
    model, images = colours(), pixels(size=4)
    enlarged = images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    sizes: list[torch.Size] = []
    extractor = ClassifierFeatures(model, image_size=4)
    pool = cast(ColourNet, extractor.energy_model.backbone).pool
    pool.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-2:]))
    small, large = extractor(images), extractor(enlarged)
    assert sizes == [(4, 4), (4, 4)]
    # The triangle of antialiasing reaches into the neighbours, so that the two are near but not equal.
    assert 0 < (small - large).abs().max() < 0.2
    assert torch.equal(small, ClassifierFeatures(model)(images))


def test_grey_networks_read_the_first_channel() -> None:
    model, images = tiny.energy_model(), pixels(size=16)
    model.backbone.get_submodule("norm").get_buffer("running_var").fill_(0.01)
    features = ClassifierFeatures(model, grey=True)(images)
    others = images.clone()
    others[:, 1:] = 0
    assert torch.equal(ClassifierFeatures(model, grey=True)(others), features)
    last = cast(nn.Linear, model.backbone.get_submodule("fc"))
    logits = model.eval()(images[:, :1].float() / 255)
    torch.testing.assert_close(features @ last.weight.T + last.bias, logits)


def test_the_given_network_is_left_alone() -> None:
    model = colours().train()
    extractor = ClassifierFeatures(model)
    before = extractor(pixels())
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in (*model.modules(), *extractor.modules()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(extractor(pixels()), before)


def test_features_never_train() -> None:
    extractor = ClassifierFeatures(colours())
    nn.ModuleList([extractor]).train()
    assert not any(m.training for m in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_weights_come_from_the_file_when_they_are_needed(kind: str, tmp_path: Path) -> None:
    path, trained = tmp_path / "weights.ckpt", colours(seed=1)
    extractor = ClassifierFeatures(colours(), init_from=str(path))
    state = trained.state_dict()
    torch.save({"state_dict": {f"energy_model.{k}": v for k, v in state.items()}} if kind == "ours" else state, path)
    with torch.inference_mode():
        features = extractor(pixels())
    torch.testing.assert_close(features.double(), by_hand(state, pixels()), rtol=1e-5, atol=1e-6)
    path.unlink()  # it was read once
    assert torch.equal(extractor(pixels()), features)


def test_a_judge_reads_images_with_the_weights_of_its_file(tmp_path: Path) -> None:
    path, trained, images = tmp_path / "weights.pt", colours(seed=1), torch.rand(5, 3, 8, 8)
    judge = ClassifierJudge(colours(), init_from=str(path)).train()
    torch.save(trained.state_dict(), path)
    assert torch.equal(judge(images), trained.eval()(images))
    assert not judge(images).requires_grad
    path.unlink()
    assert judge.state_dict().keys() == {f"energy_model.{name}" for name in trained.state_dict()}


def test_the_fingerprint_sees_the_loaded_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"

    def fingerprint(seed: int) -> str:
        torch.save(colours(seed).state_dict(), path)
        return network_digest(ClassifierFeatures(colours(), init_from=str(path)))

    assert fingerprint(1) == network_digest(ClassifierFeatures(colours(seed=1)))
    assert fingerprint(1) != fingerprint(2) != network_digest(ClassifierFeatures(colours()))


def test_the_fingerprint_sees_how_images_are_prepared() -> None:
    settings: list[dict[str, Any]] = [{}, {"image_size": 8}, {"grey": True}]
    assert len({network_digest(ClassifierFeatures(colours(), **s)) for s in settings}) == 3


def test_a_missing_file_is_no_matter_until_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "gone.ckpt"
    extractor = ClassifierFeatures(colours(), init_from=str(path))
    for use in (lambda: extractor(pixels()), extractor.state_dict, lambda: network_digest(extractor)):
        with pytest.raises(FileNotFoundError, match=re.escape(f"no checkpoint at {path}")):
            use()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(tiny.energy_model().state_dict(), tmp_path / "other.pt")
    extractor = ClassifierFeatures(colours(), init_from=str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"other\.pt does not fit the network: missing backbone\.inner\.weight"):
        extractor(pixels())


class Unused(ColourNet):
    """Defines a linear layer after the one that gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class PixelWise(nn.Module):
    """A linear layer that sees every pixel as an example."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.permute(0, 2, 3, 1).flatten(0, 2)).view(len(x), -1, 4).mean(1)
        return logits


@pytest.mark.parametrize(("backbone", "said"), [(Unused(), r"\[\]"), (PixelWise(), r"\[\(320, 3\)\]")])
def test_a_last_layer_that_sees_no_features_is_refused(backbone: nn.Module, said: str) -> None:
    extractor = ClassifierFeatures(EnergyModel(backbone))
    with pytest.raises(ValueError, match=rf"last linear layer of {type(backbone).__name__} must see .*N = 5.*{said}"):
        extractor(pixels())


def test_arguments_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        ClassifierFeatures(colours(), image_size=0)
    with pytest.raises(ValueError, match=r"must have a linear layer.*Flatten has none"):
        ClassifierFeatures(EnergyModel(nn.Flatten()))
    with pytest.raises(ValueError, match="energy_model must be an EnergyModel, got ColourNet"):
        ClassifierFeatures(ColourNet())  # type: ignore[arg-type]


def test_the_frechet_distance_takes_them(tmp_path: Path) -> None:
    torch.save(colours(seed=1).state_dict(), tmp_path / "weights.pt")
    fid = FrechetDistance(ClassifierFeatures(colours(), init_from=str(tmp_path / "weights.pt")))
    real, fake = (torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    moments = {name: FeatureMoments(7) for name in ("real", "fake", "dark")}
    for name, images in (("real", real), ("fake", fake), ("dark", fake / 2)):
        moments[name].update(extract_features(fid.extractor, images))
    near, far = (frechet_distance(moments["real"].gaussian(), moments[name].gaussian()) for name in ("fake", "dark"))
    assert 0 < near < 0.1 * far
    labelled = [(image, 0) for image in real[:20]]
    data = SimpleNamespace(dataset=labelled, transform="none")
    data = type("Data", (), {**vars(data), "__getitem__": lambda _, i: {"x": real[i]}})()
    untrained = ClassifierFeatures(colours())
    assert reference_key("seen", data, fid.reader) != reference_key("seen", data, LayerReader(untrained))


def test_a_configuration_makes_them() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--extractor", type=nn.Module)
    backbone = {"class_path": "dat_lightning.SmallResNet", "init_args": {"widths": [4, 8]}}
    model = {"class_path": "dat_lightning.EnergyModel", "init_args": {"backbone": backbone}}
    arguments = {"energy_model": model, "init_from": "runs/later.ckpt", "image_size": 16, "grey": True}
    config = {"class_path": "dat_lightning.features.ClassifierFeatures", "init_args": arguments}
    made = parser.instantiate_classes(parser.parse_object({"extractor": config})).extractor
    assert isinstance(made, ClassifierFeatures)
    assert (made.init_from, made.image_size, made.grey) == ("runs/later.ckpt", 16, True)
