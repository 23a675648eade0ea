"""Figures of generated samples: those of torch-fidelity's program, on any number of ranks."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import calculate_metrics, fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from dat_lightning import (
    DigitsDataModule,
    DigitsFeatures,
    FrechetDistance,
    PGDSampler,
    SampleBatch,
    SampleConsumer,
    SampleWriter,
)
from dat_lightning.features import DigitsLayers, FidelitySettings, Metric
from dat_lightning.sampling import SampleMetrics
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = FidelitySettings(isc_splits=3, kid_subsets=5, kid_subset_size=20)
NAMES = ("fid", "kid", "inception_score", "precision", "recall")


class Registered(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """The digits network as one of torch-fidelity's own extractors."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.digits = DigitsLayers()

    @staticmethod
    def get_provided_features_list() -> tuple[str, str]:
        return "features", "logits"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.digits(images)[layer] for layer in self.features_list)


class Collector(SampleConsumer):
    """Keeps the samples of each number of steps."""

    def __init__(self) -> None:
        self.batches: list[SampleBatch] = []

    def on_samples_batch(self, trainer: Trainer, pl_module: Any, batch: SampleBatch) -> None:
        self.batches.append(batch)

    def images(self, steps: int) -> Tensor:
        return torch.cat([b.images[steps] for b in self.batches])


def sampler(**kwargs: Any) -> PGDSampler:
    return PGDSampler(**{"num_samples": 47, "num_steps": [1, 30], "step_size": 0.5, "batch_size": 10, **kwargs})


def run(path: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    trainer = tiny.trainer(path, callbacks, limit_test_batches=1, **kwargs)
    trainer.test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    return trainer


def values(metric: SampleMetrics) -> dict[str, float]:
    return {figure.name: figure.value for figure in metric.figures}


def write_reference(folder: Path, count: int) -> Path:
    """PNG files of images like those that the chains begin with, and therefore like the samples of a few steps."""
    folder.mkdir(parents=True)
    seeds = tiny.digits(num_held_out=250).held_out_seeds()
    for index, image in enumerate(seeds(50 + k)[0] for k in range(count)):
        pixels = (image[0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    return folder


def test_figures_equal_torch_fidelity_s_on_the_written_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "digits", Registered)
    reference = write_reference(tmp_path / "reference", 200)
    metric = SampleMetrics(DigitsLayers(), settings=SETTINGS, reference=str(reference), batch_size=77)
    writers = [SampleWriter(str(tmp_path / f"after{s}"), ["png"], s, stages=["test"]) for s in (1, 30)]
    run(tmp_path, metric, sampler(), *writers)
    found = values(metric)
    keys = (
        "frechet_inception_distance",
        "kernel_inception_distance_mean",
        "inception_score_mean",
        "precision",
        "recall",
    )
    for steps in (1, 30):
        expected = calculate_metrics(
            input1=str(tmp_path / f"after{steps}" / "png"),
            input2=str(reference),
            **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
            **{f"feature_layer_{metric}": "features" for metric in ("fid", "kid", "prc")},
            feature_layer_isc="logits",
            feature_extractor="digits",
            samples_find_deep=True,
            isc_splits=3,
            kid_subsets=5,
            kid_subset_size=20,
            cuda=False,
            cache=False,
            save_cpu_ram=True,
            verbose=False,
        )
        for name, key in zip(NAMES, keys, strict=True):
            assert found[f"{name}_{steps}_steps"] == pytest.approx(expected[key], rel=1e-3), (name, steps)
    assert 0 < found["precision_1_steps"] < 1, found
    assert 0 < found["recall_1_steps"] < 1, found


def test_torch_fidelity_s_program_and_the_adm_evaluator_read_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "digits", Registered)
    collector, writer = Collector(), SampleWriter(str(tmp_path / "out"), num_steps=1, stages=["test"])
    metric = SampleMetrics(DigitsLayers(), ["prc"], reference=str(write_reference(tmp_path / "reference", 60)))
    run(tmp_path, sampler(), writer, collector, metric)
    folders = ["--input1", str(tmp_path / "out" / "png"), "--input2", str(tmp_path / "reference")]
    options = ["--feature-extractor", "digits", "--feature-layer-prc", "features", "--save-cpu-ram", "--no-cache"]
    monkeypatch.setattr(
        sys, "argv", ["fidelity", "--cpu", "--prc", "--json", "--samples-find-deep", "--silent", *folders, *options]
    )
    fidelity.main()
    assert json.loads(capsys.readouterr().out)["precision"] == pytest.approx(values(metric)["precision_1_steps"])
    # The evaluator streams arr_0 out of the archive: it wants the plain header, and pixels in C order behind it.
    with zipfile.ZipFile(tmp_path / "out" / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((47, 16, 16, 3), False, np.dtype(np.uint8))
        read = np.frombuffer(file.read(), np.uint8).reshape(47, 16, 16, 3)
    assert np.array_equal(read[..., 1], (collector.images(1)[:, 0] * 255).round().to(torch.uint8).numpy())


def test_the_chosen_steps_are_those_of_the_lowest_fid(tmp_path: Path) -> None:
    metric = SampleMetrics(DigitsLayers(), settings=SETTINGS)
    fid = FrechetDistance(DigitsFeatures())
    metric.prefix = "digits_"
    trainer = run(tmp_path, metric, sampler(num_steps=[0, 4, 30]), fid)
    found, logged = values(metric), trainer.callback_metrics
    best = min(fid.scores, key=lambda steps: fid.scores[steps])
    for steps in (0, 4, 30):
        assert found[f"digits_fid_{steps}_steps"] == pytest.approx(fid.scores[steps], rel=1e-5)
    assert len(found) == len(metric.figures) == 5 + 3 * 5
    assert float(logged["test/digits_sample_steps"]) == best
    for name, value in found.items():
        assert float(logged[f"test/{name}"]) == pytest.approx(value, rel=1e-5)
    for name, figure in zip(NAMES, metric.figures[:5], strict=True):
        assert figure.name == f"digits_{name}"
        assert figure.value == found[f"digits_{name}_{best}_steps"]
        assert figure.num_samples == 47
        assert figure.details["num_steps"] == best
        assert figure.details["sweep_steps"] == [0, 4, 30]
        assert figure.details["sweep"] == [found[f"digits_{name}_{steps}_steps"] for steps in (0, 4, 30)]
        assert (figure.settings["step_size"], figure.settings["rule"]) == (
            0.5,
            {"class": "dat_lightning.core.update_rules.Steepest"},
        )
        assert figure.details["network_evaluations"] == 2 * figure.details["num_steps"]
        json.dumps(dict(figure.details), allow_nan=False)


@pytest.mark.parametrize(("metrics", "decides"), [(["kid", "prc"], "kid"), (["isc", "prc"], None)])
def test_without_fid_kid_decides_and_without_either_the_most_steps(
    metrics: list[Metric], decides: str | None, tmp_path: Path
) -> None:
    metric = SampleMetrics(DigitsLayers(), metrics, SETTINGS)
    run(tmp_path, metric, sampler())
    found = values(metric)
    best = 30 if decides is None else min((1, 30), key=lambda steps: found[f"{decides}_{steps}_steps"])
    assert metric.figures[0].details["num_steps"] == best
    assert not [name for name in found if name.startswith("fid")]


def test_predict_logs_nothing_and_keeps_figures(tmp_path: Path) -> None:
    metric = SampleMetrics(DigitsLayers(), ["fid"])
    trainer = tiny.trainer(tmp_path, [metric, sampler()])
    trainer.predict(tiny.stage1(), datamodule=tiny.digits())
    assert not [name for name in trainer.callback_metrics if "fid" in name]
    assert list(values(metric)) == ["fid", "fid_1_steps", "fid_30_steps"]


def test_a_config_can_name_everything() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    config = {
        "class_path": "dat_lightning.sampling.SampleMetrics",
        "init_args": {
            "extractor": {"class_path": "dat_lightning.features.DigitsLayers"},
            "metrics": ["prc", "fid"],
            "settings": {"prc_neighborhood": 5},
            "feature_layer": "features",
        },
    }
    made = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    assert isinstance(made, SampleMetrics)
    assert made.metrics == ("fid", "prc")
    assert made.settings == FidelitySettings(prc_neighborhood=5)
    assert made.reader.feature_layer == "features"


# Extractors.


class Tuple(nn.Module):
    """Logits and features in the other order, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = DigitsLayers()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layers(images)
        return found["logits"], found["features"]


def test_layers_come_from_a_dictionary_or_a_tuple_and_logits_from_a_classifier_too(tmp_path: Path) -> None:
    model = tiny.energy_model(3)
    metrics = [
        SampleMetrics(DigitsLayers(), settings=SETTINGS),
        SampleMetrics(Tuple(), settings=SETTINGS, feature_layer="1", logit_layer="0", prefix="tuple_"),
        SampleMetrics(DigitsFeatures(), settings=SETTINGS, classifier=model, prefix="judged_"),
    ]
    collector = Collector()
    run(tmp_path, *metrics, sampler(), collector)
    first, second, third = (list(values(metric).values()) for metric in metrics)
    assert second == pytest.approx(first, rel=1e-6)
    score = NAMES.index("inception_score")
    assert third[:score] == pytest.approx(first[:score], rel=1e-6)
    # By definition, with splits of the shuffled samples in the order of their files.
    steps = metrics[2].figures[score].details["num_steps"]
    order = sorted(range(47), key=lambda i: (i % 10, i))
    images = collector.images(steps)[order]
    with torch.no_grad():
        p = model.eval()((images * 255).round() / 255).double().softmax(1)
    p = p[np.random.RandomState(2020).permutation(47)]  # as torch-fidelity shuffles
    parts = [p[k * 47 // 3 : (k + 1) * 47 // 3] for k in range(3)]
    scores = [float((q * (q.log() - q.mean(0).log())).sum(1).mean().exp()) for q in parts]
    assert third[score] == pytest.approx(sum(scores) / 3, rel=1e-5)
    assert metrics[2].figures[score].details["std"] == pytest.approx(float(np.std(scores)), rel=1e-3)
    assert metrics[2].figures[score].settings["classifier"].startswith("EnergyModel sha256:")
    # A copy was frozen.
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_inception_score_alone_needs_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DigitsDataModule, "reference_data", None)
    metric = SampleMetrics(DigitsLayers(), ["isc"], SETTINGS)
    run(tmp_path, metric, sampler())
    assert values(metric)["inception_score"] > 1
    with pytest.raises(ValueError, match="SampleMetrics needs reference images: name a folder"):
        run(tmp_path, SampleMetrics(DigitsLayers(), ["fid"]), sampler())


# The reference.


def test_features_of_the_reference_are_cached_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = DigitsLayers.forward

    def counting(self: DigitsLayers, images: Tensor) -> dict[str, Tensor]:
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(DigitsLayers, "forward", counting)
    cache = tmp_path / "cache"

    def images_seen(**kwargs: Any) -> tuple[int, dict[str, float]]:
        seen.clear()
        metric = SampleMetrics(DigitsLayers(), settings=SETTINGS, cache_dir=str(cache), **kwargs)
        run(tmp_path, metric, sampler())
        return sum(seen) // 1437, values(metric)

    times, first = images_seen()
    assert times == 1
    assert images_seen(batch_size=100) == (0, first)
    assert images_seen(feature_layer="logits")[0] == 1
    files = sorted(cache.glob("reference-*.npz"))
    assert sorted(np.load(file)["features"].shape for file in files) == [(1437, 10), (1437, 64)]
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"not a readable \.npz.*computing it anew"):
        times, again = images_seen()
    assert times == 1
    assert again == pytest.approx(first, rel=1e-6)


def test_the_reference_may_be_a_folder_or_an_npz(tmp_path: Path) -> None:
    folder = write_reference(tmp_path / "reference", 60)
    seeds = tiny.digits(num_held_out=250).held_out_seeds()
    images = torch.stack([seeds(50 + k)[0] for k in range(60)])
    pixels = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    features = DigitsFeatures()(pixels).double().numpy()
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "images.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    metrics = [
        SampleMetrics(DigitsLayers(), ["fid", "kid"], SETTINGS, str(path), prefix=f"{k}_")
        for k, path in enumerate((folder, tmp_path / "images.npz"))
    ]
    statistics = SampleMetrics(DigitsLayers(), ["fid"], SETTINGS, str(tmp_path / "statistics.npz"))
    run(tmp_path, *metrics, statistics, sampler())
    first, second = (list(values(metric).values()) for metric in metrics)
    assert first == pytest.approx(second, rel=1e-6)
    assert values(statistics)["fid"] == pytest.approx(first[0], rel=1e-5)
    assert metrics[0].figures[0].details["num_reference"] == 60
    assert str(folder) in metrics[0].figures[0].protocol


# Errors.


@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (["kid"], {}, "kid_subset_size=1000: there must be at least 1000 samples, got 47"),
        (["isc"], {"isc_splits": 48}, "isc_splits=48: there must be at least 48 samples, got 47"),
    ],
)
def test_too_few_samples_are_refused_before_any_is_generated(
    metrics: list[Metric], settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    collector = Collector()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, SampleMetrics(DigitsLayers(), metrics, FidelitySettings(**settings)), sampler(), collector)
    assert collector.batches == []


def test_statistics_are_refused_where_images_are_needed(tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    metric = SampleMetrics(DigitsLayers(), ["prc"], reference=str(tmp_path / "statistics.npz"))
    collector = Collector()
    with pytest.raises(ValueError, match="the metric 'prc' needs reference images"):
        run(tmp_path, metric, sampler(), collector)
    assert collector.batches == []


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: FrechetDistance(DigitsFeatures()), "FrechetDistance"),
        (lambda: SampleMetrics(DigitsLayers(), ["prc"]), "SampleMetrics"),
    ],
)
def test_two_callbacks_may_not_log_the_same_names(other: Any, name: str, tmp_path: Path) -> None:
    metric = SampleMetrics(DigitsLayers(), ["fid"])
    with pytest.raises(ValueError, match=f"SampleMetrics and another {name} would log the same names: give"):
        run(tmp_path, metric, sampler(), other())


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"SampleMetrics\.reference: no folder or \.npz at /nowhere"):
        SampleMetrics(DigitsLayers(), reference="/nowhere")
    with pytest.raises(ValueError, match=r"metrics must be some of .*, got \['is'\]"):
        SampleMetrics(DigitsLayers(), ["is"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SampleMetrics(DigitsLayers(), batch_size=0)
    with pytest.raises(ValueError, match="'isc' needs class logits: DigitsFeatures gives the layers"):
        run(tmp_path, SampleMetrics(DigitsFeatures(), ["isc"], SETTINGS), sampler())


# Processes.


def measure(folder: Path, devices: int) -> None:
    """Tests with some processes; each writes what it knows."""
    metric = SampleMetrics(DigitsLayers(), settings=SETTINGS, cache_dir=str(folder / f"cache{devices}"))
    images = SampleMetrics(DigitsLayers(), settings=SETTINGS, reference=str(folder / "reference"), prefix="files_")
    strategy = "ddp" if devices > 1 else "auto"
    callbacks: Sequence[Callback] = [metric, images, sampler(num_steps=[1, 5, 30])]
    trainer = tiny.trainer(folder, callbacks, limit_test_batches=1, devices=devices, strategy=strategy)
    trainer.test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    found = values(metric) | values(images)
    (folder / f"figures-{devices}-{trainer.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    write_reference(tmp_path / "reference", 61)
    command = [sys.executable, "-m", "tests.sampling.test_sample_metrics", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    measure(tmp_path, 1)
    one, *two = (json.loads((tmp_path / f"figures-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert two[0] == two[1]
    assert list(two[0]) == list(one)
    assert len(one) == 2 * (5 + 3 * 5)
    for name, value in one.items():
        assert two[0][name] == pytest.approx(value, rel=1e-4), name


if __name__ == "__main__":
    measure(Path(sys.argv[1]), 2)
