"""Calibration: whether a confidence of 80 % is right 80 times in a hundred."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.errors import require_at_least
from dat_lightning.data.batches import EvaluationEntry, logits_of, only_loader
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.evaluation.reliability import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    calibration_error,
    fit_temperature,
    reliability,
)
from dat_lightning.results.digests import image_digests, set_identity
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.progress import is_silent


class Calibration(Evaluator):
    """Measures calibration on the test images, as they are and after temperature scaling.

    | figure | definition |
    |---|---|
    | ``ece`` | expected calibration error over bins of equal width |
    | ``nll`` | mean of −log p(y) |
    | ``brier`` | mean of Σₖ (p(k) − 1[k = y])², in [0, 2] |
    | ``{…}_scaled`` | the same after division of the logits by T |
    | ``temperature`` | T |

    T minimises the negative log-likelihood on the DataModule's validation images. Where these are test images, or
    there are none, T is fitted on each half of the test images (every second one) and applied to the other half, so
    that no image is scaled by a T that has seen it; the figures' protocols say which of the two it was.

    Logged: ``test/{figure}``. The reliability diagrams are in the figures' ``details["reliability"]``.

    Args:
        num_bins: Number of bins.
        temperature: Whether to scale.
        dirpath: See :class:`Evaluator`.

    Raises:
        InputError: If there is no bin; in a test, if the logits are not (N, K) with at least two classes, or not
            finite, or labels are none of the classes.

    Source: Guo et al. 2017 (arXiv 1706.04599).
    """

    def __init__(self, num_bins: int = 15, temperature: bool = True, dirpath: str | None = None) -> None:
        super().__init__(dirpath)
        require_at_least(1, num_bins=num_bins)
        self.num_bins = num_bins
        self.temperature = temperature

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns logits (N, K), labels, and a number that tells images apart."""
        with torch.no_grad():
            logits = logits_of(pl_module, batch["x"], type(self).__name__)
        y = batch["y"].cpu()
        self.check_logits(logits, y)
        # The images alone: what is a test image stays one under another label.
        return {"logits": logits, "y": y, "digest": image_digests(batch["x"], torch.zeros_like(y))}

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns the figures without and with scaling."""
        logits, y = values["logits"].double(), values["y"].long()
        found = self._scores(logits, y, "", {}, {})
        if not self.temperature:
            return found
        held_out = self._held_out(trainer, pl_module)
        new = None if held_out is None else ~torch.isin(held_out["digest"], values["digest"])
        if held_out is not None and new is not None and 2 * int(new.sum()) > len(new):
            where = f"{int(new.sum())} validation images that are no test images"
            temperatures = [fit_temperature(held_out["logits"][new], held_out["y"][new].long())]
            settings = {"temperature_of": where, "validation_images": set_identity(held_out["digest"][new])}
        else:
            why = "there are no validation images" if new is None else "the validation images are test images"
            where = f"each half of the test images, applied to the other half, for {why}"
            temperatures = [fit_temperature(logits[1 - k :: 2], y[1 - k :: 2]) for k in (0, 1)]
            settings = {"temperature_of": where}
        # Example i has the T of the half that it does not belong to.
        each = torch.tensor(temperatures, dtype=torch.float64)[torch.arange(len(y)) % len(temperatures)]
        details: dict[str, Any] = {"temperatures": temperatures}
        if any(not LOWEST_TEMPERATURE < t < HIGHEST_TEMPERATURE for t in temperatures):
            details["warnings"] = [
                f"T is at the end of {LOWEST_TEMPERATURE} … {HIGHEST_TEMPERATURE}: the images that it was fitted on are"
                " all right, or read no better than by chance, so that figures with scaling say nothing."
            ]
        t = math.exp(sum(map(math.log, temperatures)) / len(temperatures))
        mean = "geometric mean of both T" if len(temperatures) > 1 else "T"
        words = f"{mean} of the least negative log-likelihood"
        scaled = self._scores(logits / each.unsqueeze(1), y, "_scaled", settings, details)
        return [*found, *scaled, Measurement("temperature", t, words, len(y), details, settings=settings)]

    def _scores(
        self, logits: Tensor, y: Tensor, suffix: str, scaling: dict[str, Any], more: dict[str, Any]
    ) -> list[Measurement]:
        """All figures of some logits."""
        probabilities = logits.softmax(1)
        confidence, prediction = probabilities.max(1)
        correct = prediction == y
        nll = float(F.cross_entropy(logits, y))
        brier = float((probabilities - F.one_hot(y, logits.shape[1])).square().sum(1).mean())
        gap = "mean |accuracy − confidence| over bins, weighted by their images"
        details = {
            "test_accuracy": float(correct.double().mean()),
            "mean_confidence": float(confidence.mean()),
            **more,
            "bin_edges": [m / self.num_bins for m in range(self.num_bins + 1)],
            "reliability": reliability(confidence, correct, self.num_bins),
        }
        bins = {"num_bins": self.num_bins, "bins_of": "equal width"}
        chosen: list[tuple[str, float, str, dict[str, Any], dict[str, Any]]] = [
            ("ece", calibration_error(confidence, correct, self.num_bins), gap, details, bins),
            ("nll", nll, "mean of −log p(y)", more, {}),
            ("brier", brier, "mean over images of the sum over classes of (p(k) − 1[k = y])²", more, {}),
        ]
        end = ", logits divided by T" if suffix else ""
        return [
            Measurement(name + suffix, value, words + end, len(y), said, "lower", {**own, **scaling})
            for name, value, words, said, own in chosen
        ]

    def _held_out(self, trainer: Trainer, pl_module: LightningModule) -> Values | None:
        """Values of the DataModule's validation images; ``None`` if it has no such loader."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is None or not is_overridden("val_dataloader", data):
            return None
        try:
            data.setup("validate")
            loader = data.val_dataloader()
        except Exception as error:  # whatever a DataModule that was not set up to fit stumbles over
            rank_zero_warn(
                f"Calibration cannot have validation images, and uses halves: {type(error).__name__}: {error}"
            )
            return None
        values: list[Values] = []
        loader = only_loader(loader, "Calibration, for temperature scaling,")
        entry = EvaluationEntry("Calibration, for temperature scaling,", loader, trainer)
        for raw in tqdm(loader, desc="Calibration: validation", leave=False, disable=is_silent(trainer)):
            # What the Trainer does with a batch.
            batch = data.on_before_batch_transfer(raw, 0)
            batch = data.transfer_batch_to_device(batch, pl_module.device, 0)
            batch = entry(trainer.precision_plugin.convert_input(data.on_after_batch_transfer(batch, 0)))
            found = self.remember(pl_module, batch, lambda b: self.evaluate_batch(pl_module, b), "validation")
            values.append({"index": batch["index"].cpu(), **found})
        return gather(values, "the validation loader gave no batch; set temperature: false")
