"""Real test images measured as if they were samples, for a scale: what a perfect generator would get."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.features.fidelity import Features, by_class, fidelity_scores, measurements
from dat_lightning.features.gaussian_stats import FeatureMoments
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.sample_metrics import SampleMetrics


class RealImages(Evaluator):
    """Measures the test images as the :class:`~dat_lightning.SampleMetrics` of the same Trainer measures samples.

    Metrics, extractor and reference are those of that callback, the first of several; the figures are ``real_fid``,
    ``real_precision``, …. They say how far even real images are from the reference, in such numbers: a Fréchet distance
    of few images is far from 0.

    Args:
        dirpath: See :class:`Evaluator`.

    Attributes:
        metrics: The callback that this one measures alike, from set-up on.

    Raises:
        InputError: On set-up, if the Trainer has no SampleMetrics; in a test, if there are too few images.
    """

    metrics: SampleMetrics

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the callback to measure alike."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, SampleMetrics)]
        if not found:
            raise InputError("RealImages measures as SampleMetrics does: add one to trainer.callbacks")
        self.metrics = found[0]

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings the networks to the module's device, and starts anew."""
        for network in (self.metrics.extractor, self.metrics.classifier):
            if network is not None:
                network.to(pl_module.device)
        super().on_test_start(trainer, pl_module)

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns features, and logits where a metric needs them."""
        x = batch["x"]
        pixels = to_uint8_rgb(x)[:, : x.shape[1]]
        return {"label": batch["y"], **self.metrics.reader.read(pixels, with_logits="isc" in self.metrics.metrics)}

    @override
    def settings(self) -> dict[str, Any]:
        """Returns what the values depend on."""
        of_features, of_logits = self.metrics.reader.settings()
        return {"features": of_features, "logits": of_logits if "isc" in self.metrics.metrics else None}

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns the figures."""
        metrics, settings = self.metrics.metrics, self.metrics.settings
        reference = self.metrics.reference_features.find(trainer, pl_module)
        values = by_class(values)
        features = values["features"]
        moments = FeatureMoments(features.shape[1])
        moments.update(features)
        real = Features(len(features), moments.gaussian(), features, values.get("logits"))
        scores = fidelity_scores(metrics, settings, real, reference)
        found = measurements(scores, settings, self.metrics.reader.settings(), reference, len(features), {})
        # No model is better or worse for them.
        return [replace(each, name=f"real_{self.metrics.prefix}{each.name}", better=None) for each in found]
