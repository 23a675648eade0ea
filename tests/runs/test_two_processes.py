"""Two processes that are killed or get a signal: none hangs, and the run goes on bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs.small_runs import ROOT, command, differences, last, state

# Several runs of two processes: minutes on a busy machine.
pytestmark = [pytest.mark.ddp, pytest.mark.timeout(1800)]
ARGS = [*command(2), "--trainer.devices=2", "--trainer.strategy=ddp"]
KILL, TERM = 9, 15


def start(folder: Path, moment: tuple[str, int, int] | None = None, ranks: str = "") -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MOMENT_RANKS": ranks}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.runs.lives", *ARGS],
        cwd=folder,
        env={**env, "MOMENT": json.dumps(moment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Returns status and output; a process group that hangs fails here."""
    said, _ = process.communicate(timeout=600)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    status, said = end(start(folder))
    assert status == 0, said
    return folder


# With one rank per attack of Stage 2, the 20th is in the second epoch at the latest.
@pytest.mark.parametrize(
    ("moment", "ranks", "signum", "statuses"),
    [
        # The rank that does not save, in the middle of a step; nobody tells the other one.
        pytest.param(("attack", 20), "1", TERM, {143}, marks=pytest.mark.slow),
        pytest.param(("attack", 20), "0", TERM, {143}, marks=pytest.mark.slow),
        pytest.param(("attack", 20), "01", TERM, {143}, marks=pytest.mark.slow),
        pytest.param(("validation", 2), "0", TERM, {143}, marks=pytest.mark.slow),
        pytest.param(("validation", 2), "1", TERM, {143}, marks=pytest.mark.slow),
        pytest.param(("sampling", 2), "01", TERM, {143}, marks=pytest.mark.slow),
        pytest.param(("half written", 3), "0", TERM, {143}, marks=pytest.mark.slow),
        # Lightning's observer or gloo ends the other rank.
        pytest.param(("attack", 20), "01", KILL, {137}, marks=pytest.mark.slow),
        pytest.param(("optimizer", 9), "1", KILL, {137, 1}, marks=pytest.mark.slow),
        pytest.param(("half written", 3), "0", KILL, {137}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_end_and_go_on_bit_for_bit(
    moment: tuple[str, int], ranks: str, signum: int, statuses: set[int], whole: Path, tmp_path: Path
) -> None:
    status, said = end(start(tmp_path, (*moment, signum), ranks))
    assert status in statuses, said
    if signum == TERM:
        assert said.count("stopped by SIGTERM after step ") == 1
        step = torch.load(tmp_path / "checkpoints" / "interrupted.ckpt", weights_only=True)["global_step"]
        assert 0 < step < 18
    status, said = end(start(tmp_path))
    assert status == 0, said
    assert differences(state(last(whole)), state(last(tmp_path))) == []
