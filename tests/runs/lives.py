"""The command line in processes of their own, which a server forks: importing torch and Lightning once is enough.

``python -m tests.runs.lives ARGUMENTS`` is the program itself, armed by the variables MOMENT and MOMENT_RANKS.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600.0


@dataclass(frozen=True)
class Life:
    """How a process ended: its status as a shell gives it, what it wrote, and the seconds that it lived."""

    status: int
    said: str
    seconds: float


class Lives:
    """Runs the command line in new processes, one after the other."""

    def __enter__(self) -> "Lives":
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.runs.lives", "--serve"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

    def run(
        self,
        folder: Path,
        args: list[str],
        moment: tuple[str, int, int] | None = None,
        after: float | None = None,
        env: dict[str, str] | None = None,
    ) -> Life:
        """Runs ``dat-lightning ARGS`` in a folder until it ends.

        Args:
            folder: Working directory.
            args: Of the command line.
            moment: See :func:`tests.runs.moments.arm`.
            after: Seconds after which it is killed.
            env: More variables.
        """
        folder.mkdir(parents=True, exist_ok=True)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        order = {"folder": str(folder), "args": args, "moment": moment, "after": after, "env": env or {}}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Life(answer["status"], (folder / "said.txt").read_text(), answer["seconds"])


def serve() -> None:
    """Forks a process for every order on standard input."""
    import tests.runs.moments  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _live(order)
        deadline = start + (LIMIT if order["after"] is None else order["after"])
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                # Not reaped yet, so the number is still its own.
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(status)
        answer = {"status": code if code >= 0 else 128 - code, "seconds": time.monotonic() - start}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _live(order: dict[str, Any]) -> None:
    """Is the forked process; does not return."""
    status = 1
    try:
        os.chdir(order["folder"])
        os.environ.update(order["env"])
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        if order["moment"] is not None:
            from tests.runs.moments import arm

            arm(*order["moment"])
        status = program(order["args"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def program(args: list[str]) -> int:
    """Returns the status with which the program ends."""
    import traceback

    from dat_lightning.cli import main

    try:
        main(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        if os.environ.get("LOCAL_RANK", "0") in os.environ.get("MOMENT_RANKS", ""):
            from tests.runs.moments import arm

            arm(*json.loads(os.environ["MOMENT"]))
        # As in the program itself: DDP starts the other ranks with the same command.
        from dat_lightning.cli import main

        main()
