"""Runs that are killed with SIGKILL go on from their newest checkpoint as if nothing had happened, bit for bit."""

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.runs.lives import Lives
from tests.runs.moments import MOMENTS
from tests.runs.small_runs import STEPS, best_fid, command, differences, last, logs, scalars, state

pytestmark = pytest.mark.timeout(1200)
KILLED = 137
Whole = Callable[[int], tuple[Path, float]]


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    with Lives() as server:
        yield server


@pytest.fixture(scope="module")
def whole(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The uninterrupted run of a stage, made when it is asked for: folder and seconds."""

    @cache
    def run(stage: int) -> tuple[Path, float]:
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        life = lives.run(folder, command(stage))
        assert life.status == 0, life.said
        assert last(folder)["global_step"] == STEPS
        return folder, life.seconds

    return run


def assert_survives(lives: Lives, whole: Path, folder: Path, stage: int, workers: int, **kill: Any) -> tuple[int, bool]:
    """Kills a run, lets it go on, and compares its end with the uninterrupted one's.

    Returns:
        The step at which it went on, and whether it was killed rather than done.
    """
    args = command(stage, workers)
    first = lives.run(folder, args, **kill)
    assert first.status in (KILLED, 0), first.said
    before = {path: path.read_bytes() for path in (folder / "checkpoints").glob("*.ckpt")}
    second = lives.run(folder, args)
    assert second.status == 0, second.said
    assert differences(state(last(whole)), state(last(folder))) == []
    assert best_fid(last(whole)) == best_fid(last(folder))
    expected, shown = scalars(logs(whole)[0]), scalars(logs(folder)[-1])
    shown = {key: values for key, values in shown.items() if key in expected}
    assert {key: expected[key] for key in shown} == shown
    went_on = min((step for _, step in shown), default=STEPS)
    if before and first.status == KILLED:
        assert went_on >= 4, "a checkpoint was there, but the run started anew"
        assert f"is {folder}" in second.said
    return went_on, first.status == KILLED


# Stage 1 has one attack per step, of two evaluations; Stage 2 has T more. Three saves: recent, best_fid, last, …
@pytest.mark.parametrize(
    ("stage", "workers", "moment", "count"),
    [
        (1, 2, "optimizer", 8),
        pytest.param(1, 0, "half written", 4, marks=pytest.mark.slow),
        pytest.param(2, 0, "attack", 19, marks=pytest.mark.slow),
        pytest.param(2, 2, "unnamed", 3, marks=pytest.mark.slow),
        pytest.param(2, 0, "sampling", 4, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    stage: int,
    workers: int,
    moment: str,
    count: int,
    lives: Lives,
    whole: Whole,
    tmp_path: Path,
) -> None:
    went_on, killed = assert_survives(lives, whole(stage)[0], tmp_path, stage, workers, moment=(moment, count, 9))
    assert killed
    assert went_on < STEPS


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_killed_at_twenty_moments_goes_on_bit_for_bit(
    stage: int, lives: Lives, whole: Whole, tmp_path: Path
) -> None:
    folder, seconds = whole(stage)
    chance = random.Random(stage)
    steps = set()
    for k in range(20):
        workers = 2 * (k % 2)
        if k < 2 * len(MOMENTS):
            count, killed = chance.randint(2, 8), False
            while not killed:  # so often it does not happen in a run
                moment = (MOMENTS[k // 2], count, 9)
                step, killed = assert_survives(lives, folder, tmp_path / f"{k}-{count}", stage, workers, moment=moment)
                count -= 1
        else:
            after, killed = chance.uniform(0.3, 1.0) * seconds, False
            while not killed:  # a run that was done before is no kill
                step, killed = assert_survives(lives, folder, tmp_path / f"{k}-{after}", stage, workers, after=after)
                after *= 0.7
        assert killed
        steps.add(step)
    assert len(steps) >= 4
