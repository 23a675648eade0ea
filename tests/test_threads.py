"""What is decided about threads, from a machine made of files, and what torch makes of it in new processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dat_lightning import cli, threads
from dat_lightning.threads import CoreTimes, prepare, usable_cores

TICK = os.sysconf("SC_CLK_TCK")


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def on_cores(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(threads, "affinity", lambda: set(range(number)))


V2 = "0::/kubepods/pod1\n"
V1 = "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n"
ONE = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("groups", "files", "environment", "cores"),
    [
        (V2, {}, {}, 16),
        (V2, {"sys/fs/cgroup/kubepods/pod1/cpu.max": "max 100000\n"}, {}, 16),
        (V2, {"sys/fs/cgroup/kubepods/pod1/cpu.max": "350000 100000\n"}, {}, 3),
        (V2, {"sys/fs/cgroup/kubepods/pod1/cpu.max": "50000 100000\n"}, {}, 1),
        # A group around this one has less.
        (
            V2,
            {
                "sys/fs/cgroup/kubepods/pod1/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/kubepods/cpu.max": "200000 50000\n",
            },
            {},
            4,
        ),
        # Inside a container, which sees its own group as the top.
        (V2, {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, {}, 2),
        (V1, {f"{ONE}/job/cpu.cfs_quota_us": "-1\n", f"{ONE}/job/cpu.cfs_period_us": "100000\n"}, {}, 16),
        (V1, {f"{ONE}/job/cpu.cfs_quota_us": "250000\n", f"{ONE}/job/cpu.cfs_period_us": "50000\n"}, {}, 5),
        (V1, {f"{ONE}/cpu.cfs_quota_us": "600000\n", f"{ONE}/cpu.cfs_period_us": "100000\n"}, {}, 6),
        # A quota of memory's group is none of processor time; half a file is none either.
        (V1, {"sys/fs/cgroup/memory/job/cpu.max": "100000 100000\n", f"{ONE}/cpu.cfs_quota_us": "100000\n"}, {}, 16),
        (V2, {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, {"SLURM_CPUS_PER_TASK": "3"}, 3),
        (V2, {}, {"SLURM_CPUS_PER_TASK": "64"}, 16),
        (V2, {}, {"SLURM_CPUS_PER_TASK": ""}, 16),
    ],
)
def test_usable_cores(
    groups: str,
    files: dict[str, str],
    environment: dict[str, str],
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cores(monkeypatch, 16)
    assert usable_cores(environment, machine(tmp_path, groups, files)) == cores


def test_without_such_files_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cores(monkeypatch, 5)
    assert usable_cores({}, tmp_path) == 5


def stat(path: Path, *cores: tuple[int, int]) -> Path:
    """A machine whose cores have been busy and idle for so many ticks; times of guests count double in such files."""
    lines = [f"cpu{k} {busy - 6} 1 2 {idle} 7 1 1 1 {busy} 0" for k, (busy, idle) in enumerate(cores)]
    total = "cpu  999 0 0 999 0 0 0 0 0 0"
    path.write_text("\n".join([total, *lines, "intr 5 0", "procs_running 2"]))
    return path


def test_what_other_processes_use_on_the_cores_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cores(monkeypatch, 2)
    monkeypatch.setattr(time, "monotonic", lambda: 10.0)
    monkeypatch.setattr(time, "process_time", lambda: 1.0)
    # The third core is not ours, whatever happens there.
    before = CoreTimes.now(stat(tmp_path / "stat", (10, 10), (10, 10), (10, 10)))
    monkeypatch.setattr(time, "monotonic", lambda: 12.0)
    monkeypatch.setattr(time, "process_time", lambda: 1.5)
    after = CoreTimes.now(stat(tmp_path / "stat", (10 + TICK, 10), (10 + 2 * TICK, 10), (10 + 5 * TICK, 10)))
    assert before is not None
    assert after is not None
    assert before.cores == 2
    # Three seconds of two cores in two seconds, of which half a second was ours.
    assert after.others(before) == pytest.approx((3 - 0.5) / 2)
    assert after.others(after) == 0
    assert CoreTimes.now(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("used", "number", "busy"), [(0.0, 2, False), (0.1, 2, False), (1.0, 2, True), (1.0, 1, False), (1.8, 1, True)]
)
def test_busy_is_a_machine_whose_free_cores_do_not_suffice(
    used: float, number: int, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([CoreTimes(2, 0.0, 5.0, 1.0), CoreTimes(2, 0.5, 5.0 + 0.5 * used + 0.4, 1.4)])
    monkeypatch.setattr(CoreTimes, "now", lambda: next(times))
    assert threads.is_busy(number) is busy


def test_where_the_system_does_not_tell_nothing_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoreTimes, "now", lambda: None)
    assert not threads.is_busy(2)


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),  # a list, for nested loops
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ({"GOMP_SPINCOUNT": "10000"}, None),
    ],
)
def test_threads_sleep_beside_others_unless_the_user_has_decided(
    given: dict[str, str], asked: int | None, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cores(monkeypatch, 4)
    seen: list[int] = []

    def is_busy(number: int) -> bool:
        seen.append(number)
        return busy

    monkeypatch.setattr(threads, "is_busy", is_busy)
    monkeypatch.setattr(threads, "_quotas", lambda root: ())
    environment = dict(given)
    prepare(environment)
    assert seen == ([] if asked is None else [asked])
    assert environment == {**given, **({"OMP_WAIT_POLICY": "PASSIVE"} if busy and asked is not None else {})}


def python(*arguments: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_", "SLURM_"))}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**environment, **variables}
    ).stdout.strip()


CONFINED = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "


@pytest.mark.slow
def test_a_confined_process_has_a_thread_for_each_core_it_may_use() -> None:
    """By itself torch counts those of the machine."""
    shown = "import torch; from dat_lightning.cli import limit_threads; limit_threads(); print(torch.get_num_threads())"
    assert python("-c", CONFINED + shown) == "1"
    assert python("-c", CONFINED + shown, OMP_NUM_THREADS="2") == "2"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core cannot be confined")
def test_what_the_makefile_runs_is_prepared_before_it_starts() -> None:
    run = "os.execv(os.sys.executable, [os.sys.executable, '-m', 'dat_lightning.threads', '-c', "
    shown = "'import os; print(os.environ.get(\"OMP_NUM_THREADS\"), *os.sys.argv[1:])', 'x'])"
    assert python("-c", CONFINED + run + shown) == "1 x"
    assert python("-c", CONFINED + run + shown, OMP_NUM_THREADS="2") == "2 x"


def test_processes_of_lightning_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(cli, "usable_cores", lambda: 12)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that the end of the test removes what is set here
    monkeypatch.delenv("OMP_NUM_THREADS")
    cli.limit_threads()
    assert numbers == [8]
    assert "OMP_NUM_THREADS" not in os.environ
    cli.limit_threads(3)
    assert numbers == [8, 4]
    assert os.environ["OMP_NUM_THREADS"] == "4"  # which the others inherit
    cli.limit_threads(6)
    assert numbers == [8, 4]
    monkeypatch.delenv("OMP_NUM_THREADS")
    cli.limit_threads(100)
    assert numbers == [8, 4, 1]
