"""How OpenMP's threads should wait: on a machine that is idle, has one busy process, or another training.

Each figure is from a process of its own; the policies take turns, and ratios are those of one round. To be run with
nothing else running: ``python -m tests.benchmarks.busy --rounds 3``.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

CASES = ("digits", "digits, compiled", "WRN-16-2", "WRN-16-2, compiled")
COMPANY = ("idle", "loop", "training")
POLICIES = ("default", "passive", "ours")


def milliseconds(case: str, seconds: float) -> float:
    """Returns the median time of a Stage-2 step in this process; the first two steps do not count."""
    # After the environment has been set.
    from dat_lightning.backbones import SmallResNet
    from dat_lightning.speed import Execution
    from tests.benchmarks.cases import PackageDAT, calibrated, calibrated_backbone, random_batch

    digits = case.startswith("digits")
    image, batch_size, steps = (16, 64, 15) if digits else (32, 32, 10)
    backbone = calibrated(SmallResNet(in_channels=3), 16) if digits else calibrated_backbone(16, 2, 32, "silu")
    execution = Execution(compile=case.endswith("compiled"), fold_batch_norm=True)
    run = PackageDAT(backbone, steps, 7 if digits else 10, execution=execution)
    batch = random_batch(batch_size, image, 0)
    times: list[float] = []
    for _ in range(2):
        run.step(batch)
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 2:
        start = time.monotonic()
        run.step(batch)
        times.append(time.monotonic() - start)
    return 1000 * median(times)


def command(policy: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Returns how a process of this file is started under a policy."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    prefix = ["-m", "dat_lightning.threads"] if policy == "ours" else []
    passive = {"OMP_WAIT_POLICY": "PASSIVE"} if policy == "passive" else {}
    return [sys.executable, *prefix, "-m", "tests.benchmarks.busy", *arguments], {**kept, **passive}


@contextmanager
def company(kind: str, case: str) -> Iterator[None]:
    """Runs what else the machine has to do, and ends it."""
    if kind == "idle":
        yield
        return
    arguments, environment = command("default", "--case", case, "--seconds", "3600")
    with subprocess.Popen(
        [sys.executable, "-c", "while True: pass"] if kind == "loop" else arguments,
        env=environment,
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            # Until it takes steps.
            time.sleep(1 if kind == "loop" else 20)
            yield
        finally:
            process.kill()


def main(args: Sequence[str] | None = None) -> None:
    """Prints a table of medians in ms per step, and of ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--company", nargs="+", choices=COMPANY, default=list(COMPANY))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps in each process")
    parser.add_argument("--case", help="take steps in this process, and print their time")
    options = parser.parse_args(args)
    if options.case is not None:
        sys.stdout.write(f"{milliseconds(options.case, options.seconds)}\n")
        return
    sys.stdout.write("| case | beside | default, ms | passive, ms | ours, ms | ours : default | ours : passive |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for case in options.cases:
        for kind in options.company:
            found: dict[str, list[float]] = {policy: [] for policy in POLICIES}
            with company(kind, case):
                for _ in range(options.rounds):
                    for policy in POLICIES:
                        start, environment = command(policy, "--case", case, "--seconds", str(options.seconds))
                        done = subprocess.run(start, env=environment, capture_output=True, text=True, check=True)
                        found[policy].append(float(done.stdout))
            ratios = [
                median(mine / other for mine, other in zip(found["ours"], found[policy], strict=True))
                for policy in POLICIES[:2]
            ]
            cells = [f"{median(found[policy]):.0f}" for policy in POLICIES] + [f"{ratio:.2f}" for ratio in ratios]
            sys.stdout.write(f"| {case} | {kind} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
