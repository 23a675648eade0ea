"""Figures of images in files, against torch-fidelity's program and against their definitions."""

import json
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dat_lightning.data import digits
from dat_lightning.features import DigitsFeatures, DigitsLayers, FidelitySettings, Metric, TorchFidelityLayers
from dat_lightning.features.fidelity import Features, Reference, fidelity_scores
from dat_lightning.features.gaussian_stats import Gaussian
from dat_lightning.features.image_sets import ArrayImages, FolderImages, read_set
from dat_lightning.features.layers import LayerReader
from dat_lightning.features.sample_sets import main, measure_sample_set
from tests.features.random_inception import random_inception

SETTINGS = FidelitySettings(isc_splits=3, kid_subsets=4, kid_subset_size=20)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def real_and_blurred(count: int) -> tuple[Pixels, Pixels]:
    """Digits as uint8 (N, H, W, 3), and others, shifted and darkened."""
    images = (digits.load_images()[0][: 2 * count] * 255).round().to(torch.uint8)
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    noise = np.random.default_rng(0).integers(0, 40, (count, *pixels.shape[1:]))
    worse = np.clip(np.roll(pixels[count:], 1, axis=2) * 0.9 + noise, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels[:count]), worse


def write_folder(folder: Path, pixels: Pixels, labels: list[int] | None = None) -> Path:
    """PNG files as SampleWriter names them; without labels, all in one folder."""
    for index, image in enumerate(pixels):
        path = folder / ("" if labels is None else f"{labels[index]:04d}") / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def values(found: list[Any]) -> dict[str, float]:
    return {figure.name: figure.value for figure in found}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of random weights of Inception."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    random_inception(path, "64")
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seventy images twice: PNG files in one folder per class, an npz, and a flat folder of others."""
    root = tmp_path_factory.mktemp("sets")
    real, worse = real_and_blurred(70)
    labels = [i % 7 for i in range(70)]
    np.savez(root / "samples.npz", arr_0=worse, arr_1=np.array(labels))
    return {
        "samples": write_folder(root / "samples", worse, labels),
        "npz": root / "samples.npz",
        "real": write_folder(root / "real", real),
    }


# Against torch-fidelity's program.


def test_figures_equal_torch_fidelity_s_on_the_same_files(
    weights: str, sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its Inception; small images and an early layer, also for the score's logits, make it fast."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    expected = calculate_metrics(
        input1=str(sets["samples"]),
        input2=str(sets["real"]),
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        **{f"feature_layer_{metric}": "64" for metric in ("fid", "kid", "isc", "prc")},
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=weights,
        samples_find_deep=True,
        isc_splits=3,
        kid_subsets=4,
        kid_subset_size=20,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    extractor = TorchFidelityLayers("inception-v3-compat", ["64"], weights)
    figures = measure_sample_set(
        sets["samples"], sets["real"], extractor, settings=SETTINGS, logit_layer="64", batch_size=33, silent=True
    )
    found = values(figures)
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert found["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found["precision"] == pytest.approx(expected["precision"], rel=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], rel=1e-6)
    assert 0 < found["precision"] < 1 or 0 < found["recall"] < 1
    details = {figure.name: figure.details for figure in figures}
    assert details["kid"]["std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)
    assert details["inception_score"]["std"] == pytest.approx(expected["inception_score_std"], rel=1e-3)


def test_torch_fidelity_s_layers_come_by_name_from_one_pass(weights: str) -> None:
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    layers = TorchFidelityLayers(weights_path=weights)
    original = cast(Any, FeatureExtractorInceptionV3)(
        "inception-v3-compat", ["logits_unbiased", "2048"], feature_extractor_weights_path=weights
    )
    logits, features = original(images)
    found = layers(images)
    assert list(found) == ["2048", "logits_unbiased"]
    assert torch.equal(found["2048"], features)
    assert torch.equal(found["logits_unbiased"], logits)
    # A reader takes them for what they are, also from torch-fidelity's own tuple in another order.
    for extractor, feature_layer in ((layers, None), (original, "2048")):
        read = LayerReader(extractor, features=feature_layer).read(images, with_logits=True)
        assert torch.equal(read["features"], features)
        assert torch.equal(read["logits"], logits)


def test_dinov2_is_an_extractor_like_the_others(monkeypatch: pytest.MonkeyPatch, sets: dict[str, Path]) -> None:
    asked: list[tuple[str, str]] = []

    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1:] == (3, 224, 224)
            return x.unfold(2, 56, 56).unfold(3, 56, 56).mean((1, 4, 5)).flatten(1)

    def load(repository: str, model: str) -> nn.Module:
        asked.append((repository, model))
        return Network()

    monkeypatch.setattr(torch.hub, "load", load)
    extractor = TorchFidelityLayers("dinov2-vit-l-14")
    assert asked == [("facebookresearch/dinov2", "dinov2_vitl14")]
    metrics: list[Metric] = ["fid"]
    (figure,) = measure_sample_set(sets["samples"], sets["real"], extractor, metrics, silent=True)
    assert figure.value > 0
    assert "TorchFidelityLayers(dinov2-vit-l-14, ['dinov2'])" in figure.protocol


def test_without_dinov2_s_weights_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*names: str) -> None:
        raise RuntimeError("It looks like there is no internet connection")

    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(FileNotFoundError, match=r"weights of 'dinov2-vit-l-14' could not be loaded \(It looks like"):
        TorchFidelityLayers("dinov2-vit-l-14")


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("inception", None, r"torch-fidelity has no extractor 'inception'; it has \['clip-rn101'"),
        ("vgg16", ["fc2", "fc2"], r"layers must be different names out of \['fc2'|\('fc2'"),
        ("inception-v3-compat", ["pool"], r"layers must be .*'2048'.*got \['pool'\]"),
        ("inception-v3-compat", [], r"layers must be .*got \[\]"),
    ],
)
def test_unknown_layers_are_refused_before_anything_is_loaded(
    name: str, layers: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TorchFidelityLayers(name, layers)


# Against the definitions.


def kid_by_definition(x: Tensor, y: Tensor) -> float:
    """The unbiased estimator of the squared maximum mean discrepancy, kernel (x·y/D + 1)³, by loops."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return float(a @ b / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def covered(points: Tensor, others: Tensor, k: int) -> float:
    """The share of points that lie within some other's distance to its k-th neighbour."""
    radii = [sorted(float((a - b).norm()) for j, b in enumerate(others) if j != i)[k - 1] for i, a in enumerate(others)]
    inside = [any(float((p - o).norm()) <= r for o, r in zip(others, radii, strict=True)) for p in points]
    return sum(inside) / len(inside)


def test_figures_are_what_their_definitions_say(sets: dict[str, Path]) -> None:
    network = DigitsFeatures()
    real, worse = real_and_blurred(70)
    worse = worse[np.argsort([i % 7 for i in range(70)], kind="stable")]
    x, y = (torch.from_numpy(p).permute(0, 3, 1, 2) for p in (worse, real))
    features, known = network(x).double(), network(y).double()
    # One subset of everything, so that chance has no part; the mean over one split.
    settings = FidelitySettings(isc_splits=1, kid_subsets=1, kid_subset_size=70, prc_neighborhood=2)
    figures = measure_sample_set(sets["samples"], sets["real"], DigitsLayers(), settings=settings, silent=True)
    found = values(figures)
    covariances = [np.cov(f.numpy(), rowvar=False) for f in (features, known)]
    root = float(np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum())
    fid = float((features.mean(0) - known.mean(0)).square().sum()) + float(sum(map(np.trace, covariances))) - 2 * root
    p = network.network[-1](network(x)).double().softmax(1)
    score = float((p * (p / p.mean(0)).log()).sum(1).mean().exp())
    assert list(found) == ["fid", "kid", "inception_score", "precision", "recall"]
    assert found["fid"] == pytest.approx(fid, rel=1e-3)
    assert found["kid"] == pytest.approx(kid_by_definition(features, known), rel=1e-3)
    assert found["inception_score"] == pytest.approx(score, rel=1e-5)
    assert found["precision"] == pytest.approx(covered(features, known, 2), abs=1e-6)
    assert found["recall"] == pytest.approx(covered(known, features, 2), abs=1e-6)
    assert 0 < found["precision"] != found["recall"] > 0
    assert all(figure.num_samples == 70 for figure in figures)


def test_precision_and_recall_look_at_some_of_the_reference(sets: dict[str, Path]) -> None:
    network = DigitsFeatures()
    real, worse = real_and_blurred(70)
    x, y = (torch.from_numpy(p).permute(0, 3, 1, 2) for p in (worse, real))
    features, known = network(x).double(), network(y).double()
    for seed in (0, 1):
        settings = FidelitySettings(prc_num_reference=40, seed=seed)
        args = (sets["samples"], sets["real"], DigitsLayers())
        found = values(measure_sample_set(*args, metrics=["prc"], settings=settings, silent=True))
        some = known[torch.randperm(70, generator=torch.Generator().manual_seed(seed))[:40]]
        assert found["precision"] == pytest.approx(covered(features, some, 3), abs=1e-6)
        assert found["recall"] == pytest.approx(covered(some, features, 3), abs=1e-6)
    with pytest.raises(ValueError, match=r"prc_num_reference must be at least 4, got 3"):
        FidelitySettings(prc_num_reference=3)


def test_settings_and_details_say_how(sets: dict[str, Path]) -> None:
    figures = measure_sample_set(sets["samples"], sets["real"], DigitsLayers(), settings=SETTINGS, silent=True)
    settings = {figure.name: dict(figure.settings) for figure in figures}
    against = {name: settings["fid"][name] for name in ("extractor", "feature_layer", "reference")}
    assert settings["fid"] == against
    chosen = {"prc_neighborhood": 3, "prc_num_reference": None, "seed": 2020}
    assert settings["precision"] == settings["recall"] == {**chosen, **against}
    assert settings["kid"] == {"kid_subsets": 4, "kid_subset_size": 20, "seed": 2020, **against}
    assert set(settings["inception_score"]) == {"isc_splits", "seed", "extractor", "logit_layer", "isc_size"}
    assert against["extractor"].startswith("DigitsLayers sha256:")
    assert against["reference"].startswith("sha256:")
    details = {figure.name: dict(figure.details) for figure in figures}
    assert details["fid"] == {"reference": str(sets["real"]), "num_reference": 70}
    assert details["kid"]["std"] > 0
    assert "kid subsets 4, kid subset size 20" in figures[1].protocol
    assert all(str(sets["real"]) in figure.protocol for figure in figures if figure.name != "inception_score")
    assert not any("sha256" in figure.protocol for figure in figures)


# Files.


def test_an_npz_and_its_png_files_have_the_same_figures(sets: dict[str, Path]) -> None:
    """The npz is in the order of indices; its labels put it in that of the files.

    An image's features depend on its place in a batch by float noise.
    """
    found = [
        values(measure_sample_set(sets[kind], sets["real"], DigitsLayers(), settings=SETTINGS, silent=True))
        for kind in ("samples", "npz")
    ]
    kid = [each.pop("kid") for each in found]  # a small difference of large sums of float32
    assert kid[0] == pytest.approx(kid[1], rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_an_npz_without_labels_stays_in_its_order(tmp_path: Path) -> None:
    _, worse = real_and_blurred(5)
    for name, save in (("plain", np.savez), ("compressed", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", arr_0=worse)
        images = ArrayImages(tmp_path / f"{name}.npz")
        assert len(images) == 5
        batches = list(images.batches([1, 2, 4], 2))
        assert [batch["index"].tolist() for batch in batches] == [[1, 2], [4]]
        assert set(batches[0]) == {"index", "x"}
        pixels = torch.cat([batch["x"] for batch in batches]).permute(0, 2, 3, 1)
        assert np.array_equal(pixels.numpy(), worse[[1, 2, 4]])


def test_folders_are_read_in_the_order_of_their_paths_as_text(tmp_path: Path) -> None:
    for k, name in enumerate(["a/2.png", "a/10.PNG", "a-b/1.png", "b.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 2), k).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images = FolderImages(tmp_path)
    assert [Path(path).relative_to(tmp_path).as_posix() for path in images.paths] == [
        "a-b/1.png",
        "a/10.PNG",
        "a/2.png",
        "b.png",
    ]
    (batch,) = images.batches(range(4), 10)
    assert batch["x"].shape == (4, 3, 2, 4)
    assert batch["x"][:, 2, 1, 3].tolist() == [2, 1, 0, 3]


def test_statistics_serve_fid_and_images_the_rest(tmp_path: Path, sets: dict[str, Path]) -> None:
    """As in the ADM evaluator's references, which hold statistics of more images than are in them."""
    real, _ = real_and_blurred(70)
    mu, sigma = np.full(64, 0.5, np.float32), np.eye(64)
    np.savez(tmp_path / "both.npz", arr_0=real, mu=mu, sigma=sigma)
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)

    def measured(reference: Path, metrics: list[Metric]) -> dict[str, float]:
        return values(
            measure_sample_set(sets["npz"], reference, DigitsLayers(), metrics, settings=SETTINGS, silent=True)
        )

    both, images = measured(tmp_path / "both.npz", ["fid", "kid"]), measured(sets["real"], ["fid", "kid"])
    assert both["kid"] == images["kid"]
    assert both["fid"] != images["fid"]
    assert both["fid"] == measured(tmp_path / "statistics.npz", ["fid"])["fid"]
    with pytest.raises(ValueError, match=r"the metric 'kid' needs reference images; statistics .* serve 'fid' alone"):
        measured(tmp_path / "statistics.npz", ["fid", "kid"])


def test_the_inception_score_needs_no_reference(sets: dict[str, Path]) -> None:
    settings = FidelitySettings(isc_splits=2)
    (figure,) = measure_sample_set(sets["npz"], None, DigitsLayers(), ["isc"], settings, silent=True)
    assert figure.value > 1
    with pytest.raises(ValueError, match=r"reference must be given for \['fid'\]: only 'isc' needs none"):
        measure_sample_set(sets["npz"], None, DigitsLayers(), ["fid"], silent=True)


def broken_png(folder: Path) -> Path:
    write_folder(folder, real_and_blurred(6)[0])
    path = folder / "000003.png"
    path.write_bytes(path.read_bytes()[:60])
    return folder


def another_size(folder: Path) -> Path:
    write_folder(folder, real_and_blurred(6)[0])
    Image.new("RGB", (5, 7)).save(folder / "000004.png")
    return folder


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "set.npz", **arrays)
    return folder / "set.npz"


def cut_npz(folder: Path) -> Path:
    path = npz(folder, arr_0=real_and_blurred(6)[0])
    path.write_bytes(path.read_bytes()[:900])
    return path


def flipped_npz(folder: Path) -> Path:
    """One byte of the last image is another, which the archive's checksum notices."""
    path = npz(folder, arr_0=real_and_blurred(6)[0])
    data = bytearray(path.read_bytes())
    data[128 + 5 * 768 + 300] ^= 255
    path.write_bytes(bytes(data))
    return path


def short_npz(folder: Path) -> Path:
    """A header that promises more images than follow."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (6, 16, 16, 3), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "set.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(999))
    return folder / "set.npz"


IMAGES = np.zeros((6, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", r"no folder or \.npz at .*nowhere"),
        (lambda p: p, r"has no images: expected \.png, \.jpg, \.jpeg in it or in its folders"),
        (broken_png, r"000003\.png is not a readable image"),
        (another_size, r"000004\.png has 7×5 pixels, and .*000000\.png has 16×16: images of a set must have one size"),
        (cut_npz, r"set\.npz is no folder, and not a readable \.npz: File is not a zip file"),
        (flipped_npz, r"set\.npz: arr_0 is damaged: Bad CRC-32"),
        (short_npz, r"set\.npz: arr_0 is damaged: the file ends too early"),
        (lambda p: npz(p, images=IMAGES), r"must have images \(arr_0\) or statistics .*, got \['images\.npy'\]"),
        (lambda p: npz(p, arr_0=IMAGES.astype(float)), r"arr_0 must be uint8 of shape \(N, H, W, 3\), got float64"),
        (lambda p: npz(p, arr_0=IMAGES[:0]), r"arr_0 must be .* of shape \(0, 16, 16, 3\)"),
        (lambda p: npz(p, arr_0=IMAGES[..., :1]), r"arr_0 must be .* of shape \(6, 16, 16, 1\)"),
        (lambda p: npz(p, arr_0=np.asfortranarray(IMAGES)), r"arr_0 must be uint8"),
        (lambda p: npz(p, arr_0=IMAGES, arr_1=np.zeros(5, int)), r"arr_1 must be integers of shape \(6,\), got int64"),
        (lambda p: npz(p, arr_0=IMAGES, arr_1=np.zeros(6)), r"arr_1 must be integers of shape \(6,\), got float64"),
        (lambda p: npz(p, mu=np.zeros(64), sigma=np.eye(64)), r"samples=.* has statistics alone; expected images"),
    ],
)
def test_wrong_sets_are_refused_in_one_sentence(
    make: Callable[[Path], Path], message: str, tmp_path: Path, sets: dict[str, Path]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        measure_sample_set(make(tmp_path), sets["real"], DigitsLayers(), ["fid"], silent=True)
    assert "\n" not in str(error.value)


def test_wrong_statistics_are_refused(tmp_path: Path, sets: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"set\.npz has no entry .*sigma"):
        read_set(npz(tmp_path, mu=np.zeros(64)))
    reference = npz(tmp_path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"samples have 64 features and the reference .*set\.npz has 3; both need"):
        measure_sample_set(sets["npz"], reference, DigitsLayers(), ["fid"], silent=True)


@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (["kid"], {}, "kid_subset_size=1000: there must be at least 1000 samples, got 70"),
        (["isc"], {"isc_splits": 71}, "isc_splits=71: there must be at least 71 samples, got 70"),
        (["prc"], {"prc_neighborhood": 70}, "prc_neighborhood=70: there must be at least 71 samples, got 70"),
        (["fid", "is"], {}, r"metrics must be some of \['fid', 'kid', 'isc', 'prc'\], got \['fid', 'is'\]"),
        ([], {}, "metrics must be some of"),
        (["fid"], {"kid_subset_size": 1}, "kid_subset_size must be at least 2, got 1"),
        (["fid"], {"isc_splits": 0}, "isc_splits must be at least 1, got 0"),
        (["isc"], {"isc_size": 0}, "isc_size must be at least 1, got 0"),
    ],
)
def test_sets_that_are_too_small_are_refused_before_features_are_read(
    metrics: list[Metric], settings: dict[str, int], message: str, sets: dict[str, Path]
) -> None:
    class Never(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("features were read")

    with pytest.raises(ValueError, match=message):
        measure_sample_set(sets["samples"], sets["real"], Never(), metrics, FidelitySettings(**settings), silent=True)


def test_a_small_reference_is_refused_as_well(tmp_path: Path, sets: dict[str, Path]) -> None:
    reference = npz(tmp_path, arr_0=IMAGES)
    with pytest.raises(ValueError, match="kid_subset_size=20: there must be at least 20 reference images, got 6"):
        measure_sample_set(sets["npz"], reference, DigitsLayers(), ["kid"], SETTINGS, silent=True)


# Extractors.


class Tuple(nn.Module):
    """Mean and brightest pixel of each image, and three logits."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float()
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1), x.mean((2, 3))


def test_layers_are_found_by_position_and_by_name() -> None:
    pixels = torch.from_numpy(real_and_blurred(4)[1]).permute(0, 3, 1, 2)
    features, logits = Tuple()(pixels)
    read = LayerReader(Tuple(), features="1", logits="0").read(pixels, with_logits=True)
    assert torch.equal(read["features"], logits)
    assert torch.equal(read["logits"], features)
    assert set(LayerReader(Tuple()).read(pixels)) == {"features"}
    with pytest.raises(ValueError, match=r"'isc' needs class logits: Tuple gives the layers \['0', '1'\]; name one"):
        LayerReader(Tuple()).read(pixels, with_logits=True)
    with pytest.raises(ValueError, match=r"features='2048': Tuple has no such layer; it gives \['0', '1'\]"):
        LayerReader(Tuple(), features="2048").read(pixels)

    class Nothing(nn.Module):
        def forward(self, images: Tensor) -> dict[str, float]:
            return {"mean": 0.5}

    with pytest.raises(ValueError, match=r"Nothing must give a tensor, or a tuple or dict of tensors, got \{'mean'"):
        LayerReader(Nothing()).read(pixels)


def test_a_classifier_gets_images_in_units_of_one_with_the_channels_that_there_are() -> None:
    grey = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    read = LayerReader(DigitsFeatures(), nn.Flatten()).read(grey, with_logits=True)
    torch.testing.assert_close(read["logits"], torch.tensor([0.0, 0.2, 1.0]).reshape(3, 1).expand(3, 4))
    assert torch.equal(read["features"], DigitsFeatures()(grey.expand(-1, 3, -1, -1)))


def test_logits_alone_are_of_images_that_pil_has_resized() -> None:
    pixels = torch.from_numpy(real_and_blurred(4)[1]).permute(0, 3, 1, 2)
    images = [
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((23, 23), Image.Resampling.BILINEAR) for image in pixels
    ]
    resized = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    read = LayerReader(DigitsLayers(), logit_size=23).read(pixels, with_logits=True)
    assert torch.equal(read["features"], DigitsLayers()(pixels)["features"])
    torch.testing.assert_close(read["logits"], DigitsLayers()(resized)["logits"])
    assert (read["logits"] - DigitsLayers()(pixels)["logits"]).abs().max() > 0.1
    judged = LayerReader(DigitsLayers(), nn.Flatten(), logit_size=23).read(pixels[:, :1], with_logits=True)
    assert torch.equal(judged["logits"], (resized[:, :1].float() / 255).flatten(1))


@pytest.mark.parametrize("part", ["features", "logits"])
def test_features_and_logits_that_are_no_numbers_are_refused(part: str) -> None:
    read = {"features": torch.rand(4, 2), "logits": torch.rand(4, 3)}
    read[part][2, 1] = float("nan")
    settings = FidelitySettings(isc_splits=1)
    with pytest.raises(ValueError, match="features must be finite: the images or the extractor produced NaN"):
        fidelity_scores(["isc"], settings, Features(4, None, **read), Reference())


def test_no_distance_of_numbers_that_are_none() -> None:
    one, two = (
        Gaussian(torch.full((2,), mean, dtype=torch.float64), torch.eye(2, dtype=torch.float64), 9) for mean in (0, 1)
    )
    wrong = [
        replace(one, mean=torch.tensor([0.0, math.nan]).double()),
        replace(one, covariance=torch.tensor([[1.0, math.nan], [0.0, 1.0]]).double()),
        replace(one, covariance=torch.tensor([[math.inf, 0.0], [0.0, 1.0]]).double()),
    ]
    for gaussian in wrong:
        for known, samples in ((gaussian, two), (two, gaussian)):
            with pytest.raises(ValueError, match="mean and covariance must be finite, got NaN or infinity"):
                fidelity_scores(["fid"], FidelitySettings(), Features(9, samples), Reference(9, known))
    huge = replace(one, mean=torch.full((2,), 1e200, dtype=torch.float64))
    with pytest.raises(ValueError, match="the Fréchet distance overflows"):
        fidelity_scores(["fid"], FidelitySettings(), Features(9, huge), Reference(9, two))


# The program.


def test_the_program_writes_the_figures_as_json(
    tmp_path: Path, sets: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--samples", str(sets["samples"]), "--reference", str(sets["real"]), "--extractor", "digits"]
    args += ["--metrics", "prc", "kid", "isc", "--kid-subset-size", "20", "--kid-subsets", "4", "--isc-splits", "3"]
    args += ["--isc-size", "23"]
    main(args)
    printed = json.loads(capsys.readouterr().out)
    settings = replace(SETTINGS, isc_size=23)
    metrics: list[Metric] = ["kid", "isc", "prc"]
    expected = measure_sample_set(sets["npz"], sets["real"], DigitsLayers(), metrics, settings, silent=True)
    found = {figure["name"]: figure["value"] for figure in printed["figures"]}
    wanted = values(expected)
    assert found.pop("kid") == pytest.approx(wanted.pop("kid"), rel=1e-5)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert {"name", "value", "protocol", "num_samples", "details", "better", "settings"} <= printed["figures"][0].keys()
    assert {"extractor", "reference"} <= printed["figures"][0]["settings"].keys()
    main([*args, "--out", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == printed
    assert capsys.readouterr().out == ""


def test_the_program_says_in_one_line_what_is_wrong(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, message in (
        (["--extractor", "digits"], f"error: {tmp_path} has no images"),
        (["--extractor", "digits", "--metrics", "is"], "error: metrics must be some of"),
        (["--extractor", "digits", "--batch-size", "0"], "error: batch_size must be at least 1, got 0"),
        (["--extractor", "digits", "--layers", "64"], "error: --layers and --weights-path are for torch-fidelity's"),
        (["--extractor", "digits", "--weights-path", weights], "error: --layers and --weights-path are for"),
        (["--out", str(tmp_path / "gone" / "f.json")], f"there is no folder {tmp_path / 'gone'}"),
        (["--extractor", "digits", "--device", "abacus"], "error: device='abacus' is not to be used here"),
        (["--weights-path", str(tmp_path / "gone.pth")], "gone.pth: no such file"),
        (["--weights-path", weights, "--layers", "65"], r"error: layers must be different names out of"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--samples", str(tmp_path), "--reference", str(tmp_path), *args])
        assert stop.value.code == 2
        assert re.escape(message) in re.escape(capsys.readouterr().err.splitlines()[-1])
