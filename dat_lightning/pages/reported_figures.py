"""The figures that a report collects: those of each callback, and what the module itself logs."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.pgd_sampler import PGDSampler, SampleConsumer

# What modules log under the names of the field; other names may mean anything.
_BETTER: Mapping[str, Literal["higher", "lower"]] = {"accuracy": "higher", "robust_accuracy": "higher"}


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks of a Trainer."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def sampled(trainer: Trainer) -> bool:
    """Returns whether this test generates samples; a consumer may have figures of an earlier evaluation."""
    return any(isinstance(c, PGDSampler) and "test" in c.stages for c in callbacks_of(trainer))


def figures_of(trainer: Trainer, callback: Callback) -> list[Measurement]:
    """Returns the figures of one callback."""
    if isinstance(callback, SampleConsumer) and not isinstance(callback, Evaluator) and not sampled(trainer):
        return []
    figures = getattr(callback, "figures", None)
    return [each for each in figures if isinstance(each, Measurement)] if isinstance(figures, list) else []


def results_of(callback: Callback) -> Any:
    """Returns where a callback keeps its results; ``None`` if it has none."""
    return getattr(callback, "figures", None)


def logged_by_callbacks(trainer: Trainer) -> set[str]:
    """Returns the names under which callbacks log what is in their figures."""
    logged: set[str] = set()
    for callback in callbacks_of(trainer):
        figures = getattr(callback, "figures", None)
        if isinstance(figures, list):
            logged |= {f"test/{figure.name}" for figure in figures if isinstance(figure, Measurement)}
    return logged


def module_figure(
    key: str, value: float, pl_module: LightningModule, num_images: int, images: str | None
) -> Measurement:
    """Returns a number that the module logged, with the attack behind it where the module says so."""
    name, source = key.removeprefix("test/"), type(pl_module).__name__
    kind = name.partition("/")[0]
    settings: dict[str, Any] = {"test_images": images}
    attack = getattr(pl_module, "eval_threat_model", None)
    if kind == "robust_accuracy" and attack is not None:
        settings |= {"attack": "PGD on the cross-entropy", "threat_model": asdict(attack), "restarts": 1}
    elif kind not in _BETTER:
        # Names that are not the field's may mean another thing in another module.
        settings["module"] = source
    words = f"as {source} logs it, over the test set"
    return Measurement(name, value, words, num_images, better=_BETTER.get(kind), settings=settings)
