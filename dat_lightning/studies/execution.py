"""Runs the tasks of a plan in processes of their own: what has ended is kept, what was interrupted goes on."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dat_lightning.results.evaluation_file import write_text
from dat_lightning.studies.planning import Plan, Task
from dat_lightning.studies.study_file import to_yaml
from dat_lightning.version import __version__

Status = Literal["finished", "kept", "failed", "waiting"]
Say = Callable[[str], None]

# The command line; a process for each run, so that a crash is its own.
PROGRAM = (sys.executable, "-m", "dat_lightning")

_STATE = "run.json"
_SECONDS_TO_STOP = 30
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Outcome:
    """What has become of a task.

    Attributes:
        status: ``finished`` now, ``kept`` from an earlier call, ``failed``, or ``waiting`` for one that failed.
        seconds: Time that its processes took, over all calls.
        error: Why it failed.
    """

    status: Status
    seconds: float = 0.0
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.status in ("finished", "kept")


def command(task: Task) -> list[str]:
    """Returns the arguments of the command line for a task; an interrupted training goes on from its checkpoint."""
    config = (task.folder / "config.yaml").as_posix()
    if task.trained is not None:
        return ["test", "--config", config, "--ckpt_path", task.trained.as_posix()]
    resumed = ["--ckpt_path", task.checkpoint.as_posix()] if task.checkpoint.is_file() else []
    return ["fit", "--config", config, *resumed]


def state_of(task: Task) -> dict[str, Any]:
    """Returns what is known of a task from earlier calls; nothing if it never ran, or its file is damaged."""
    try:
        state = json.loads((task.folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def is_done(task: Task) -> bool:
    """Returns whether a task has ended well, in this call or an earlier one."""
    return state_of(task).get("status") == "finished" and task.result.is_file()


def execute(plan: Plan, jobs: int, say: Say) -> dict[str, Outcome]:
    """Runs what has not ended yet; returns what has become of each task.

    A task that fails keeps only those waiting that need it.

    Args:
        plan: The tasks.
        jobs: How many run at a time.
        say: Gets a line for each event.

    Raises:
        KeyboardInterrupt: If the user interrupts; the processes have ended by then, and can go on in another call.
    """
    outcomes: dict[str, Outcome] = {}
    running: dict[Future[Outcome], Task] = {}
    workers = _Workers(jobs, say)
    left = list(plan.tasks.values())
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            while left or running:
                for task in [task for task in left if all(key in outcomes for key in task.needs)]:
                    lacking = [key for key in task.needs if not outcomes[key].done]
                    if lacking:
                        left.remove(task)
                        outcomes[task.key] = Outcome("waiting", error=f"{plan.tasks[lacking[0]].name} failed")
                    elif len(running) < jobs:
                        left.remove(task)
                        running[pool.submit(workers.perform, task)] = task
                # A task that waits in vain may have set others free.
                if running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        task = running.pop(future)
                        outcomes[task.key] = future.result()
                        say(_said(task, outcomes[task.key], len(outcomes), len(plan.tasks)))
        except BaseException:
            workers.stop()
            raise
    return {key: outcomes[key] for key in plan.tasks}


def _said(task: Task, outcome: Outcome, ended: int, total: int) -> str:
    words = {"finished": f"done in {outcome.seconds:.0f} s", "kept": "done before, kept"}
    said = words.get(outcome.status, f"failed: {outcome.error}; see {(task.folder / 'log.txt').as_posix()}")
    return f"[{ended}/{total}] {task.name}: {said}"


class _Workers:
    """Runs single tasks in processes, from several threads, until it is told to stop."""

    def __init__(self, jobs: int, say: Say) -> None:
        self.say = say
        self.threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._guard = threading.Lock()
        self._stopped = False

    def perform(self, task: Task) -> Outcome:
        """Runs one task, unless it has ended."""
        task.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(task) as lock:
            spent = float(state_of(task).get("seconds", 0.0))
            if is_done(task):
                return Outcome("kept", spent)
            write_text(task.folder / "config.yaml", to_yaml(task.config))
            arguments = command(task)
            resumes = arguments[0] == "fit" and "--ckpt_path" in arguments
            self.say(f"{task.name}: started{', goes on from its last checkpoint' if resumes else ''}")
            start = time.perf_counter()
            error = _wrong(task, self.call(task, arguments, lock))
            spent += time.perf_counter() - start
            status: Status = "failed" if error else "finished"
            state = {
                "name": task.name,
                "key": task.key,
                "status": status,
                "error": error,
                "seconds": round(spent, 1),
                "command": shown(arguments),
                "version": __version__,
            }
            write_text(task.folder / _STATE, json.dumps(state, indent=2, ensure_ascii=False) + "\n")
            return Outcome(status, spent, error)

    def call(self, task: Task, arguments: list[str], lock: int) -> int:
        """Runs the command line; its output goes to the end of ``log.txt``."""
        with (task.folder / "log.txt").open("ab") as log:
            log.write(f"$ {shown(arguments)}\n".encode())
            log.flush()
            with self._guard:
                if self._stopped:
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    [*PROGRAM, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={"OMP_NUM_THREADS": self.threads, **os.environ},
                    # The process holds the lock too, should this one be killed.
                    pass_fds=(lock,) if lock >= 0 else (),
                )
                self._processes.append(process)
            return process.wait()

    def stop(self) -> None:
        """Ends all processes: politely, so that they can save, and then at once."""
        with self._guard:
            self._stopped = True
        for process in self._processes:
            process.terminate()
        end = time.monotonic() + _SECONDS_TO_STOP
        while any(process.poll() is None for process in self._processes) and time.monotonic() < end:
            time.sleep(0.1)
        for process in self._processes:
            process.kill()

    @contextmanager
    def _alone(self, task: Task) -> Iterator[int]:
        """Keeps other programs from working in a task's folder, and waits while one does; gives the lock's file."""
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows has no such locks
            yield -1
            return
        with (task.folder / "lock").open("ab") as file:
            told = False
            while not self._stopped:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if not told:
                        self.say(f"{task.name}: another program is at it, waiting")
                    told = True
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
            yield file.fileno()


def shown(arguments: list[str]) -> str:
    """Returns a command as people type it."""
    return " ".join(["dat-lightning", *arguments])


def _wrong(task: Task, code: int) -> str:
    """Why a process has failed; empty if it has not."""
    if code < 0:
        return f"ended by signal {-code}; the same command goes on"
    if code > 0:
        return _last_line(task.folder / "log.txt") or f"status {code}"
    return _unfinished(task)


def _unfinished(task: Task) -> str:
    """Why a process that ended without an error has not done its work; empty if it has."""
    if not task.result.is_file():
        return f"{task.result.as_posix()} was not written: the configuration must write it"
    if task.trained is not None:
        return ""
    trainer: Mapping[str, Any] = task.config.get("trainer") or {}
    try:
        saved = torch.load(task.result, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        return f"{task.result.as_posix()} is damaged, delete it: {str(error).splitlines()[0]}"
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
    early = any("EarlyStopping" in str(callback) for callback in trainer.get("callbacks") or [])
    # A process that is told to end by a signal does so with status 0.
    enough = (
        early
        or (epochs in (None, -1) and steps in (None, -1))
        or (epochs not in (None, -1) and saved["epoch"] + 1 >= epochs)
        or (steps not in (None, -1) and saved["global_step"] >= steps)
    )
    return "" if enough else f"it stopped after epoch {saved['epoch'] + 1} of {epochs}; the same command goes on"


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
