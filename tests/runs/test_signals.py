"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint, a status that says so, and a second life that loses nothing."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from dat_lightning.runs.signal_checkpoint import _mark_restart
from tests.runs.lives import Life, Lives
from tests.runs.small_runs import STEPS, command, differences, last, logs, scalars, state

pytestmark = pytest.mark.timeout(1200)
INT, USR1, TERM = 2, 10, 15
Scalars = dict[tuple[str, int], list[float]]


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    with Lives() as server:
        yield server


@pytest.fixture(scope="module")
def whole(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert lives.run(folder, command(2)).status == 0
    return folder


def sentence(life: Life) -> str:
    (line,) = [line for line in life.said.splitlines() if line.startswith("dat-lightning: ")]
    assert "Traceback" not in life.said
    return line.removeprefix("dat-lightning: ")


def assert_shown(shown: Scalars, expected: Scalars, stopped: int) -> None:
    """All steps are shown, each once; but not the training step that was the last, which Lightning logs too late."""
    missing = expected.keys() - shown.keys()
    assert {step for _, step in missing} <= {stopped - 1}
    assert all(tag.startswith("train/") for tag, _ in missing)
    assert shown == {key: value for key, value in expected.items() if key not in missing}
    assert all(len(values) == 1 for values in shown.values())


# The 20th call of the attack is in a step in the middle of an epoch, the 3rd batch of validation is the second epoch's
# first, and the 2nd save is at the end of the first epoch.
@pytest.mark.parametrize(
    ("signum", "moment", "count", "status", "name"),
    [
        pytest.param(TERM, "attack", 20, 143, "SIGTERM", marks=pytest.mark.slow),
        (TERM, "validation", 3, 143, "SIGTERM"),
        pytest.param(INT, "half written", 3, 130, "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(
    signum: int, moment: str, count: int, status: int, name: str, lives: Lives, whole: Path, tmp_path: Path
) -> None:
    first = lives.run(tmp_path, command(2), moment=(moment, count, signum))
    assert first.status == status, first.said
    path = tmp_path / "checkpoints" / "interrupted.ckpt"
    step = torch.load(path, weights_only=True)["global_step"]
    assert sentence(first) == f"stopped by {name} after step {step}, not done; to go on: --ckpt_path {path}"
    assert 0 < step < STEPS
    second = lives.run(tmp_path, [*command(2)[:-1], f"--ckpt_path={path}"])
    assert second.status == 0, second.said
    assert differences(state(last(whole)), state(last(tmp_path))) == []
    # Each life has its folder of events. Every step and every validation is in one of them: a validation that was
    # interrupted is made again, no other is. Only the curve's point of the step that was the last is missing.
    lived = [scalars(folder) for folder in logs(tmp_path)]
    assert len(lived) == 2
    assert not lived[0].keys() & lived[1].keys()
    assert_shown({**lived[0], **lived[1]}, scalars(logs(whole)[0]), step)


@pytest.fixture
def slurm(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """Variables of a job of one task, with a scontrol that writes down its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    said = tmp_path / "scontrol.txt"
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {said}\n[ ! -e {tmp_path}/refuse ]\n', encoding="utf-8")
    program.chmod(0o755)
    job = {"JOB_ID": "4711", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "dat"}
    path = f"{folder}:{os.environ['PATH']}"
    return {**{f"SLURM_{name}": value for name, value in job.items()}, "SLURM_NTASKS_PER_NODE": "1", "PATH": path}, said


@pytest.mark.parametrize(
    ("signum", "moment", "count", "status", "requeued"),
    [
        (USR1, "attack", 20, 138, True),
        pytest.param(USR1, "sampling", 4, 138, True, marks=pytest.mark.slow),
        pytest.param(TERM, "optimizer", 7, 143, False, marks=pytest.mark.slow),
    ],
)
def test_a_slurm_job_is_put_back_into_the_queue_and_goes_on_by_itself(
    signum: int,
    moment: str,
    count: int,
    status: int,
    requeued: bool,
    lives: Lives,
    whole: Path,
    slurm: tuple[dict[str, str], Path],
    tmp_path: Path,
) -> None:
    env, said = slurm
    # No --ckpt_path: the batch script is the same in every life.
    args = [*command(2)[:-1], "--trainer.logger.init_args.version=4711"]
    folder = tmp_path / "job"
    first = lives.run(folder, args, moment=(moment, count, signum), env=env)
    assert first.status == status, first.said
    assert (folder / "root" / "hpc_ckpt_1.ckpt").is_file()
    assert said.exists() is requeued
    if requeued:
        assert said.read_text() == "requeue 4711\n"
        assert "the job is in the queue again and goes on from " in sentence(first)
    second = lives.run(folder, args, env=env)
    assert second.status == 0, second.said
    assert differences(state(last(whole)), state(last(folder))) == []
    # Both lives share the folder of events; no step is shown twice.
    (events,) = logs(folder)
    step = torch.load(folder / "root" / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"]
    assert_shown(scalars(events), scalars(logs(whole)[0]), step)


def test_a_job_that_cannot_be_requeued_trains_on(
    lives: Lives, whole: Path, slurm: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    env, said = slurm
    (tmp_path / "refuse").touch()
    life = lives.run(tmp_path / "job", command(2)[:-1], moment=("attack", 20, USR1), env=env)
    assert life.status == 0
    assert said.read_text() == "requeue 4711\n"
    assert re.search("the job could not be put back into Slurm's queue; training goes on", life.said)
    assert differences(state(last(whole)), state(last(tmp_path / "job"))) == []


@pytest.mark.slow
def test_a_killed_slurm_job_does_not_go_back_to_an_older_signal(
    lives: Lives, slurm: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    """Lightning would go on from hpc_ckpt_1 although training has saved a newer checkpoint since."""
    env, _ = slurm
    args, folder = command(1)[:-1], tmp_path / "job"
    assert lives.run(folder, args, moment=("optimizer", 5, USR1), env=env).status == 138
    assert lives.run(folder, args, moment=("optimizer", 12, 9), env=env).status == 137
    third = lives.run(folder, args, env=env)
    assert third.status == 0
    assert f"--ckpt_path last is {folder / 'checkpoints'}" in third.said


def test_what_an_earlier_life_logged_after_the_checkpoint_is_not_shown(tmp_path: Path) -> None:
    """Its steps 5 and 6 came after the checkpoint from which the second life goes on with step 5."""
    for value, steps in ((1.0, range(7)), (2.0, range(5, 9))):
        tensorboard = TensorBoardLogger(tmp_path, name="logs", version=0)
        if value == 2.0:
            _mark_restart(tensorboard, 5)
        for step in steps:
            tensorboard.log_metrics({"train/loss": value}, step)
        tensorboard.finalize("success")
        time.sleep(1.1)  # files are read in the order of the seconds in their names
    expected = {("train/loss", step): [1.0 if step < 5 else 2.0] for step in range(9)}
    assert scalars(tmp_path / "logs" / "version_0") == expected
