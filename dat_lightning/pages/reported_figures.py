"""The figures that a report collects: those of each callback, and what the module itself logs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from dat_lightning.data.fingerprint import file_digest
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.results.figures import Figure
from dat_lightning.results.measured_with import data_digest, network_digest
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


def figures_of(trainer: Trainer, callback: Callback) -> list[Figure]:
    """Returns the figures of one callback."""
    if isinstance(callback, SampleConsumer) and not isinstance(callback, Evaluator) and not sampled(trainer):
        return []
    if isinstance(callback, FrechetDistance):
        return [_frechet_figure(trainer, callback)] if callback.scores else []
    figures = getattr(callback, "figures", None)
    return [each for each in figures if isinstance(each, Figure)] if isinstance(figures, list) else []


def results_of(callback: Callback) -> Any:
    """Returns where a callback keeps its results, a list or a dictionary; ``None`` if it has none."""
    return callback.scores if isinstance(callback, FrechetDistance) else getattr(callback, "figures", None)


def _frechet_figure(trainer: Trainer, callback: FrechetDistance) -> Figure:
    sampler = next(c for c in callbacks_of(trainer) if isinstance(c, PGDSampler))
    data = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
    reference = callback.reference or f"the training images of {data}"
    best = min(callback.scores, key=callback.scores.__getitem__)
    used = {"extractor": network_digest(callback.extractor)}
    if trainer.is_global_zero:
        # Rank zero alone writes the figure, and alone needs to read the images once more.
        if callback.reference is None:
            used["reference"] = data_digest(reference_data(trainer, "EvaluationReport"))
        else:
            used["reference"] = file_digest(Path(callback.reference))
    return Figure(
        "fid",
        callback.scores[best],
        f"Fréchet distance between {sampler.num_samples} class-balanced samples and {reference}, features of"
        f" {type(callback.extractor).__name__}, the smallest over the numbers of sampling steps",
        sampler.num_samples,
        {
            "num_steps": best,
            "step_size": sampler.chain.step_size,
            "sweep_steps": list(callback.scores),
            "sweep": list(callback.scores.values()),
        },
        "lower",
        used,
    )


def logged_by_callbacks(trainer: Trainer) -> set[str]:
    """Returns the names under which callbacks log what is in their figures; a Fréchet distance's sweep is in one."""
    logged: set[str] = set()
    for callback in callbacks_of(trainer):
        figures = getattr(callback, "figures", None)
        if isinstance(figures, list):
            logged |= {f"test/{figure.name}" for figure in figures if isinstance(figure, Figure)}
        if isinstance(callback, FrechetDistance) and callback.scores:
            logged |= {"test/fid", "test/fid_steps", *(f"test/fid_{steps}_steps" for steps in callback.scores)}
    return logged


def module_figure(
    key: str, value: float, pl_module: LightningModule, num_images: int, used: Mapping[str, str]
) -> Figure:
    """Returns a figure that the module logged, with the attack behind it where the module says so."""
    name, source = key.removeprefix("test/"), type(pl_module).__name__
    protocol = f"as {source} logs it, over the test set"
    attack = getattr(pl_module, "eval_threat_model", None)
    if name.partition("/")[0] == "robust_accuracy" and attack is not None:
        start = "a random start" if attack.random_start else "no random start"
        protocol = (
            f"PGD on the cross-entropy, {attack.norm} radius {attack.eps:g}, {attack.num_steps} steps of"
            f" {attack.step_size:g}, {start}, over the test set"
        )
    better = _BETTER.get(name.partition("/")[0])
    return Figure(name, value, protocol, num_images, better=better, measured_with=used)
