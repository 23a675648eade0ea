"""Whether progress is shown, and whether results stay where they are measured."""

import multiprocessing

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Trainer


def is_silent(trainer: Trainer) -> bool:
    """Returns whether progress is not to be shown: on other ranks, or where the Trainer shows none."""
    return not trainer.is_global_zero or not getattr(trainer.progress_bar_callback, "is_enabled", False)


def warn_if_spawned(trainer: Trainer, who: str) -> None:
    """Says that figures end with this process, if the calling process has started it and goes on after it."""
    if trainer.world_size > 1 and multiprocessing.parent_process() is not None:
        rank_zero_warn(
            f"{who}: with a strategy that starts processes from the calling one, such as ddp_spawn or ddp_notebook,"
            " figures stay in the processes that measure them, and the list of the callback is empty in the calling"
            " one: read evaluation.json, which EvaluationReport writes, or use the strategy ddp"
        )
