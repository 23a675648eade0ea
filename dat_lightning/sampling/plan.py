"""What a sampler is about to generate, and a batch of what it has generated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.core.update_rules import UpdateRule
from dat_lightning.data.pixels import Rounding
from dat_lightning.results.measurement import primitives

Stage = Literal["val", "test", "predict"]


def checked_stages(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Returns the evaluations that a callback takes part in.

    Raises:
        InputError: If one is unknown, or they are a string.
    """
    if isinstance(stages, str) or set(stages) - set(get_args(Stage)):
        raise InputError(f"stages must be some of {get_args(Stage)}, got {stages!r}")
    return tuple(stages)


@dataclass(frozen=True)
class SamplingPlan:
    """What a sampler is about to generate.

    Attributes:
        stage: The evaluation that asked for it; the prefix of logged scalars.
        num_samples: Samples over all ranks.
        num_classes: Number of classes K; sample i belongs to class i mod K.
        num_steps: Step counts of the snapshots, ascending.
        step_size: Length of a step.
        rule: How steps are made.
        network_evaluations: Step count → evaluations of the network for one sample.
        rounding: How consumers make eight-bit pixels of samples.
        seeds: How the DataModule makes seeds of images, its ``seed_settings``; empty where it does not say.
    """

    stage: Stage
    num_samples: int
    num_classes: int
    num_steps: tuple[int, ...]
    step_size: float
    rule: UpdateRule
    network_evaluations: Mapping[int, int]
    rounding: Rounding = "nearest"
    seeds: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about samples besides the number of steps, as primitives; their rounding is not part of it."""
        return primitives({"step_size": self.step_size, "rule": self.rule, **self.seeds})

    def check_snapshot(self, consumer: str, num_steps: int | None) -> None:
        """Raises an InputError if a consumer wants a snapshot that is not taken; ``None`` wants none in particular."""
        if num_steps is not None and num_steps not in self.num_steps:
            raise InputError(
                f"{consumer}.num_steps={num_steps} is not among the sampler's snapshots {list(self.num_steps)}"
            )


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples of one batch.

    Attributes:
        indices: Global indices, (N,).
        labels: Intended classes, (N,).
        seeds: The OOD images that the chain began with, (N, C, H, W).
        images: Step count → images, (N, C, H, W) in [0, 1].
    """

    indices: Tensor
    labels: Tensor
    seeds: Tensor
    images: dict[int, Tensor]
