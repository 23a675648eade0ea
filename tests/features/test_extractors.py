import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dat_lightning import DigitsFeatures, TorchFidelityFeatures
from dat_lightning.data import digits
from dat_lightning.features import DigitsLayers, train_digits_features
from tests.features.random_inception import random_inception

INCEPTION_MODULE: ModuleType = sys.modules[FeatureExtractorInceptionV3.__module__]


def pixels(count: int, seed: int = 0, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def shipped_metadata() -> dict[str, str]:
    with safe_open(DigitsFeatures.WEIGHTS, "pt") as file:
        return dict(file.metadata())


def test_the_accuracy_in_the_file_is_the_one_on_the_360_test_digits() -> None:
    images, labels = digits.load_images()
    test = digits.split_indices(0)["test"]
    x, y = images[test], labels[test]
    eight_bit = (x * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    correct = int((DigitsLayers()(eight_bit)["logits"].argmax(1) == y).sum())
    assert len(y) == 360
    assert shipped_metadata()["test_accuracy"] == f"{correct / 360:.4f}"
    assert shipped_metadata()["test_accuracy"] in str(train_digits_features.__doc__)
    assert train_digits_features.accuracy(DigitsFeatures().network) == pytest.approx(correct / 360)


@pytest.mark.slow
def test_the_shipped_weights_come_from_the_training_digits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Training anew with the test digits destroyed gives the shipped weights, up to rounding on other machines.
    images, labels = digits.load_images()
    images, labels = images.clone(), labels.clone()
    test = digits.split_indices(0)["test"]
    images[test], labels[test] = float("nan"), -1
    monkeypatch.setattr(train_digits_features, "load_images", lambda: (images, labels))
    trained, shipped = train_digits_features.train().state_dict(), DigitsFeatures().network.state_dict()
    assert trained.keys() == shipped.keys()
    for name, weights in trained.items():
        assert (weights - shipped[name]).norm() < 0.05 * shipped[name].norm(), name


def test_training_leaves_the_global_generator_where_it_was() -> None:
    state = torch.get_rng_state()
    train_digits_features.train(epochs=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_script_writes_weights_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    one_epoch = train_digits_features.train(epochs=1)
    monkeypatch.setattr(train_digits_features, "train", lambda: one_epoch)
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(path)])
    train_digits_features.main()
    monkeypatch.setattr(DigitsFeatures, "WEIGHTS", path)
    assert shipped_metadata()["test_accuracy"] == f"{train_digits_features.accuracy(one_epoch):.4f}"
    loaded = DigitsFeatures().network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in one_epoch.state_dict().items())


def test_digits_features_feed_the_last_layer() -> None:
    network, images = DigitsFeatures(), pixels(5)
    features, logits = network(images), DigitsLayers()(images)["logits"]
    assert features.shape == (5, 64)
    assert features.min() >= 0
    last = network.network[-1]
    torch.testing.assert_close(features @ last.weight.T + last.bias, logits)


def test_digits_features_read_the_first_channel_in_units_of_one() -> None:
    network, images = DigitsFeatures(), pixels(4)
    others = images.clone()
    others[:, 1:] = 0
    assert torch.equal(network(images), network(others))
    expected = network.network[:-1](images[:, :1] / torch.tensor(255.0))
    torch.testing.assert_close(network(images), expected)


def test_digits_features_of_larger_images_are_those_of_their_means() -> None:
    network, images = DigitsFeatures(), pixels(4)
    enlarged = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(network(enlarged), network(images))


def test_digits_features_never_train() -> None:
    network = DigitsFeatures()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_a_missing_weights_file_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DigitsFeatures, "WEIGHTS", tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is missing: install the package again"):
        DigitsFeatures()


def test_without_a_network_the_error_names_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def offline(url: str, **_: Any) -> None:
        asked.append(url)
        raise URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr(INCEPTION_MODULE, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError) as error:
        TorchFidelityFeatures()
    assert isinstance(error.value.__cause__, URLError)
    message = str(error.value)
    for part in (asked[0], asked[0].rsplit("/", 1)[1], f"{tmp_path}/hub/checkpoints", "weights_path", "Errno -2"):
        assert part in message
    assert asked == [URL_INCEPTION_V3]


def test_a_weights_path_without_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inception.pth"
    with pytest.raises(
        FileNotFoundError, match=f"{re.escape(str(path))}: no such file; expected weights-inception-2015"
    ):
        TorchFidelityFeatures(weights_path=str(path))


def test_an_unknown_extractor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no extractor 'inception'; it has .*'inception-v3-compat'"):
        TorchFidelityFeatures("inception")


def test_an_unknown_layer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"layers must be .* out of .*'2048'.* of 'inception-v3-compat', got \['pool3'\]"
    ):
        TorchFidelityFeatures(feature="pool3")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(
        FileNotFoundError, match=r"(?s)weights of 'inception-v3-compat' could not be loaded \(.*Missing key"
    ):
        TorchFidelityFeatures(weights_path=str(tmp_path / "other.pth"))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """torch-fidelity's own Inception with random weights, and a file of them."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    return random_inception(path, "64", "2048"), str(path)


def test_inception_from_a_file_gives_torch_fidelity_s_features(inception: tuple[Any, str]) -> None:
    original, path = inception
    images = pixels(2, size=20)
    expected = dict(zip(("64", "2048"), original(images), strict=True))
    for feature, values in expected.items():
        extractor = TorchFidelityFeatures(feature=feature, weights_path=path)
        result = extractor(images)
        assert result.shape == (2, int(feature))
        assert torch.equal(result, values)
        assert values.std() > 0
        assert not any(p.requires_grad for p in extractor.parameters())
