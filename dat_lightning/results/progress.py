"""Whether progress is shown."""

from lightning.pytorch import Trainer


def is_silent(trainer: Trainer) -> bool:
    """Returns whether progress is not to be shown: on other ranks, or where the Trainer shows none."""
    return not trainer.is_global_zero or not getattr(trainer.progress_bar_callback, "is_enabled", False)
