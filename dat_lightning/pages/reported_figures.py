"""The figures that a report collects: those of each callback, and what the module itself logs."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.results.digests import file_digest, identity, network_identity, reference_digest
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.frechet import FrechetDistance
from dat_lightning.sampling.pgd_sampler import PGDSampler, SampleConsumer
from dat_lightning.sampling.reference_images import reference_data

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
    if isinstance(callback, FrechetDistance):
        return [_frechet_figure(trainer, callback)] if callback.scores else []
    figures = getattr(callback, "figures", None)
    return [each for each in figures if isinstance(each, Measurement)] if isinstance(figures, list) else []


def results_of(callback: Callback) -> Any:
    """Returns where a callback keeps its results, a list or a dictionary; ``None`` if it has none."""
    return callback.scores if isinstance(callback, FrechetDistance) else getattr(callback, "figures", None)


def _frechet_figure(trainer: Trainer, callback: FrechetDistance) -> Measurement:
    sampler = next(c for c in callbacks_of(trainer) if isinstance(c, PGDSampler))
    best = min(callback.scores, key=callback.scores.__getitem__)
    steps = {"step_size": sampler.chain.step_size, "rule": repr(sampler.rule)}
    settings = {"extractor": network_identity(callback.extractor), **steps}
    if trainer.is_global_zero:
        # Rank zero alone writes the figure, and alone needs to read the images once more.
        if callback.reference is None:
            seen = reference_digest(reference_data(trainer, "EvaluationReport"))
            settings["reference"] = identity("", seen)
        else:
            settings["reference"] = identity("", file_digest(Path(callback.reference)))
    return Measurement(
        "fid",
        callback.scores[best],
        "Fréchet distance between features of samples and reference",
        sampler.num_samples,
        {"num_steps": best, "sweep_steps": list(callback.scores), "sweep": list(callback.scores.values())},
        "lower",
        settings,
    )


def logged_by_callbacks(trainer: Trainer) -> set[str]:
    """Returns the names under which callbacks log what is in their figures; a Fréchet distance's sweep is in one."""
    logged: set[str] = set()
    for callback in callbacks_of(trainer):
        figures = getattr(callback, "figures", None)
        if isinstance(figures, list):
            logged |= {f"test/{figure.name}" for figure in figures if isinstance(figure, Measurement)}
        if isinstance(callback, FrechetDistance) and callback.scores:
            logged |= {"test/fid", "test/fid_steps", *(f"test/fid_{steps}_steps" for steps in callback.scores)}
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
