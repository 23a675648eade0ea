"""The studies that ship: the command line takes all of them, and Snakemake runs them, also after kill -9."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dat_lightning import AutoAttack, evaluation
from dat_lightning.cli import DATCLI
from dat_lightning.pages.study_file import Study, read_study
from tests.frozen.record import ROOT
from tests.program import program

STUDIES = ROOT / "configs" / "studies"
PAPER = ("counterfactuals", "implicit_r1", "ood_sensitivity", "trade_off")
NAMES = [f"{folder}/{name}" for folder in ("cifar10_small", "digits") for name in PAPER]
NAMES += ["digits/soak", "digits/speed", "digits/rivals", "digits/ratio", "cifar10_small/precision"]
NAMES += ["digits/implicit_r1_search", "digits/implicit_r1_deeper", "digits/rare", "density/plane", "digits/cost"]
NAMES += ["digits/rivals_tuning", "digits/editing"]
NAMES += [f"cifar10_cpu/{name}" for name in ("ablations", "half_cost", "editing")]

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")


class Parsing(DATCLI):
    """The command line, up to where it would make anything."""

    def instantiate_classes(self) -> None:
        pass


@lru_cache(maxsize=1)
def parser() -> Any:
    """The command line's parser, which takes seconds to make."""
    return program("--config", str(ROOT / "configs" / "digits" / "stage1.yaml"), kind=Parsing).parser


def parsed(arguments: str) -> Any:
    given = [a for a in shlex.split(arguments) if not a.startswith("--ckpt_path=")]
    return parser().parse_args(given).as_dict()


def callbacks_of(config: Any) -> dict[str, Any]:
    return {c["class_path"].rpartition(".")[2]: c.get("init_args", {}) for c in config["trainer"]["callbacks"]}


@pytest.mark.parametrize(
    "name",
    [
        n
        if n in ("digits/trade_off", "digits/counterfactuals", "digits/rivals")
        else pytest.param(n, marks=pytest.mark.slow)
        for n in NAMES
    ],
)
def test_the_command_line_takes_all_of_a_study_and_measures_what_it_shows(name: str) -> None:
    study = read_study(STUDIES / f"{name}.yaml")
    trainings = {*study.bases, *(variant.folder for variant in study.variants)}
    tested: Any = None
    for training in sorted(trainings):
        folder = f"out/{study.folder(training, 0)}"
        config = parsed(study.fit_arguments(training, 0, "out"))
        assert config["trainer"]["default_root_dir"] == folder
        saver = callbacks_of(config)["ModelCheckpoint"]
        assert f"{saver['dirpath']}/{saver['filename']}.ckpt" == f"{folder}/checkpoints/last.ckpt"
        parent = study.parent(training, 0)
        start = config["model"]["init_args"].get("init_from")
        assert start == (None if parent is None else f"out/{parent}/checkpoints/last.ckpt")
        assert config["model"]["init_args"]["seed"] == config["seed_everything"] == 0
    for variant in study.variants:
        tested = parsed(study.test_arguments(variant.folder, 1, "out"))
        folder = f"out/{study.folder(variant.folder, 1)}"
        assert tested["trainer"]["default_root_dir"] == folder
        report = callbacks_of(tested)["EvaluationReport"]
        assert report["path"] in (None, f"{folder}/evaluation.json")  # by default in the run's folder
    shown = {column.figure for column in study.columns} | {plot.figure for plot in study.plots}
    shown |= {plot.x for plot in study.plots if plot.x is not None}
    assert shown <= measured(study, callbacks_of(tested))


def measured(study: Study, callbacks: dict[str, Any]) -> set[str]:
    """Names of the figures that callbacks, and the curves of a study, give."""
    known = {*study.curves, *(f"max {name}" for name in study.curves), "accuracy", "robust_accuracy", "train/seconds"}
    if "SampleMetrics" in callbacks:
        known |= {"fid", "fid num_steps", "precision", "recall"}
    if "LabelAgreement" in callbacks:
        known.add("label_agreement")
    for t in callbacks.get("RobustAccuracy", {}).get("threat_models", []):
        known.add(f"robust_accuracy_{t['norm']}_{t['eps']:g}_{t['num_steps']}x{t['step_size']:g}")
    for score in callbacks.get("OODDetection", {}).get("scores", []):
        known |= {f"ood_auroc_held_out_{score}{end}" for end in ("", "_attacked")}
    if "RelativeDensity" in callbacks:
        known |= {"rank_correlation", "rank_correlation_balanced", "rank_correlation_within"}
        for share in ("1", "0.1", "0.01"):
            known |= {f"{what}_share_{share}" for what in ("score", "class_score", "accuracy", "rarity_auroc")}
    if "Landscape" in callbacks:
        known |= {"kl", "energy_scale", "mass_off_support"}
    if "SampleSupport" in callbacks:
        known.add("sample_support")
    if "AutoAttack" in callbacks:
        known.add(AutoAttack(**callbacks["AutoAttack"]).name)
    if "Calibration" in callbacks:
        known.add("ece")
    for task in callbacks.get("Editing", {}).get("tasks", []):
        made = getattr(evaluation, task["class_path"].rpartition(".")[2])(**task["init_args"])
        endings = [f"{measure}_{label}" for measure in ("psnr", "agreement") for label in ("known", "unknown")]
        known |= {f"edit_{made.name}_{ending}" for ending in endings}
    search = callbacks.get("Counterfactuals", {})
    needed = {"plausibility": "judge", "fid": "extractor"}
    what = ["success", "confidence", *(name for name, part in needed.items() if search.get(part))]
    for eps in search.get("eps", []):
        known |= {f"counterfactual_{name}_uniform{end}" for name in what for end in ("", f"_eps{eps:g}")}
    return known


def test_the_features_of_small_cifar_are_those_that_the_study_trains() -> None:
    study = read_study(STUDIES / "cifar10_small" / "trade_off.yaml")
    (metrics,) = (
        callbacks_of(parsed(study.test_arguments(variant.folder, 1, "out")))["SampleMetrics"]
        for variant in study.variants[:1]
    )
    init_from = metrics["extractor"]["init_args"]["init_from"]
    assert study.evaluation.after == ["features"]
    assert os.path.normpath(init_from) == f"out/{study.folder('features', 1)}/checkpoints/last.ckpt"


# What Snakemake makes of it.

SMALL = {
    "model": {"init_args": {"energy_model": {"init_args": {"backbone": {"init_args": {"widths": [4, 8]}}}}}},
    "data": {"init_args": {"batch_size": 32, "num_ood": 100, "num_held_out": 40}},
    "trainer": {"limit_train_batches": 20, "limit_test_batches": 1},
}


def snakemake(folder: Path, *arguments: str) -> list[str]:
    pytest.importorskip("snakemake", reason="needs pip install 'dat-lightning[studies]'")
    command = [sys.executable, "-m", "snakemake", "-s", str(STUDIES / "Snakefile"), "--cores", "1"]
    return [*command, *arguments, "--config", "study=study.yaml", f"out={folder.name}"]


def run(folder: Path, *arguments: str) -> str:
    """Runs Snakemake in the folder above, to its end; returns what it said."""
    command = snakemake(folder, *arguments)
    done = subprocess.run(
        command, cwd=folder.parent, env=environment(), capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    # Set by Lightning in this process once anything was trained.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def small_study(folder: Path, epochs: int) -> None:
    """A study of Stage 2 on Stage 1 of the digits, small, with the files of those that ship."""
    digits = ROOT / "configs" / "digits", STUDIES / "digits"
    write = {
        "small.yaml": SMALL,
        "small_evaluation.yaml": {
            "base": str(STUDIES / "digits" / "evaluation.yaml"),
            "trainer": {
                "callbacks": {
                    "PGDSampler": {"num_samples": 20, "num_steps": [1, 2]},
                    "SampleMetrics": {"metrics": ["fid"]},
                }
            },
        },
        "study.yaml": {
            "title": "A small study",
            "question": "Does it go on?",
            "bases": {
                stage: {
                    "configs": [*(str(place / f"{stage}.yaml") for place in digits), "small.yaml"],
                    "arguments": {"trainer.max_epochs": epochs},
                    **({"init_from": "stage1"} if stage == "stage2" else {}),
                }
                for stage in ("stage1", "stage2")
            },
            "variants": [
                {"name": "Stage 1", "base": "stage1"},
                {"name": "T 2", "base": "stage2", "arguments": {"model.curriculum.max_steps": 2}},
            ],
            "evaluation": {"configs": ["small_evaluation.yaml"]},
            "columns": [{"figure": "fid", "words": "distance"}],
            "plots": [{"name": "sweep", "kind": "steps", "figure": "fid"}],
        },
    }
    for name, contents in write.items():
        (folder / name).write_text(yaml.safe_dump(contents, sort_keys=False), encoding="utf-8")


@pytest.mark.parametrize("executor", [pytest.param("local", marks=pytest.mark.slow), "slurm"])
def test_a_dry_run_lists_what_there_is_to_do(executor: str, tmp_path: Path) -> None:
    pytest.importorskip("snakemake", reason="needs pip install 'dat-lightning[studies]'")
    if executor == "slurm":
        pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs snakemake-executor-plugin-slurm")
    small_study(tmp_path, 1)
    said = run(tmp_path / "out", "--dry-run", "--printshellcmds", "--executor", executor, "--jobs", "2")
    assert {m[1]: int(m[2]) for m in re.finditer(r"^(\w+) +(\d+)$", said, re.MULTILINE)} == {
        "train": 2,
        "test": 2,
        "page": 1,
        "all": 1,
        "total": 6,
    }
    study = read_study(Path(os.path.relpath(tmp_path / "study.yaml")))
    assert "--model.init_from=out/stage1/seed0/checkpoints/last.ckpt" in said
    assert said.count("--ckpt_path=last") == 2
    assert study.digest("T_2", 0) in said
    assert not (tmp_path / "out" / "T_2").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_after_kill_9_finished_runs_are_kept_and_the_interrupted_one_goes_on(tmp_path: Path) -> None:
    """Killed in Stage 2 with all its processes, it ends bit for bit as the study that was not."""
    small_study(tmp_path, 10)
    run(tmp_path / "whole")
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        snakemake(killed), cwd=tmp_path, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    last = killed / "T_2" / "seed0" / "checkpoints" / "last.ckpt"
    while not last.is_file():
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    epoch = torch.load(last, weights_only=True)["epoch"]
    assert epoch < 9
    first = killed / "stage1" / "seed0" / "checkpoints" / "last.ckpt"
    before = first.stat().st_mtime_ns
    run(killed)
    assert first.stat().st_mtime_ns == before
    log = (killed / "logs" / "T_2-seed0-fit.txt").read_text()
    assert "--ckpt_path last is " in log
    assert "starts anew" not in log
    one, two = (torch.load(p / "T_2" / "seed0" / "checkpoints" / "last.ckpt") for p in (tmp_path / "whole", killed))
    assert one["global_step"] == two["global_step"] == 200
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, two["state_dict"][name]), name
    tables = [(folder / "table.md").read_text() for folder in (tmp_path / "whole", killed)]
    assert tables[0] == tables[1]
    assert "Nothing to be done" in run(killed)
    # Another setting is another training, from its beginning; what does not depend on it is kept.
    study = yaml.safe_load((tmp_path / "study.yaml").read_text())
    study["variants"][1]["arguments"]["model.curriculum.max_steps"] = 1
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    run(killed)
    assert first.stat().st_mtime_ns == before
    assert "starts anew" in (killed / "logs" / "T_2-seed0-fit.txt").read_text()
