import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dat_lightning.studies import execution, plan
from dat_lightning.studies.execution import Outcome, command, execute, is_done, state_of
from dat_lightning.studies.planning import Plan, Task
from tests.studies.small import CONFIGS, contents, stand_in, study


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)


def planned(changes: dict[str, Any] | None = None, **configs: Any) -> Plan:
    return plan(study(Path.cwd(), {"seeds": [0], **(changes or {})}, **configs), Path("runs"))


def by_name(found: Plan, name: str) -> Task:
    (task,) = [task for task in found.tasks.values() if task.name == name]
    return task


def outcome(found: Plan, outcomes: dict[str, Outcome], name: str) -> Outcome:
    return outcomes[by_name(found, name).key]


def calls() -> list[list[Any]]:
    """Time, name of the folder and arguments of each call so far."""
    path = Path("calls.txt")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ignore(line: str) -> None:
    pass


def test_every_task_runs_once_after_what_it_needs_and_is_kept_in_a_second_call() -> None:
    found, said = planned(), list[str]()
    first = execute(found, 1, said.append)
    assert {o.status for o in first.values()} == {"finished"}
    order = [call[1] for call in calls()]
    assert [name.removeprefix("test-") for name in order] == list(found.tasks)
    assert said[-1] == f"[5/5] long, seed 0: test: done in {first[list(found.tasks)[-1]].seconds:.0f} s"
    again = execute(found, 1, said.append)
    assert {o.status for o in again.values()} == {"kept"}
    assert {key: round(o.seconds, 1) for key, o in first.items()} == {key: o.seconds for key, o in again.items()}
    assert len(calls()) == 5


def test_commands_are_those_of_the_command_line_and_are_written_down() -> None:
    found = planned()
    training, test = by_name(found, "short, seed 0"), by_name(found, "short, seed 0: test")
    execute(found, 1, ignore)
    config = f"{training.folder}/config.yaml"
    assert [call[2:] for call in calls() if call[1] == training.key] == [["fit", "--config", config]]
    assert [call[2:] for call in calls() if call[1] == test.folder.name] == [
        ["test", "--config", f"{test.folder}/config.yaml", "--ckpt_path", training.checkpoint.as_posix()]
    ]
    assert state_of(training)["command"] == f"dat-lightning fit --config {config}"
    log = (training.folder / "log.txt").read_text()
    assert log == f"$ dat-lightning fit --config {config}\nsome words\n"


def test_an_interrupted_training_goes_on_from_its_last_checkpoint() -> None:
    found, said = planned(), list[str]()
    training = by_name(found, "first, seed 0")
    training.checkpoint.parent.mkdir(parents=True)
    training.checkpoint.write_bytes(Path("half.ckpt").read_bytes())
    assert not is_done(training)
    execute(found, 1, said.append)
    (call,) = [call for call in calls() if call[1] == training.key]
    assert call[-2:] == ["--ckpt_path", training.checkpoint.as_posix()]
    assert "first, seed 0: started, goes on from its last checkpoint" in said


def test_a_process_that_ended_before_the_last_epoch_has_failed_and_goes_on_in_the_next_call() -> None:
    # As one does that is told to end by a signal: with status 0.
    half = {**CONFIGS["first"], "writes": "half.ckpt"}
    found = planned(first=half)
    training = by_name(found, "first, seed 0")
    outcomes = execute(found, 1, ignore)
    assert outcomes[training.key].status == "failed"
    assert outcomes[training.key].error == "it stopped after epoch 1 of 2; the same command goes on"
    Path("half.ckpt").write_bytes(Path("done.ckpt").read_bytes())
    again = execute(found, 1, ignore)
    assert {o.status for o in again.values()} == {"finished"}
    assert "--ckpt_path" in next(call for call in reversed(calls()) if call[1] == training.key)


@pytest.mark.parametrize(
    ("trainer", "ended"),
    [
        ({"max_epochs": 1}, True),
        ({"max_epochs": 3}, False),
        ({"max_steps": 2}, True),
        ({"max_steps": 3}, False),
        ({"max_epochs": -1, "max_steps": 2}, True),
        ({"max_epochs": 5, "max_steps": 2}, True),
        ({}, True),
        ({"max_epochs": 3, "callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]}, True),
    ],
)
def test_the_end_of_a_training_is_that_of_its_configuration(trainer: dict[str, Any], ended: bool) -> None:
    found = planned(first={**CONFIGS["first"], "writes": "half.ckpt", "trainer": trainer})
    assert outcome(found, execute(found, 1, ignore), "first, seed 0").done is ended


def test_a_run_that_fails_is_named_with_its_last_line_and_the_others_go_on() -> None:
    variants = [*contents()["variants"], {"name": "bad", "base": "second", "arguments": {"behave": "fail"}}]
    said: list[str] = []
    found = planned({"variants": variants[::-1]})
    outcomes = execute(found, 1, said.append)
    bad, test = by_name(found, "bad, seed 0"), by_name(found, "bad, seed 0: test")
    assert outcomes[bad.key].status == "failed"
    assert outcomes[bad.key].error == "dat-lightning: error: the learning rate is too large"
    assert outcomes[test.key] == Outcome("waiting", error="bad, seed 0 failed")
    assert [key for key, o in outcomes.items() if not o.done] == [bad.key, test.key]
    log = f"see {bad.folder}/log.txt"
    assert any("bad, seed 0: failed: dat-lightning: error: the learning rate" in line and log in line for line in said)
    # It is tried again, the others are not.
    before = len(calls())
    execute(found, 1, ignore)
    assert [call[1] for call in calls()[before:]] == [bad.key]


def test_what_starts_from_a_failed_training_waits_all_the_way_down() -> None:
    found = planned(first={**CONFIGS["first"], "behave": "fail"})
    outcomes = execute(found, 2, ignore)
    assert [o.status for o in outcomes.values()] == ["failed", "waiting", "waiting", "waiting", "waiting"]
    assert outcome(found, outcomes, "long, seed 0: test").error == "long, seed 0 failed"


def test_a_program_that_leaves_no_checkpoint_has_failed() -> None:
    found = planned(first={**CONFIGS["first"], "behave": "nothing"})
    error = outcome(found, execute(found, 1, ignore), "first, seed 0").error
    assert error.endswith("checkpoints/last.ckpt was not written: the configuration must write it")


def test_a_damaged_checkpoint_is_named() -> None:
    Path("done.ckpt").write_bytes(b"no checkpoint")
    found = planned()
    error = outcome(found, execute(found, 1, ignore), "first, seed 0").error
    assert "checkpoints/last.ckpt is damaged, delete it: " in error


def test_a_deleted_result_is_made_again() -> None:
    found = planned()
    execute(found, 1, ignore)
    test = by_name(found, "long, seed 0: test")
    test.result.unlink()
    outcomes = execute(found, 1, ignore)
    assert [key for key, o in outcomes.items() if o.status == "finished"] == [test.key]


def test_a_damaged_state_is_no_state() -> None:
    found = planned()
    execute(found, 1, ignore)
    task = by_name(found, "long, seed 0: test")
    (task.folder / "run.json").write_text("{")
    assert not is_done(task)


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_run_at_a_time_as_are_allowed(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock, original = 0, 0, threading.Lock(), execution._Workers.call

    def counted(*args: Any) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return original(*args)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(execution._Workers, "call", counted)
    slow = {**CONFIGS["second"], "behave": "slow"}
    outcomes = execute(planned(second=slow), jobs, ignore)
    assert all(o.done for o in outcomes.values())
    assert most == jobs


def test_threads_are_shared_among_jobs_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    original = subprocess.Popen

    def spy(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["env"]["OMP_NUM_THREADS"])
        return original(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", spy)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    execute(planned({"variants": contents()["variants"][:1]}), 3, ignore)
    assert set(given) == {"2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    execute(planned({"variants": contents()["variants"][1:]}), 3, ignore)
    assert given[-1] == "5"


def test_an_interrupt_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    original = subprocess.Popen

    def kept(*args: Any, **kwargs: Any) -> Any:
        started.append(original(*args, **kwargs))
        return started[-1]

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        while not calls():
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", kept)
    monkeypatch.setattr(execution, "wait", interrupt)
    found = planned(first={**CONFIGS["first"], "behave": "hang"})
    with pytest.raises(KeyboardInterrupt):
        execute(found, 1, ignore)
    assert [process.wait(60) for process in started] == [-signal.SIGTERM]
    assert not is_done(by_name(found, "first, seed 0"))


def test_an_interrupt_ends_the_waiting_for_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = planned(), list[str]()
    task = by_name(found, "first, seed 0")
    task.folder.mkdir(parents=True)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        while not said:
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "wait", interrupt)
    with (task.folder / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(KeyboardInterrupt):
            execute(found, 1, said.append)
    assert calls() == []


def test_a_process_that_was_killed_is_named_with_the_signal() -> None:
    found = planned(first={**CONFIGS["first"], "behave": "die"})
    error = outcome(found, execute(found, 1, ignore), "first, seed 0").error
    assert error == "ended by signal 9; the same command goes on"


def test_two_programs_do_not_work_on_one_run_at_a_time() -> None:
    found, said = planned({"variants": contents()["variants"][:1]}), list[str]()
    task = by_name(found, "first, seed 0")
    task.folder.mkdir(parents=True)
    ready = Path("ready").absolute()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, pathlib, sys\n"
            "file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX)\n"
            "pathlib.Path(sys.argv[2]).touch(); sys.stdin.read()",
            str(task.folder / "lock"),
            str(ready),
        ],
        stdin=subprocess.PIPE,
    )
    while not ready.exists():
        time.sleep(0.02)
    thread = threading.Thread(target=execute, args=(found, 1, said.append))
    thread.start()
    while not said:
        time.sleep(0.02)
    assert said == ["first, seed 0: another program is at it, waiting"]
    assert calls() == []
    assert holder.stdin is not None
    holder.stdin.close()
    holder.wait(60)
    thread.join(60)
    assert len(calls()) == 3


def test_resuming_is_asked_of_trainings_alone() -> None:
    task = by_name(planned(), "first, seed 0")
    assert command(task) == ["fit", "--config", f"{task.folder}/config.yaml"]
