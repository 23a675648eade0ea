"""Whether generated points lie where a density of the plane that is known is not small."""

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.evaluation.landscape import plane_of
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.pgd_sampler import SampleConsumer
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan
from dat_lightning.sampling.sweep import over_sweep


class SampleSupport(SampleConsumer):
    """Measures the share of samples that lie where the density of the data is not small.

    That is where log p of a :class:`~dat_lightning.data.PlaneDataModule` is above the quantile of test points that
    ``left_out`` says, so that of points of p the share 1 − ``left_out`` lies there. ``figures`` are ``sample_support``,
    after the best number of sampling steps, and ``sample_support_{steps}_steps``. Samples are of all classes alike,
    however common these are.

    Args:
        left_out: The quantile, in (0, 1).

    Raises:
        InputError: If the quantile is outside its range; in a test, if the DataModule is none of the plane.
    """

    stages = ("test",)

    def __init__(self, left_out: float = 0.01) -> None:
        if not 0 < left_out < 1:
            raise InputError(f"left_out must lie in (0, 1), got {left_out}")
        self.left_out = left_out
        self.figures: list[Measurement] = []
        self._samples: dict[int, list[Values]] = {}

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the DataModule: samples come after the last batch."""
        plane_of(trainer, type(self).__name__)

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Starts anew."""
        self.figures, self._samples = [], {steps: [] for steps in plan.num_steps}

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Keeps log p of the batch."""
        data = plane_of(trainer, type(self).__name__)
        for steps, images in batch.images.items():
            log_p = data.log_density(images, batch.labels)
            self._samples[steps].append({"index": batch.indices.cpu(), "log_density": log_p})

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the figures."""
        data = plane_of(trainer, type(self).__name__)
        points = data.in_distribution("test")
        x, y = zip(*(points[k] for k in range(len(points))), strict=True)
        threshold = float(data.log_density(torch.stack(x), torch.stack(y)).quantile(self.left_out))
        words = f"share of samples where log p is above its {self.left_out:g}-quantile of test points"
        made = {}
        for steps, mine in self._samples.items():
            above = gather(mine, "no samples were generated")["log_density"] >= threshold
            details, size = {"num_steps": steps, "threshold": threshold}, len(above)
            share, plan = float(above.double().mean()), self.plan.settings
            made[steps] = [Measurement("sample_support", share, words, size, details, "higher", plan)]
        best = max(made, key=lambda steps: made[steps][0].value)
        self._samples, self.figures = {}, over_sweep(made, made[best])
