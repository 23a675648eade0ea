"""Several processes for a test, started as torchrun would: forks of one interpreter, which imports everything once."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import start_processes

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: object, timeout: float = 240, **variables: str) -> str:
    """Runs a module of this folder in an interpreter of its own and returns what it wrote to standard error."""
    command = [sys.executable, "-m", f"tests.ddp.{module}", *map(str, arguments)]
    # As many threads in each: how a sum is split over threads changes its last bits.
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def launch(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Calls ``function(*arguments)`` on each of the ranks, and returns when all have ended.

    The caller must not have computed gradients: autograd's threads do not survive a fork.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    start_processes(_rank, args=(num_ranks, port, function, arguments), nprocs=num_ranks, start_method="fork")


def strategy(num_ranks: int) -> str:
    return "ddp" if num_ranks > 1 else "auto"


def _rank(rank: int, num_ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if num_ranks > 1:
        size = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        names = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in {**size, **place, **names}.items()})
    function(*arguments)
