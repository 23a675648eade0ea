"""Moments of a run at which a process sends itself a signal: inside an attack, a save, validation, and so on."""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dat_lightning import EnergyModule, PGDSampler
from dat_lightning.runs import atomic

MOMENTS = ("attack", "optimizer", "validation", "sampling", "half written", "unnamed", "named")


def arm(moment: str, count: int, signum: int = signal.SIGKILL) -> None:
    """Has this process get a signal when something happens for the ``count``-th time.

    Args:
        moment: ``attack``: between two of its steps; ``optimizer``: weights have moved, averages not; ``validation``
            and ``sampling``: in the middle; ``half written``, ``unnamed``, ``named``: a checkpoint's bytes are half on
            the disk, all of them are, or they have their name.
        count: From 1.
        signum: SIGKILL ends the process there.
    """
    seen = 0

    def now() -> bool:
        nonlocal seen
        seen += 1
        return seen == count

    def after(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if now():
                os.kill(os.getpid(), signum)
            return result

        setattr(owner, name, wrapper)

    if moment == "attack":
        after(EnergyModule, "attack_objective")
    elif moment == "optimizer":
        # Lightning wraps step of the instance; this is what it wraps.
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            after(kind, "step")
    elif moment == "validation":
        after(EnergyModule, "evaluation_metrics")
    elif moment == "sampling":
        after(PGDSampler, "generate")
    elif moment == "named":
        after(Path, "replace")
    elif moment == "unnamed":
        original_replace = Path.replace

        def replace(self: Path, target: Any) -> Any:
            if now():
                os.kill(os.getpid(), signum)
            return original_replace(self, target)

        Path.replace = replace  # type: ignore[method-assign]
    elif moment == "half written":
        save = torch.save

        def half(contents: Any, file: Any, **kwargs: Any) -> None:
            whole = io.BytesIO()
            save(contents, whole, **kwargs)
            data = whole.getvalue()
            file.write(data[: len(data) // 2])
            file.flush()
            if now():
                os.kill(os.getpid(), signum)
            file.write(data[len(data) // 2 :])

        atomic.torch.save = half  # type: ignore[attr-defined]
    else:
        raise ValueError(f"moment must be one of {MOMENTS}, got {moment!r}")
