"""Threads that suit the machine: decided before torch is loaded, since OpenMP reads its settings then; without torch.

``python -m dat_lightning.threads ARGUMENTS`` runs ``python ARGUMENTS`` so.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

NUMBER = "OMP_NUM_THREADS"
WAITING = "OMP_WAIT_POLICY"
# What a background of daemons takes, and the counters' resolution, in cores.
NOISE = 0.3


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets threads sleep, not spin, while they wait for each other, if other programs need the cores they spin on.

    Spinning is faster on cores of one's own. Beside others a thread spins for one that does not run meanwhile. Whoever
    has set OpenMP's variables has decided already.

    Args:
        environment: Variables of this process, and of those that it starts.
    """
    given = environment.get(NUMBER, "")
    threads = int(given) if given.isdecimal() else usable_cores(environment)
    if threads > 1 and WAITING not in environment and "GOMP_SPINCOUNT" not in environment and is_busy(threads):
        environment[WAITING] = "PASSIVE"


def is_busy(threads: int) -> bool:
    """Returns whether other processes leave fewer cores free than there are threads to run; takes a fifth of a second.

    This process computes meanwhile, so that two that start together see each other. Averages of the load would tell of
    what has ended already, such as the stage before.
    """
    before = CoreTimes.now()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    after = CoreTimes.now()
    return before is not None and after is not None and after.others(before) > after.cores - threads + NOISE


class CoreTimes(NamedTuple):
    """What the cores that this process may use have done so far.

    Attributes:
        cores: Their number.
        clock: Time, in seconds.
        busy: Seconds in which they computed, summed over cores.
        own: Those of this process.
    """

    cores: int
    clock: float
    busy: float
    own: float

    @classmethod
    def now(cls, stat: Path = Path("/proc/stat")) -> "CoreTimes | None":
        """Returns the present ones, or ``None`` where the system does not tell."""
        try:
            lines = stat.read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        times = (line.split() for line in lines if line.startswith("cpu"))
        mine = {f"cpu{number}" for number in affinity()}
        # user, nice, system, idle, iowait, irq, softirq, steal; guests' time is part of the user's.
        busy = [sum(map(int, numbers[:3] + numbers[5:8])) for name, *numbers in times if name in mine]
        return cls(len(busy), time.monotonic(), sum(busy) / os.sysconf("SC_CLK_TCK"), time.process_time())

    def others(self, before: "CoreTimes") -> float:
        """Returns how many cores other processes have used since then."""
        wall = self.clock - before.clock
        return max(0.0, (self.busy - before.busy) - (self.own - before.own)) / wall if wall > 0 else 0.0


def affinity() -> set[int]:
    """Returns the numbers of the cores that the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def usable_cores(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Returns how many cores this process may use: by its affinity, its container's quota and Slurm; at least one.

    Args:
        environment: Variables of this process.
        root: Folder in which ``proc`` and ``sys`` lie.
    """
    limits: list[float] = [len(affinity()), *_quotas(root)]
    slurm = environment.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdecimal():
        limits.append(int(slurm))
    return max(1, int(min(limits)))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that the control groups of this process may use, its own and those around it, of both versions."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        inner = top / path.strip("/")
        # Inside a container the path is that outside, and what is mounted here is the group itself.
        for folder in (inner, *inner.parents):
            quota = _quota(folder)
            if quota is not None:
                yield quota
            if folder == top:
                break


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdecimal() and int(quota) > 0 else None  # "max" and -1 are none


def main() -> None:
    """Becomes ``python`` with the arguments of the command line, after the environment has been set."""
    prepare()
    if usable_cores() < (os.cpu_count() or 1):
        os.environ.setdefault(NUMBER, str(usable_cores()))
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
