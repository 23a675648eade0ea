"""Jobs of Slurm: the signal before the time limit, the queue, and the checkpoints that Lightning looks for."""

import logging
import os
import re
import signal
import subprocess
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from dat_lightning.runs.lightning_internals import cluster_environment

logger = logging.getLogger(__name__)

_CHECKPOINT_NAME = re.compile(r"hpc_ckpt_(\d+)\.ckpt")


def is_requeued_by_lightning(trainer: Trainer) -> bool:
    """Returns whether the run is a job of Slurm that goes back into the queue when its time is over."""
    environment = cluster_environment(trainer)
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


def time_limit_signal(trainer: Trainer) -> int | None:
    """Returns the signal that Slurm sends before the time limit, or ``None`` where there is no Slurm.

    It also comes where nothing is put back into the queue, and would end a process that does not listen.
    """
    environment = cluster_environment(trainer)
    if isinstance(environment, SLURMEnvironment):
        return int(environment.requeue_signal or signal.SIGUSR1)
    return int(signal.SIGUSR1) if "SLURM_JOB_ID" in os.environ else None


def requeue() -> bool:
    """Puts the job back into Slurm's queue, and returns whether Slurm agreed."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array is not None else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("scontrol requeue %s: %s", job, error)
        return False
    if done.returncode != 0:
        logger.warning("scontrol requeue %s: status %d, %s", job, done.returncode, done.stderr.strip())
    return done.returncode == 0


def remove_older_checkpoints(path: Path) -> None:
    """Removes Slurm's checkpoints beside one but for the newest and the one before it."""
    found = sorted(
        (int(match[1]), file)
        for file in path.parent.glob("hpc_ckpt_*.ckpt")
        if (match := _CHECKPOINT_NAME.fullmatch(file.name))
    )
    for _, file in found[:-2]:
        file.unlink(missing_ok=True)
