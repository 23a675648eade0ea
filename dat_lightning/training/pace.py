"""How fast a run is compared with its first steps, and what the machine says where it has become slow."""

import resource
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from dat_lightning.threads import CoreTimes

# Steps left out at the start, which compile, fill caches and may run ahead of a GPU, and those that are compared.
WARM_UP = 50
WINDOW = 20


class Step(NamedTuple):
    """What a training step took.

    Attributes:
        wait: Seconds until its batch was there.
        total: Those and the ones of the step itself.
        work: What it did, in network evaluations.
    """

    wait: float
    total: float
    work: float


class MachineTimes(NamedTuple):
    """What the machine has done so far: its cores, and how often memory of this process had to be read from disk."""

    cores: CoreTimes | None
    disk_reads: int

    @classmethod
    def now(cls) -> "MachineTimes":
        """Returns the present ones."""
        return cls(CoreTimes.now(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt)

    def others(self, before: "MachineTimes") -> float:
        """Returns how many cores other processes have used since then, loader processes of this run among them."""
        return 0.0 if self.cores is None or before.cores is None else self.cores.others(before.cores)


class Pace:
    """Compares the time of steps with that of the first ones, for equal work; tells once when it is several times that.

    Args:
        factor: How many times the first steps' time is told.
    """

    def __init__(self, factor: float = 3.0) -> None:
        self.factor = factor
        self._steps: list[Step] = []
        self._skipped = 0
        self._first: float | None = None
        self._first_others = 0.0
        self._before = MachineTimes.now()
        self._told = False

    def add(self, step: Step) -> str | None:
        """Takes in a step; returns a sentence if the run has just been found slow, ``None`` otherwise."""
        if self._told or step.work == 0:
            return None
        if self._skipped < WARM_UP:
            self._skipped += 1
            self._before = MachineTimes.now()
            return None
        self._steps.append(step)
        if len(self._steps) < WINDOW:
            return None
        steps, self._steps = self._steps, []
        before, self._before = self._before, MachineTimes.now()
        pace = median(each.total / each.work for each in steps)
        if self._first is None:
            self._first, self._first_others = pace, self._before.others(before)
            return None
        if pace < self.factor * self._first:
            return None
        self._told = True
        reason = _reason(steps, before, self._before, self._first_others)
        return f"training is {pace / self._first:.1f} times slower than in its first steps, at equal work: {reason}"


def _reason(steps: Sequence[Step], before: MachineTimes, after: MachineTimes, first_others: float) -> str:
    share = median(each.wait for each in steps) / median(each.total for each in steps)
    others = after.others(before)
    reads = (after.disk_reads - before.disk_reads) / len(steps)
    if share > 0.5:
        return (
            f"it waits for data in {share:.0%} of the time; look at the disk, or raise data.num_workers where cores are"
            " free"
        )
    if reads > 10:
        return f"memory is read back from disk {reads:.0f} times a step; the machine has too little of it"
    if after.cores is not None and others > first_others + 0.5:
        return (
            f"other processes use {others:.1f} of the {after.cores.cores} cores, {first_others:.1f} before; stop them,"
            " or go on from the last checkpoint: threads adapt to such company when a run starts, not later"
        )
    return (
        "this process sees no reason on the machine, whose cores, memory and loader are as before; is the device"
        " shared, or throttled by heat, or does another rank lag?"
    )
