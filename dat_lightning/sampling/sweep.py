"""Figures of a sweep over the number of sampling steps: those of the chosen number, their curves, and those of each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import LightningModule

from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.plan import Stage


def over_sweep(made: Mapping[int, Sequence[Measurement]], chosen: Sequence[Measurement]) -> list[Measurement]:
    """Returns the chosen measurements with their curves, then those of each step count as ``{name}_{steps}_steps``.

    Args:
        made: Step count → its measurements, in the same order for all.
        chosen: Those of one step count.
    """
    step_counts = sorted(made)
    figures = []
    for k, figure in enumerate(chosen):
        curve = {"sweep_steps": step_counts, "sweep": [made[steps][k].value for steps in step_counts]}
        figures.append(replace(figure, details={**figure.details, **curve}))
    return figures + [replace(each, name=f"{each.name}_{steps}_steps") for steps in step_counts for each in made[steps]]


def log_sweep(
    pl_module: LightningModule,
    stage: Stage,
    figures: Sequence[Measurement],
    steps_name: str,
    best: int,
    in_bar: str = "",
) -> None:
    """Logs figures and the chosen step count behind the stage; in predict, where nothing is logged, prints them.

    Args:
        pl_module: Logs.
        stage: The evaluation.
        figures: The same on every rank.
        steps_name: Name of the step count.
        best: The step count.
        in_bar: Name of the figure that the progress bar shows.
    """
    if stage == "predict":
        rank_zero_info(f"{steps_name} {best}, " + ", ".join(f"{each.name} {each.value:.4g}" for each in figures))
        return
    # The same numbers on every rank, so there is nothing to reduce.
    pl_module.log(f"{stage}/{steps_name}", float(best), sync_dist=False)
    for figure in figures:
        pl_module.log(f"{stage}/{figure.name}", figure.value, prog_bar=figure.name == in_bar, sync_dist=False)
