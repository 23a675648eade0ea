"""Whether generated images show the class asked for, as an independent classifier reads them."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.data.batches import check_classes, logits_of, require_finite
from dat_lightning.results.digests import network_identity
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.pgd_sampler import SampleConsumer
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan
from dat_lightning.sampling.sample_metrics import SampleMetrics
from dat_lightning.sampling.sweep import over_sweep


class LabelAgreement(SampleConsumer):
    """Measures the share of generated images that an independent classifier reads as the class asked for.

    ``figures`` are ``label_agreement``, after the number of sampling steps that a
    :class:`~dat_lightning.SampleMetrics` of the same Trainer chooses (without one, the most steps), and
    ``label_agreement_{steps}_steps``.

    Args:
        judge: An independent classifier, images in [0, 1] to logits (N, K).

    Raises:
        InputError: When sampling starts, if the judge is part of the network; with a batch, if a class asked for is
            none of the judge's.
    """

    def __init__(self, judge: nn.Module) -> None:
        self.judge = judge.requires_grad_(False).eval()
        self._chooser: SampleMetrics | None = None
        self._agree: dict[int, list[Values]] = {}
        self._shares: dict[int, float] = {}

    @property
    def figures(self) -> list[Measurement]:
        """Results of the last sampling, on every rank; chosen when read, because other callbacks may come later."""
        if not self._shares:
            return []
        chosen = self._chooser.figures if self._chooser is not None else []
        best = int(chosen[0].details["num_steps"]) if chosen else max(self._shares)
        words = "share of generated images that an independent classifier reads as the class asked for"
        settings = {"judge": network_identity(self.judge), **self.plan.settings}
        size = self.plan.num_samples
        made = {
            steps: [Measurement("label_agreement", share, words, size, {"num_steps": steps}, "higher", settings)]
            for steps, share in self._shares.items()
        }
        return over_sweep(made, made[best])

    @property
    @override
    def logged_names(self) -> set[str]:
        """None at all."""
        return set()

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Starts anew."""
        check_independent(self.judge, pl_module)
        self.judge.to(pl_module.device)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._chooser = next((c for c in callbacks if isinstance(c, SampleMetrics)), None)
        self._agree = {steps: [] for steps in plan.num_steps}
        self._shares = {}

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Reads a batch."""
        for steps, images in batch.images.items():
            agree = (classes_read(self.judge, images, batch.labels, "LabelAgreement.judge") == batch.labels).cpu()
            self._agree[steps].append({"index": batch.indices.cpu(), "agree": agree})

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the ranks."""
        for steps, mine in self._agree.items():
            self._shares[steps] = float(gather(mine, "no samples were generated")["agree"].double().mean())
        self._agree = {}


def check_independent(judge: nn.Module, pl_module: LightningModule) -> None:
    """Raises an InputError if a judge is part of the network under test."""
    if any(judge is part for part in pl_module.modules()):
        raise InputError("judge must be independent of the network under test, got a part of it")


def classes_read(judge: nn.Module, images: Tensor, labels: Tensor, name: str) -> Tensor:
    """Returns the classes (N,) that a judge reads in images.

    Args:
        judge: Maps images to logits (N, K).
        images: Shape (N, C, H, W), in [0, 1].
        labels: The classes (N,) that what it reads will be compared with.
        name: What it is called in messages.

    Raises:
        InputError: If its logits are not (N, K), or not finite, or a label is none of its classes.
    """
    with torch.no_grad():
        logits = logits_of(judge, images, name)
    check_classes(labels, logits, name, least=1)
    # The largest of NaN is the first, which may be the label.
    require_finite(logits, name)
    return logits.argmax(1)
