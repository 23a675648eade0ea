"""Shipped recipes: each says what the method's table says, instantiates as it is, and trains at reduced size."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import dat_lightning
from dat_lightning import (
    CIFARImages,
    DualAdversarialModule,
    ExponentialMovingAverage,
    ImageDataModule,
    PGDSampler,
    RobustClassifierModule,
)
from dat_lightning.cli import main
from dat_lightning.data.entries import image_name
from tests.data.parquet import needs_datasets
from tests.frozen.record import ADDED, printed
from tests.program import program
from tests.recipes import CLASSES, Means, write_all, write_parquet_files

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(
    path
    for folder in ("cifar10", "cifar100", "cifar10_small", "imagenet")
    for path in (CONFIGS / folder).glob("*.yaml")
    if path.stem not in ADDED
)
FRAGMENTS = sorted([*(CONFIGS / "trainer").glob("*.yaml"), *(CONFIGS / "data").glob("*.yaml")])

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")

# The method's table: T_max, AUC threshold, η, learning rate, L2 attack (ε, step, steps), batch size, millions of
# parameters of the network.
STAGE2 = {
    "cifar10/stage2_T40": (50, 0.8, 0.1, 1e-3, (0.5, 0.1, 10), 128, 46.16),
    "cifar10/stage2_T50": (100, 0.7, 0.1, 1e-3, (0.5, 0.1, 10), 128, 46.16),
    "cifar100/stage2_T45": (50, 0.8, 0.1, 1e-2, (0.5, 0.1, 10), 128, 46.22),
    "cifar100/stage2_T50": (50, 0.75, 0.1, 1e-2, (0.5, 0.1, 10), 128, 46.22),
    "imagenet/resnet50_T15": (15, 0.4, 2.0, 1e-3, (3.0, 2.0, 3), 512, 25.56),
    "imagenet/resnet50_T30": (30, 0.4, 2.0, 1e-3, (3.0, 2.0, 3), 512, 25.56),
    "imagenet/wrn50_4_T30": (30, 0.2, 2.0, 1e-3, (3.0, 2.0, 3), 512, 223.4),
    "imagenet/wrn50_4_T65": (65, 0.2, 2.0, 1e-3, (3.0, 2.0, 3), 512, 223.4),
    "imagenet/convnext_l_T110": (110, 0.2, 3.0, 3e-4, (3.0, 2.0, 3), 512, 198.1),
}


# Base ± 3 sampling steps, where the method names a base.
SWEEPS = {
    "cifar10/stage1": (18, 22, 26),
    "cifar10/stage2_T40": (30, 33, 36),
    "cifar10/stage2_T50": (32, 35, 38),
    "imagenet/resnet50_T30": (11, 14, 17),
    "imagenet/wrn50_4_T65": (16, 19, 22),
    "imagenet/convnext_l_T110": (33, 36, 39),
}


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dat_lightning, "TorchFidelityFeatures", Means)
    write_all(tmp_path / "data", monkeypatch)


def name_of(recipe: Path) -> str:
    return f"{recipe.parent.name}/{recipe.stem}"


def values_of(part: Any, key: str = "") -> list[tuple[str, Any]]:
    """All values of a file, each with the last name above it."""
    if isinstance(part, dict):
        return [found for name, value in part.items() for found in values_of(value, str(name))]
    if isinstance(part, list):
        return [found for value in part for found in values_of(value, key)]
    return [(key, part)]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_run_writes_nowhere_but_into_its_own_folder(path: Path) -> None:
    """So that trainer.default_root_dir moves all of it; init_from reads another run."""
    values = values_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert values
    literal = {key for key, value in values if isinstance(value, str) and value.startswith(("runs/", "./runs/"))}
    assert literal <= {"default_root_dir", "init_from"}
    folders = [value for key, value in values if key in ("dirpath", "picture_dirpath", "save_dir")]
    assert all(str(folder).startswith("${trainer.default_root_dir}") for folder in folders if folder is not None)


def lists_of(part: Any, key: str = "") -> list[tuple[str, list[Any]]]:
    """All lists of a file, each with the name above it."""
    if isinstance(part, dict):
        return [found for name, value in part.items() for found in lists_of(value, str(name))]
    return [(key, part)] if isinstance(part, list) else []


def instantiate(recipe: Path, *args: str) -> Any:
    """The program's objects, with weights that take no memory."""
    with torch.device("meta"):
        return program("--config", str(recipe), "--data.init_args.validation_size=5", *args)


def small_data(recipe: Path) -> list[str]:
    return [] if recipe.parent.name == "imagenet" else ["--data.init_args.num_held_out=20"]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_instantiates_and_is_what_the_method_says(recipe: Path) -> None:
    cli = instantiate(recipe, *small_data(recipe))
    model, data = cli.model, cli.datamodule
    assert isinstance(data, ImageDataModule)
    assert data.batch_size == (512 if recipe.parent.name == "imagenet" else 128)
    assert recipe.stem in cli.trainer.default_root_dir
    optimizer = model.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    settings = optimizer.param_groups[0]
    if name_of(recipe) in STAGE2:
        max_steps, threshold, eta, lr, attack, batch_size, millions = STAGE2[name_of(recipe)]
        assert isinstance(model, DualAdversarialModule)
        assert (model.curriculum.max_steps, model.curriculum.auc_threshold) == (max_steps, threshold)
        assert model.contrastive_chain.step_size == eta
        assert settings["lr"] == lr
        threat = model.threat_model
        assert (threat.eps, threat.step_size, threat.num_steps, threat.random_start) == (*attack, False)
        assert data.batch_size == batch_size
        assert sum(p.numel() for p in model.energy_model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        assert set(data.streams) == {"gen", "clf", "ood"}
        assert model.init_from is not None
    if "convnext" in recipe.stem:
        assert isinstance(optimizer, torch.optim.AdamW)
        assert (settings["betas"], settings["weight_decay"]) == ((0.9, 0.95), 0.05)
        assert model.energy_model.mean is None
    else:
        assert isinstance(optimizer, torch.optim.SGD)
        assert (settings["momentum"], settings["nesterov"], settings["weight_decay"]) == (0.9, True, 5e-4)
        assert model.energy_model.mean is not None
    imagenet = recipe.parent.name == "imagenet"
    assert model.threat_model.norm == "L2"
    assert (data.augmentation, data.image_size) == (("imagenet", 256) if imagenet else ("cifar", 32))
    assert data.ood_augmentation == ("resized_crop" if imagenet else "crop")
    assert data.eval_resize == (292 if imagenet else None)
    (average,) = (c for c in cli.trainer.callbacks if isinstance(c, ExponentialMovingAverage))
    assert (average.decay, average.warm_up) == (0.999, True)
    for sampler in (c for c in cli.trainer.callbacks if isinstance(c, PGDSampler)):
        assert SWEEPS.get(name_of(recipe), sampler.num_steps) == sampler.num_steps
    names = [{image_name(part, i) for i in range(len(part))} for part in (data.train_images, data.test_images)]
    assert not names[0] & names[1]
    logits = model.energy_model(torch.empty(2, 3, data.image_size, data.image_size, device="meta"))
    assert logits.shape == (2, {"cifar100": 100, "imagenet": 1000}.get(recipe.parent.name, 10))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_stage_1_trains_as_the_method_says(name: str) -> None:
    recipe = CONFIGS / name / "stage1.yaml"
    cli = instantiate(recipe, "--data.init_args.num_held_out=20")
    assert isinstance(cli.model, RobustClassifierModule)
    assert cli.trainer.max_epochs == 300
    threat = cli.model.threat_model
    assert (threat.norm, threat.eps, threat.step_size, threat.num_steps) == ("L2", 0.5, 0.1, 10)
    configured: Any = cli.model.configure_optimizers()
    schedule = configured["lr_scheduler"]
    assert isinstance(schedule["scheduler"], torch.optim.lr_scheduler.CosineAnnealingLR)
    assert (schedule["scheduler"].T_max, schedule["interval"]) == (300, "epoch")
    assert schedule["scheduler"].optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem != "features"], ids=name_of)
def test_the_best_checkpoints_by_fid_and_by_robust_accuracy_are_kept(recipe: Path) -> None:
    callbacks = printed(recipe)["trainer"]["callbacks"]
    kept = [c["init_args"] for c in callbacks if c["class_path"].endswith("ModelCheckpoint")]
    watched = {c["monitor"]: (c["mode"], c["filename"]) for c in kept if c["monitor"]}
    assert watched == {
        "val/fid": ("min", "best_fid"),
        "val/robust_accuracy": ("max", "best_robust_accuracy"),
    }
    assert [c["filename"] for c in kept if not c["monitor"]] in (["last"], ["last", "recent"])
    (sampler,) = (c["init_args"] for c in callbacks if c["class_path"].endswith("PGDSampler"))
    assert sampler["num_samples"] == 10_000
    assert sampler["step_size"] == (8.0 if recipe.parent.name == "imagenet" else 0.2)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_the_head_of_a_recipe_says_what_it_needs(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert "Global batch size" in comment
    assert "Expected: " in comment
    assert f"dat-lightning fit --config {recipe.relative_to(ROOT).as_posix()}" in comment
    if recipe.parent.name != "cifar10_small":
        assert "Row of the paper" in comment


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=name_of)
def test_fragments_compose_with_a_recipe(fragment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = CONFIGS / "cifar10" / "stage2_T40.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(recipe), "--config", str(fragment), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    wanted = yaml.safe_load(fragment.read_text(encoding="utf-8"))

    def agrees(found: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            return all(agrees(found[key], value) for key, value in expected.items())
        if isinstance(expected, list):
            return len(found) == len(expected) and all(map(agrees, found, expected))
        return bool(found == expected)

    assert agrees(printed, wanted)
    # What the fragment does not name stays the recipe's.
    assert printed["model"]["init_args"]["curriculum"]["init_args"]["max_steps"] == 50
    assert printed["data"]["init_args"]["batch_size"] == 128


@pytest.mark.parametrize("fragment", [f for f in FRAGMENTS if f.parent.name == "data"], ids=name_of)
def test_a_data_fragment_leaves_nothing_of_the_recipes_seeds(
    fragment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "parquet" in fragment.stem:
        datasets: Any = pytest.importorskip("datasets", reason=needs_datasets)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        write_parquet_files(tmp_path / "data")
    for file in (tmp_path / "data").glob("tiny_images*"):
        file.unlink()
    recipe = CONFIGS / "cifar10" / "stage2_T40.yaml"
    cli = instantiate(recipe, "--config", str(fragment), "--data.init_args.num_held_out=20")
    data = cli.datamodule
    x_ood = data.held_out_seeds()(0)[0]
    assert x_ood.shape == (3, 32, 32)
    data.num_workers = 0
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert {name: tuple(batch[name].shape) for name in ("x_gen", "x_clf", "x_ood")} == dict.fromkeys(
        ("x_gen", "x_clf", "x_ood"), (128, 3, 32, 32)
    )
    seeds = {image_name(data.seeds, i) for i in range(len(data.seeds))}
    held_out = {image_name(data.held_out_images, i) for i in range(len(data.held_out_images))}
    assert len(held_out) > 0
    assert not seeds & held_out


def test_seeds_of_cifar100_show_no_classes_near_those_of_cifar10() -> None:
    fragment = CONFIGS / "data" / "cifar10_cifar100.yaml"
    data = instantiate(CONFIGS / "cifar10" / "stage2_T40.yaml", "--config", str(fragment)).datamodule
    (near,) = {tuple(skipped) for key, skipped in lists_of(yaml.safe_load(fragment.read_text())) if "skip" in key}
    page = (ROOT / "docs" / "pages" / "data.md").read_text(encoding="utf-8")
    for images, part in ((data.seeds, "train"), (data.held_out_images, "test")):
        shown = {image_name(images, i) for i in range(len(images))}
        whole = CIFARImages("cifar100", "data", train=part == "train")
        expected = {whole.name(i) for i in range(len(whole)) if whole.classes[whole[i][1]] not in near}
        assert shown == expected
        assert 0 < len(shown) < len(whole)
    assert set(near) <= set(CLASSES["cifar100"])
    assert all(f"`{name}`" in page for name in near)


# The method's protocols: ε of AutoAttack and how many images, attack on OOD images, sampling steps and their length.
EVALUATIONS = {
    "cifar10/stage2_T50": (0.5, None, (1.0, 0.1, 20), 35, 0.2),
    "imagenet/resnet50_T30": (3.0, 5000, (3.0, 1.0, 10), 14, 8.0),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_measures_what_the_method_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dat_lightning, "TorchFidelityLayers", Means)
    np.savez(tmp_path / "data" / "VIRTUAL_imagenet256_labeled.npz", mu=np.zeros(3), sigma=np.eye(3))
    recipe = CONFIGS / f"{name}.yaml"
    evaluation = recipe.with_name("evaluate.yaml")
    cli = instantiate(recipe, *small_data(recipe), "--config", str(evaluation))
    parts = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    eps, max_images, ood, steps, step_size = EVALUATIONS[name]
    attack = parts["AutoAttack"]
    assert (attack.norm, attack.eps, attack.version, attack.max_images) == ("L2", eps, "standard", max_images)
    assert attack.dirpath is not None
    threat = parts["OODDetection"].attack
    assert (threat.norm, threat.eps, threat.step_size, threat.num_steps) == ("L2", *ood)
    assert parts["OODDetection"].num_ood == 1024
    sampler, metrics = parts["PGDSampler"], parts["SampleMetrics"]
    assert (sampler.num_samples, sampler.num_steps, sampler.chain.step_size) == (50_000, (steps,), step_size)
    assert set(metrics.metrics) == {"fid", "kid", "isc", "prc"}
    assert (metrics.settings.isc_splits, metrics.settings.prc_neighborhood) == (10, 3)
    # The published code's seeds, bytes and images of the Inception score.
    assert (sampler.rounding, metrics.settings.isc_size) == ("truncate", 299)
    assert cli.datamodule.seed_settings == {"seed_transform": "squash"}
    size = cli.datamodule.image_size
    assert cli.datamodule.held_out_seeds()(0)[0].shape == (3, size, size)
    assert parts["Calibration"].num_bins == 15
    assert len(parts["Counterfactuals"].eps) >= 3
    assert parts["EvaluationReport"].path is None
    # As it is trained, so it is measured.
    trained = cli.model.eval_threat_model
    assert trained in parts["RobustAccuracy"].threat_models
    text = evaluation.read_text(encoding="utf-8")
    assert f"--config {recipe.relative_to(ROOT).as_posix()} --config {evaluation.relative_to(ROOT).as_posix()}" in text


def small_network(recipe: Path) -> list[str]:
    """Arguments that make the recipe's network small, of the same family."""
    path = "--model.init_args.energy_model.init_args.backbone"
    if recipe.parent.name == "imagenet":
        classes = ["--data.init_args.image_size=32", "--data.init_args.eval_resize=36"]
        if "convnext" in recipe.stem:
            return [f"{path}.init_args.size=tiny", f"{path}.init_args.num_classes=10", *classes]
        return [f"{path}=dat_lightning.timm_model", f"{path}.name=resnet10t", f"{path}.num_classes=10", *classes]
    return [f"{path}.init_args.depth=10", f"{path}.init_args.widen_factor=1"]


@pytest.mark.parametrize(
    "recipe",
    ["cifar10/stage1", "cifar100/stage2_T50", pytest.param("imagenet/convnext_l_T110", marks=pytest.mark.slow)],
)
def test_a_recipe_trains_samples_and_keeps_its_checkpoints(recipe: str, tmp_path: Path) -> None:
    """Two steps and one evaluation as shipped, but for sizes."""
    path = CONFIGS / f"{recipe}.yaml"
    config = printed(path)
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "dat_lightning.PGDSampler":
            callback["init_args"] |= {"num_samples": 8, "num_steps": [0, 1], "batch_size": 4}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    attack = ["--model.init_args.threat_model.num_steps=1"]
    init = [] if "stage1" in recipe else ["--model.init_args.init_from=null"]
    data = ["batch_size=4", "eval_batch_size=4", "num_workers=0", "validation_size=8"]
    held_out = [] if "imagenet" in recipe else ["--data.init_args.num_held_out=20"]
    main(
        [
            "fit",
            "--config",
            str(tmp_path / "small.yaml"),
            *small_network(path),
            *attack,
            *init,
            *held_out,
            *(f"--data.init_args.{setting}" for setting in data),
            "--trainer.max_epochs=1",
            "--trainer.limit_train_batches=2",
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
            "--trainer.log_every_n_steps=1",
        ]
    )
    run = tmp_path / "runs" / recipe
    saved = {file.stem: torch.load(file, weights_only=True) for file in (run / "checkpoints").glob("*.ckpt")}
    assert set(saved) == {"last", "best_fid", "best_robust_accuracy"}
    assert all(checkpoint["global_step"] == 2 for checkpoint in saved.values())
    raw, average = saved["last"]["current_model_state"], saved["last"]["state_dict"]
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    assert list((run / "samples").glob("*.png"))


# What makes the recipes of a script small.
SMALLER = {
    "small_cifar10": [
        ("depth: 16", "depth: 10"),
        (": 4\n", ": 1\n"),
        ("num_samples: 10000", "num_samples: 20"),
        ("[10, 15, 20, 25, 30, 35, 40]", "[1, 2]"),
    ],
    "cifar10_cpu": [
        ("[32, 64, 128, 256]", "[4, 8]"),
        ("[48, 96, 192]", "[4, 8]"),
        ("widen_factor: 2", "widen_factor: 1"),
        ("num_samples: 5000", "num_samples: 20"),
        ("prc_num_reference: 5000", "prc_num_reference: 20"),
        ("max_images: 1000", "max_images: 2"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALLER)
def test_the_small_recipes_run_from_one_script(script: str, tmp_path: Path) -> None:
    """The script trains ordinary classifiers and both stages, and tests these; here with networks of almost nothing."""
    folder = "cifar10_small" if script == "small_cifar10" else script
    (tmp_path / "configs" / folder).mkdir(parents=True)
    shutil.copytree(CONFIGS / "cifar10", tmp_path / "configs" / "cifar10")  # what the small ones are on top of
    for recipe in (CONFIGS / folder).glob("*.yaml"):
        text = recipe.read_text(encoding="utf-8")
        for long, short in SMALLER[script]:
            text = text.replace(long, short)
        (tmp_path / "configs" / folder / recipe.name).write_text(text, encoding="utf-8")
    # What every command gets: folders instead of torchvision's files, whose checksums another process would check.
    folders = CONFIGS / "data" / "cifar10_folders.yaml"
    small = ["batch_size=8", "num_workers=0", "validation_size=10", "num_held_out=20"]
    arguments = ["--config", str(folders), *(f"--data.init_args.{setting}" for setting in small)]
    arguments += ["--trainer.limit_test_batches=1", "--model.init_args.threat_model.num_steps=1"]
    program = tmp_path / "bin" / "dat-lightning"
    program.parent.mkdir()
    # `test` has no limit on training, and `fit` trains two batches of one epoch.
    python = Path(sys.executable)
    program.write_text(
        f'#!/usr/bin/env bash\n[ "$1" = fit ] && set -- "$@" --trainer.max_epochs 1 --trainer.limit_train_batches 2 '
        f'--trainer.check_val_every_n_epoch 1\nexec {python} -m dat_lightning "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    run = subprocess.run(
        [str(ROOT / "docs" / "examples" / f"{script}.sh"), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("test/robust_accuracy ") == 2
    assert run.stdout.count("test/fid ") >= 2
