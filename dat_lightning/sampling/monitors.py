"""The check that nobody waits after each validation for figures of samples that come after some, or none, of them."""

import re
from collections.abc import Collection, Iterator

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dat_lightning.core.errors import InputError


def check_monitors(
    trainer: Trainer, every: int, logged: Collection[str], never: Collection[str], silent: Collection[str]
) -> None:
    """Compares what callbacks and schedules of the learning rate monitor with what sampling logs.

    Args:
        trainer: Its training is about to begin.
        every: Validations are followed by samples in each such epoch.
        logged: Names behind ``val/`` that are logged then, but for those of single step counts.
        never: Names that are logged in other evaluations alone.
        silent: Classes of the consumers that do not say what they log.

    Raises:
        InputError: Naming the two settings that clash.
    """
    validates: int | None = trainer.check_val_every_n_epoch
    always = every == 1 or (validates is not None and validates % every == 0)
    for setting, monitor, period in _monitors(trainer):
        name = re.sub(r"_\d+_steps$", "", monitor.removeprefix("val/"))
        if name in never and name not in logged:
            raise InputError(
                f"{setting}={monitor!r} waits for samples, and none are drawn in validation: add 'val' to the stages of"
                " PGDSampler and of the callback that logs it"
            )
        if always or period % every == 0:
            continue
        if name in logged:
            raise InputError(
                f"PGDSampler.every_n_epochs={every} and {setting}={monitor!r} clash: after the other validations there"
                f" is no new value. Set trainer.check_val_every_n_epoch={every} instead of PGDSampler.every_n_epochs"
            )
        if silent:
            raise InputError(
                f"PGDSampler.every_n_epochs={every} and {setting}={monitor!r} may clash, for {min(silent)} does not say"
                " what it logs: let its logged_names return the names"
            )


def _monitors(trainer: Trainer) -> Iterator[tuple[str, str, int]]:
    """Settings that wait for a value of validation, the value's name, and after how many epochs each time."""
    found: list[tuple[str, object, int]] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        own = getattr(callback, "every_n_epochs", 1) if isinstance(callback, ModelCheckpoint) else 1
        found.append((f"{type(callback).__name__}.monitor", getattr(callback, "monitor", None), max(own, 1)))
    waiting = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau and config.strict]
    found += [(f"{type(config.scheduler).__name__}.monitor", config.monitor, config.frequency) for config in waiting]
    for setting, monitor, period in found:
        if isinstance(monitor, str) and monitor.startswith("val/"):
            yield setting, monitor, period
