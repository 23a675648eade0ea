"""Bad conditions, each through the command line: a sentence or a defined result, and nothing is lost."""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from dat_lightning import DualAdversarialModule
from dat_lightning.cli import main
from dat_lightning.data import ImageFolder
from dat_lightning.training import load_post_mortem
from dat_lightning.weights.files import written_whole
from tests.recipes import write_folders
from tests.reliability.conditions import ROOT, STAGE1, STAGE2, TINY, Keeps, dataset, write_config, write_modes
from tests.test_cli import refusal

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning"),
    pytest.mark.filterwarnings("ignore:neither --ckpt_path nor model.init_from:UserWarning"),
    pytest.mark.filterwarnings("ignore:checkpoints of an earlier run:UserWarning"),
]

KEEPS = "--trainer.callbacks+=tests.reliability.conditions.Keeps"
PIXELS, DYING, REMOVES = (f"tests.reliability.conditions.{name}" for name in ("Pixels", "Dying", "Removes"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses to write further, as it does when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_path(old: str, new: Path) -> str:
    """The tiny configuration with one path replaced."""
    text = Path(TINY).read_text(encoding="utf-8")
    assert old in text
    Path("other.yaml").write_text(text.replace(old, str(new)), encoding="utf-8")
    return "other.yaml"


# Disks and folders. A file where a folder should be stops root as well, whom permissions do not.


@pytest.mark.parametrize(
    "what",
    [
        "logger",
        "checkpoints",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("root", "cache", "grids", "samples")),
    ],
)
def test_a_folder_that_cannot_be_written_is_a_sentence(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    command, config, args = "fit", TINY, list[str]()
    if what == "logger":
        args = [f"--trainer.logger.init_args.save_dir={taken}/logs"]
    elif what == "root":
        args = [f"--trainer.default_root_dir={taken}/root", "--trainer.logger=false"]
    elif what == "cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(taken))
    else:
        command, config = "predict" if what == "samples" else "fit", with_path(f"runs/{what}", taken / what)
    said = refusal(capsys, command, "--config", STAGE2, "--config", config, *args)
    assert said.startswith(f"{taken}/")
    assert said.endswith(": Not a directory")


@pytest.mark.parametrize(
    ("size", "named"),
    [
        (2_000, ""),
        pytest.param(30_000, r"reference-\w+\.npz: ", marks=pytest.mark.slow),
        pytest.param(40_000, r"last\.ckpt: ", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_is_a_sentence_and_leaves_no_halves(
    size: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the configuration, in the cache, in the checkpoint; the checkpoint before is still whole."""
    args = ["--config", STAGE1, "--config", TINY]
    if "ckpt" in named:
        main(["fit", *args])
        args += ["--ckpt_path", "runs/checkpoints/last.ckpt", "--trainer.max_epochs=2"]
    with files_no_larger_than(size):
        said = refusal(capsys, "fit", *args)
    message = "a file could not be written: File too large; what was written whole before is still there"
    assert re.search(rf"(^|/){named}{message}$", said)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list((tmp_path / "cache").rglob("*.npz")) or "ckpt" in named
    if "ckpt" in named:
        assert torch.load("runs/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
        main(["fit", *args])
        assert torch.load("runs/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_a_file_system_that_fills_up_ends_the_run_with_its_last_checkpoint_whole(tmp_path: Path) -> None:
    """A real one, of 115 kB: it takes the first checkpoint, and some later file no more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=115k none {disk} && $0 "$@"']
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    args = ["fit", "--config", STAGE1, "--config", TINY, "--trainer.max_epochs=6", "--trainer.logger=false"]
    # What is left there goes away with the mount.
    script = f"cd {disk}; {sys.executable} -m dat_lightning {' '.join(args)}; s=$?; cp -r runs {tmp_path}; exit $s"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*mount, "sh", "-c", script], env=env, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        pytest.fail("the file system was not small enough")
    assert run.returncode == 1, run.stderr[-2000:]
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("dat-lightning: error: ")
    assert "No space left on device" in run.stderr.splitlines()[-1]
    saved = torch.load(tmp_path / "runs" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 2 <= saved["global_step"] < 12


def test_what_is_written_whole_names_its_file_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="File too large") as caught, files_no_larger_than(10), written_whole(path) as f:
        f.write(b"x" * 100_000)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


# Processes and folders that go away.


def test_a_loader_process_that_is_killed_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, train=dataset(DYING, size=40), num_workers=1)
    said = refusal(capsys, "fit", "--config", config)
    assert said.startswith("a loader process (pid ")
    assert "lower data.num_workers" in said
    assert said.endswith("with --ckpt_path")


@pytest.mark.parametrize(
    ("folder", "num_workers", "stream"),
    [
        ("ood", 0, "ood"),
        pytest.param("ood", 1, "held-out seeds", marks=pytest.mark.slow),
        pytest.param("train", 0, "gen", marks=pytest.mark.slow),
    ],
)
def test_a_folder_that_vanishes_in_mid_run_is_a_sentence(
    folder: str, num_workers: int, stream: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a loader process batches are ahead of the training: what misses its images first is the sampling."""
    removes = {"class_path": REMOVES, "init_args": {"path": str(tmp_path / folder)}}
    config = write_config(tmp_path, callbacks=[removes], num_workers=num_workers)
    said = refusal(capsys, "fit", "--config", config)
    assert said.startswith(f"the images of the '{stream}' stream cannot be read: 100 in a row failed, the last one")
    assert said.endswith("No such file or directory")
    assert str(tmp_path / folder) in said


# Settings at their limits, and beyond those of other people's classes.


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.optimizer.init_args.lr=-1", "the optimizer cannot be made as configured: Invalid learning rate: -1"),
        ("model.lr_scheduler.init_args.total_steps=-3", "the learning rate schedule cannot be made as configured: "),
        ("model.init_args.threat_model=[]", "a list stands where settings with names belong"),
    ],
)
def test_what_a_library_refuses_is_a_sentence(setting: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    *path, last = setting.split("=")[0].split(".")
    config = yaml.safe_load(Path(STAGE1).read_text(encoding="utf-8"))
    entry = config
    for name in path:
        entry = entry["init_args"][name] if name not in entry else entry[name]
    entry[last] = yaml.safe_load(setting.split("=")[1])
    Path("wrong.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert refusal(capsys, "fit", "--config", "wrong.yaml").startswith(said)


def test_a_data_set_smaller_than_a_batch_is_gone_through_several_times(tmp_path: Path) -> None:
    """40 images, batches of 64: an epoch is one batch, and no image comes twice before all came once."""
    seen: list[Tensor] = []
    config = write_config(tmp_path, train=dataset(PIXELS, size=40), batch_size=64, augmentation="imagenet")
    original = DualAdversarialModule.training_step

    def spy(self: DualAdversarialModule, batch: Any, batch_idx: int) -> Tensor:
        seen.append(batch["y_gen"])
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DualAdversarialModule, "training_step", spy)
        main(["fit", "--config", config, KEEPS])
    (labels,) = seen
    assert len(labels) == 64
    assert labels[:40].bincount().tolist() == [4] * 10
    assert Keeps.moved
    assert Keeps.finite


def test_with_eps_0_robust_accuracy_is_accuracy() -> None:
    none = ["--model.threat_model.eps=0", "--model.eval_threat_model.eps=0", "--trainer.limit_val_batches=3"]
    main(["fit", "--config", STAGE2, "--config", TINY, *none, KEEPS])
    assert Keeps.figures["val/robust_accuracy"] == Keeps.figures["val/accuracy"] > 0
    assert Keeps.moved
    assert Keeps.finite


def test_with_t_0_for_ever_the_seeds_themselves_are_the_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    original = DualAdversarialModule.contrastive_samples

    def spy(self: DualAdversarialModule, x_ood: Tensor, y_gen: Tensor, draws: Tensor | None = None) -> Tensor:
        result = original(self, x_ood, y_gen, draws)
        assert torch.equal(result, x_ood)
        return result

    monkeypatch.setattr(DualAdversarialModule, "contrastive_samples", spy)
    never = ["--model.curriculum.max_steps=0", "--trainer.max_epochs=3"]
    main(["fit", "--config", STAGE2, "--config", TINY, *never, KEEPS])
    assert Keeps.figures["train/contrastive_steps"] == 0
    assert Keeps.moved


def test_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One class of images with one logit trains as an energy alone; with ten classes of images it is a sentence."""
    write_folders(tmp_path / "single", 1, 30, (16, 16), seed=0)
    config = write_config(tmp_path, classes=1, train=dataset("LabelledFolder", root=str(tmp_path / "single")))
    main(["fit", "--config", config, KEEPS])
    assert Keeps.figures["train/classification_loss"] == 0
    assert Keeps.figures["val/accuracy"] == 1
    assert Keeps.moved
    assert Keeps.finite
    said = refusal(capsys, "fit", "--config", STAGE2, "--config", TINY, "--model.energy_model.backbone.num_classes=1")
    assert said.startswith("the network has 1 logits, but y_gen has labels 0 … 9: set the backbone's num_classes")


# Images.


def test_images_of_every_mode_are_read_alike_and_train(tmp_path: Path) -> None:
    for k in range(2):
        expected = write_modes(tmp_path / "modes" / f"class{k}")
    images = ImageFolder(tmp_path / "modes" / "class0")
    read = {Path(images.name(k)).stem: np.asarray(images[k]) for k in range(len(images))}
    assert read.keys() == expected.keys()
    for mode, image in read.items():
        np.testing.assert_array_equal(image, expected[mode], err_msg=mode)
    folder = dataset("LabelledFolder", root=str(tmp_path / "modes"))
    main(["fit", "--config", write_config(tmp_path, classes=2, train=folder), KEEPS])
    assert Keeps.moved
    assert Keeps.finite


@pytest.mark.slow
def test_images_of_another_size_are_cropped_and_resized(tmp_path: Path) -> None:
    for k, size in enumerate([(16, 16), (7, 30), (200, 11), (1, 1)]):
        write_folders(tmp_path / "sizes" / str(k), 2, 5, size, seed=k)
    folders = [tmp_path / "all" / f"class{k}" for k in range(2)]
    for k, folder in enumerate(folders):
        for n in range(4):
            shutil.copytree(tmp_path / "sizes" / str(n) / f"class{k}", folder / str(n))
    folder_set = dataset("LabelledFolder", root=str(tmp_path / "all"))
    for augmentation in ("cifar", "imagenet"):
        config = write_config(tmp_path / augmentation, classes=2, train=folder_set, augmentation=augmentation)
        main(["fit", "--config", config, KEEPS])
        assert Keeps.moved
        assert Keeps.finite


def test_images_of_other_channels_than_the_network_s_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "fit", "--config", write_config(tmp_path), "--model.energy_model.backbone.in_channels=1")
    assert said.startswith("the network's first convolution takes 1 channels, but the data's images are 3×16×16 ")
    assert said.endswith("set the backbone's in_channels, and mean and std, to those of the data")


def test_images_too_small_for_the_network_keep_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Output size is too small"):
        main(["fit", "--config", write_config(tmp_path, image_size=1)])


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_nan_pixels_in_training_are_skipped_and_kept(tmp_path: Path) -> None:
    train = dataset(PIXELS, size=40, bad=True)
    config = write_config(tmp_path, train=train, test=dataset(PIXELS, size=40), augmentation="imagenet")
    main(["fit", "--config", config, KEEPS, "--trainer.max_epochs=2"])
    assert Keeps.finite
    assert Keeps.moved
    assert Keeps.figures["train/skipped_steps"] >= 1
    assert np.isfinite(Keeps.figures["val/loss"])
    files = sorted(tmp_path.rglob("step*.safetensors"))
    report = load_post_mortem(files[0]).report
    assert "have NaN or infinite pixels: mend the data" in report["signatures"][0]
    (average,) = (torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.rglob("last.ckpt"))
    assert all(bool(value.isfinite().all()) for value in average.values())


def test_nan_pixels_in_evaluation_show_in_the_figures_and_touch_no_weight(tmp_path: Path) -> None:
    test = dataset(PIXELS, size=40, bad=True)
    main(["fit", "--config", write_config(tmp_path, train=dataset(PIXELS, size=40), test=test), KEEPS])
    assert np.isnan(Keeps.figures["val/loss"])
    assert Keeps.finite
