"""A run on two hosts loses one of them: the other says so and ends, and the run ends as if nothing had happened.

Hosts are network namespaces that a pair of virtual interfaces connects, or where that is not allowed two agents of
torchrun on one machine.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "examples" / "torchrun.sh"
NUM_STEPS, EVERY, LOST_AFTER = 60, 5, 20
TIMEOUT = 15  # of a collective operation, in seconds
PATIENCE = 250  # with a whole run, in seconds

pytestmark = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Host:
    """Where a process group of its own is started."""

    prefix: tuple[str, ...]
    address: str
    interface: str


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def namespaces() -> Iterator[list[Host]]:
    """Two hosts with a network between them and to nowhere else."""
    names = [f"dat-{os.getpid()}-{k}" for k in (0, 1)]
    interfaces = [f"v{k}-{os.getpid()}"[:15] for k in (0, 1)]
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", interfaces[0], "netns", names[0], "type", "veth", "peer", interfaces[1], "netns", names[1])
        for k, (name, interface) in enumerate(zip(names, interfaces, strict=True)):
            ip("-n", name, "addr", "add", f"10.99.0.{k + 1}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"network namespaces are not allowed here: {error.stderr!r}")
    yield [Host(("ip", "netns", "exec", names[k]), f"10.99.0.{k + 1}", interfaces[k]) for k in (0, 1)]
    for name in names:
        ip("netns", "del", name)


LOOPBACK = [Host((), "127.0.0.1", "lo")] * 2


def write_config(folder: Path) -> Path:
    """A small Stage 2 that saves every few steps."""
    backbone = {"class_path": "dat_lightning.SmallResNet", "init_args": {"widths": [4, 8]}}
    curriculum = {"max_steps": 6, "auc_threshold": 0.3, "window_samples": 200}
    model = {
        "energy_model": {"class_path": "dat_lightning.EnergyModel", "init_args": {"backbone": backbone}},
        "curriculum": {"class_path": "dat_lightning.AUCCurriculum", "init_args": curriculum},
        "contrastive_step_size": 0.4,
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        "threat_model": {"norm": "L2", "eps": 1.0, "step_size": 0.5, "num_steps": 2},
    }
    data = {"batch_size": 32, "validation_size": 20, "num_ood": 200, "num_held_out": 50}
    saver = {"dirpath": str(folder / "checkpoints"), "filename": "{step}", "every_n_train_steps": EVERY}
    trainer = {
        "accelerator": "cpu",
        "strategy": {"class_path": "DDPStrategy", "init_args": {"timeout": f"0:00:{TIMEOUT}"}},
        "max_steps": NUM_STEPS,
        "max_epochs": 5,
        "limit_val_batches": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "callbacks": [
            {"class_path": "dat_lightning.ExponentialMovingAverage"},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {**saver, "save_top_k": -1},
            },
        ],
    }
    config = {
        "model": {"class_path": "dat_lightning.DualAdversarialModule", "init_args": model},
        "data": {"class_path": "dat_lightning.DigitsDataModule", "init_args": data},
        "trainer": trainer,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(hosts: list[Host], config: Path, num_processes: int = 1) -> list[subprocess.Popen[str]]:
    """Starts the documented script on each host, with a log beside the configuration."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    started = []
    for rank, host in enumerate(hosts):
        place = {"NNODES": str(len(hosts)), "NODE_RANK": str(rank), "NPROC": str(num_processes)}
        network = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": host.interface}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with (config.parent / f"host{rank}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*host.prefix, str(SCRIPT), "--config", str(config)],
                    cwd=ROOT,
                    env={**os.environ, **place, **network, "OMP_NUM_THREADS": "1", "PATH": path},
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            )
    return started


def log_of(config: Path, rank: int = 0) -> str:
    return (config.parent / f"host{rank}.log").read_text()


def descendants(process: int) -> list[int]:
    """A process and all that it started, of whatever session."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *itertools.chain.from_iterable(descendants(int(child)) for child in children)]


def end(processes: list[subprocess.Popen[str]]) -> None:
    """Ends what is left of processes that should have ended by themselves."""
    for process in processes:
        if process.poll() is None:
            for each in descendants(process.pid):
                os.kill(each, signal.SIGKILL)
            process.wait()


def train(hosts: list[Host], config: Path, num_processes: int = 1) -> dict[str, Any]:
    """Trains to the end and returns the last checkpoint."""
    started = start(hosts, config, num_processes)
    try:
        for rank, process in enumerate(started):
            assert process.wait(PATIENCE) == 0, log_of(config, rank)[-3000:]
    finally:
        end(started)
    contents: dict[str, Any] = torch.load(config.parent / "checkpoints" / f"step={NUM_STEPS}.ckpt", weights_only=True)
    return contents


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of two processes on one host."""
    return train(LOOPBACK[:1], write_config(tmp_path_factory.mktemp("whole")), num_processes=2)


def lose_a_host(hosts: list[Host], config: Path, unplug: bool) -> float:
    """Kills all processes of the second host in the middle of training; returns how long the first one went on."""
    first, second = start(hosts, config)
    try:
        while not (config.parent / "checkpoints" / f"step={LOST_AFTER}.ckpt").exists():
            assert first.poll() is None, log_of(config)[-3000:]
            time.sleep(0.02)
        if unplug:
            # No word of the other's end gets through.
            ip("-n", hosts[1].prefix[-1], "link", "set", hosts[1].interface, "down")
        for process in descendants(second.pid):
            os.kill(process, signal.SIGKILL)
        lost = time.monotonic()
        assert first.wait(PATIENCE) != 0
        assert second.wait(60) == -signal.SIGKILL
        return time.monotonic() - lost
    finally:
        end([first, second])
        if unplug:
            ip("-n", hosts[1].prefix[-1], "link", "set", hosts[1].interface, "up")


def assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{k}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("how", ["killed", "unplugged", "killed on one machine"])
def test_a_host_is_lost_and_the_run_ends_as_if_nothing_had_happened(
    how: Literal["killed", "unplugged", "killed on one machine"],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    hosts: list[Host] = LOOPBACK if how == "killed on one machine" else request.getfixturevalue("namespaces")
    config = write_config(tmp_path / "run")
    waited = lose_a_host(hosts, config, unplug=how == "unplugged")
    # Bounded by the timeout of a collective operation, and what a slow machine adds. Without a network there is no
    # faster way to know.
    assert waited < 300
    assert not (tmp_path / "run" / "checkpoints" / f"step={NUM_STEPS}.ckpt").exists()
    said = log_of(config)
    assert "process 0 of 2 has lost contact with another one" in said, said[-3000:]
    assert "with --ckpt_path last, and it goes on from its last checkpoint" in said
    resumed = train(hosts, config)
    said = log_of(config)
    # At the last checkpoint, not at the beginning; it may have been a later one than that which was waited for.
    found = [
        k
        for k in range(LOST_AFTER, NUM_STEPS, EVERY)
        if f"--ckpt_path last is {config.parent}" in said and f"step={k}.ckpt" in said
    ]
    assert found, said[-3000:]
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "global_step"):
        assert_same(uninterrupted[part], resumed[part], part)
    assert_same(uninterrupted["DigitsDataModule"], resumed["DigitsDataModule"], "data")
    assert resumed["global_step"] == NUM_STEPS
    assert int(resumed["state_dict"]["curriculum.num_steps"]) == 6  # T grew in between
