"""The scripts for clusters: they parse, agree with the configurations they name, and their commands run and resume."""

import itertools
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.frozen.record import printed

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
BATCH_SCRIPTS = sorted(EXAMPLES.glob("*.sbatch"))
SCRIPTS = [*BATCH_SCRIPTS, EXAMPLES / "torchrun.sh"]

SMALL = [
    *("--model.init_args.threat_model.num_steps=1", "--data.init_args.num_workers=0"),
    *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.sync_batchnorm=false"),
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=0"),
]


def options(script: Path) -> dict[str, str]:
    """The options on the lines for sbatch."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", script.read_text(), re.MULTILINE)
    return dict(lines)


def fragment(script: Path) -> dict[str, Any]:
    """The Trainer's settings that a script adds to a recipe."""
    (name,) = set(re.findall(r"configs/trainer/\w+\.yaml", script.read_text().split("set -euo pipefail")[1]))
    trainer: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())["trainer"]
    return trainer


def program(folder: Path, name: str, content: str) -> None:
    """Writes a program that takes the place of one of that name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{content}\n")
    (folder / name).chmod(0o755)


def run(
    script: Path,
    *arguments: str,
    folder: Path,
    instead: str = f'exec {sys.executable} -m dat_lightning "$@"',
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a script in a folder that has the project's configurations, with programs of ``folder/bin`` first."""
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    program(folder / "bin", "dat-lightning", instead)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [str(script), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_started(script: Path) -> None:
    assert len(BATCH_SCRIPTS) == 2
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & stat.S_IXUSR
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize("script", BATCH_SCRIPTS, ids=lambda path: path.name)
def test_what_slurm_starts_is_what_the_trainer_expects(script: Path) -> None:
    asked, trainer = options(script), fragment(script)
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == trainer["devices"]
    assert trainer["accelerator"] == "gpu"
    assert trainer["strategy"] == "ddp"
    assert trainer["sync_batchnorm"] is True
    # Lightning refuses --ntasks, and a signal for the shell alone would not reach the processes of srun.
    assert "ntasks" not in asked
    assert re.fullmatch(r"SIGUSR1@\d+", asked["signal"])
    assert {"requeue", "time", "output"} <= asked.keys()
    assert asked["open-mode"] == "append"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_recipes_batches_can_be_shared(script: Path) -> None:
    """By as many processes as the script starts, for the recipe that its first lines name."""
    text = script.read_text()
    named = set(re.findall(r"configs/(?!trainer)\w+/\w+\.yaml", text))
    assert bool(named) == (script in BATCH_SCRIPTS)
    for name in named:
        recipe = printed(ROOT / name)
        asked = options(script)
        assert recipe["data"]["init_args"]["batch_size"] % (int(asked["nodes"]) * int(asked["ntasks-per-node"])) == 0


# What srun does for one of the tasks, and how the log tells that it did.
SRUN = (
    '[ "$1" = --kill-on-bad-exit=1 ] || exit 3\nshift\nexport SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0\nexec "$@"'
)
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "dat",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}


@pytest.mark.slow  # six starts of the program
def test_a_job_trains_and_its_next_life_goes_on(tmp_path: Path) -> None:
    """The script for one machine, in Slurm's environment, on as much of a machine as there is."""
    program(tmp_path / "bin", "srun", SRUN)
    # The fragment's own figures are for eight GPUs; a later file wins over it only if the script lets it.
    script = tmp_path / "one.sbatch"
    text = (EXAMPLES / "one_node.sbatch").read_text()
    assert text.count("--config configs/trainer/8gpu.yaml") == 1
    (tmp_path / "cpu.yaml").write_text("trainer: {accelerator: cpu, devices: 1, num_nodes: 1}\n")
    script.write_text(text.replace("configs/trainer/8gpu.yaml", "cpu.yaml"))
    script.chmod(0o755)
    arguments = ["--config", "configs/digits/stage1.yaml", *SMALL]
    first = run(script, *arguments, folder=tmp_path, **SLURM)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "there is no checkpoint of this run yet; it starts anew" in first.stderr
    saved = tmp_path / "runs" / "slurm" / "4711" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 2
    more = [argument.replace("max_epochs=1", "max_epochs=2") for argument in arguments]
    second = run(script, *more, folder=tmp_path, **SLURM)
    assert second.returncode == 0, second.stderr[-2000:]
    assert torch.load(saved, weights_only=True)["global_step"] == 4
    assert "checkpoints/last.ckpt" in second.stderr
    # Another job of the recipe does not go on from what this one left.
    other = run(script, *arguments, folder=tmp_path, **{**SLURM, "SLURM_JOB_ID": "4712"})
    assert other.returncode == 0, other.stderr[-2000:]
    assert "there is no checkpoint of this run yet; it starts anew" in other.stderr


@pytest.mark.parametrize("script", BATCH_SCRIPTS, ids=lambda path: path.name)
def test_every_job_has_its_own_folder_of_checkpoints(script: Path, tmp_path: Path) -> None:
    """All savers of a recipe are moved there; what else has a folder keeps it."""
    recipe = printed(ROOT / "configs" / "imagenet" / "resnet50_T30.yaml")
    folders = [c["init_args"]["dirpath"] for c in recipe["trainer"]["callbacks"] if c["init_args"].get("dirpath")]
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(recipe))
    program(tmp_path / "bin", "srun", 'echo "$@"')
    said = run(script, "--model.seed=3", folder=tmp_path, instead='echo "$@" >asked; cat printed.yaml', **SLURM)
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "asked").read_text().startswith("fit --model.seed=3 --config configs/trainer/")
    job = "runs/slurm/4711"
    assert said.stdout.endswith(f" dat-lightning fit --config {job}/job.yaml --ckpt_path last\n")
    written = yaml.safe_load((tmp_path / job / "job.yaml").read_text())
    expected = [f"{job}/checkpoints" if "checkpoints" in folder else folder for folder in folders]
    assert expected.count(f"{job}/checkpoints") == 4
    callbacks = written["trainer"]["callbacks"]
    assert [c["init_args"]["dirpath"] for c in callbacks if c["init_args"].get("dirpath")] == expected


@pytest.mark.slow
def test_a_wrong_argument_ends_the_job_before_srun(tmp_path: Path) -> None:
    program(tmp_path / "bin", "srun", "exit 3")
    ended = run(
        EXAMPLES / "one_node.sbatch",
        "--config",
        "configs/digits/stage1.yaml",
        "--model.seed=x",
        folder=tmp_path,
        **SLURM,
    )
    assert ended.returncode == 2
    assert "seed" in ended.stderr


def test_torchrun_starts_as_many_processes_as_it_says(tmp_path: Path) -> None:
    program(tmp_path / "bin", "torchrun", 'echo "$OMP_NUM_THREADS" "$@"')
    script, places = (
        EXAMPLES / "torchrun.sh",
        {"NNODES": "2", "NODE_RANK": "1", "NPROC": "4", "MASTER_ADDR": "machine0"},
    )
    said = run(script, "--config", "a.yaml", "--ckpt_path=b.ckpt", folder=tmp_path, **places)
    words = said.stdout.split()
    assert words[0] == "1"
    pairs = dict(itertools.pairwise(words))
    for option, value in {"--nnodes": "2", "--node-rank": "1", "--nproc-per-node": "4"}.items():
        assert pairs[option] == value
    assert pairs["--trainer.num_nodes"] == "2"
    assert pairs["--trainer.devices"] == "4"
    assert (pairs["--master-addr"], pairs["-m"]) == ("machine0", "dat_lightning")
    # What the user gives comes last, so it wins.
    assert words[-3:] == ["--config", "a.yaml", "--ckpt_path=b.ckpt"]
    refused = run(script, folder=tmp_path, NNODES="1", NODE_RANK="1")
    assert refused.returncode == 2
    assert refused.stderr == "NODE_RANK is 1, but must be below NNODES=1\n"
