"""Energies of training, test, out-of-distribution, adversarial and generated images, and their gradients."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.attack import ascend
from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.losses import energy_gradient_norm
from dat_lightning.core.objectives import cross_entropy
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.data.batches import check_energy, logits_of
from dat_lightning.data.entries import SizedDataset
from dat_lightning.evaluation.ood_images import OODEvaluator, Transform
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.pgd_sampler import PGDSampler, SampleConsumer
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan

_LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


class EnergyStatistics(OODEvaluator, SampleConsumer):
    """Measures E(x) = −logsumexp f(x) and ‖∇ₓE(x)‖² on sets of images.

    | set | images |
    |---|---|
    | ``test`` | the test loader's |
    | ``adversarial`` | the same, attacked on the cross-entropy of their labels |
    | ``train`` | of the DataModule's ``reference_data()``, as evaluation sees them |
    | ``ood_{data}`` | of each OOD data set |
    | ``generated_{steps}_steps`` | of the Trainer's :class:`PGDSampler`, if it samples in test |

    Sets for which something is missing are left out; a line of the log and the details of ``energy_test`` say which
    and why.

    Logged: ``test/energy_{set}`` and ``test/r1_{set}``, the means. The details of each figure have quantiles, those of
    ``energy_test`` histograms of all sets over common bins.

    Args:
        datasets: Name → OOD images, see :class:`OODEvaluator`.
        attack: The attack; by default the module's ``eval_threat_model``, if it has one.
        num_bins: Bins of the histograms, which reach from the lowest to the highest energy of all.
        shared: Further arguments of :class:`OODEvaluator`. Generated images are not kept in ``dirpath``.

    Raises:
        InputError: If a number is not positive; in a test, if an energy is NaN or infinite.

    Source: Grathwohl et al. 2020 (arXiv 1912.03263) for E; Mescheder et al. 2018 (arXiv 1801.04406) for R1.
    """

    stages = ("test",)

    def __init__(
        self,
        datasets: Mapping[str, SizedDataset] | None = None,
        attack: ThreatModel | None = None,
        num_bins: int = 50,
        **shared: Any,
    ) -> None:
        super().__init__(datasets=datasets, **shared)
        require_at_least(1, num_bins=num_bins)
        self.attack = attack
        self.num_bins = num_bins
        self._attack: ThreatModel | None = None
        self._samples: dict[int, list[Values]] = {}
        self._waiting = False

    @override
    def settings(self) -> dict[str, Any]:
        """Returns attack and seed."""
        return {"attack": self._attack, "seed": self.seed}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Does without a sampler if there is none."""

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the attack, and starts anew."""
        super().on_test_start(trainer, pl_module)
        own = getattr(pl_module, "eval_threat_model", None)
        self._attack = self.attack or (own if isinstance(own, ThreatModel) else None)
        self._samples, self._waiting = {}, False

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the figures, or leaves that to the end of sampling if the sampler comes later in the list."""
        samplers = [c for c in trainer.callbacks if isinstance(c, PGDSampler)]  # type: ignore[attr-defined]
        self._waiting = any("test" in sampler.stages for sampler in samplers) and not self._samples
        if not self._waiting:
            super().on_test_epoch_end(trainer, pl_module)

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Makes room for the energies of samples."""
        self._samples = {steps: [] for steps in plan.num_steps}

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Keeps the energies of the batch."""
        for steps, images in batch.images.items():
            self._samples[steps].append({"index": batch.indices.cpu(), **energy_values(pl_module, images)})

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the figures if they waited for the samples."""
        if self._waiting:
            super().on_test_epoch_end(trainer, pl_module)

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns energies and squared gradient norms of test images, clean and attacked."""
        x, y = batch["x"], batch["y"]
        values = energy_values(pl_module, x)
        if self._attack is not None:
            x_adv = ascend(pl_module, x, y, cross_entropy, self._attack, draws=batch["index"], seed=self.seed)
            values |= {f"{name}_adversarial": value for name, value in energy_values(pl_module, x_adv).items()}
        return values

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns mean energy and mean squared gradient norm of each set."""
        sets: dict[str, Values] = {"test": values}
        settings: dict[str, dict[str, Any]] = {"test": {}}
        details: dict[str, dict[str, Any]] = {}
        left_out: dict[str, str] = {}
        if self._attack is None:
            left_out["adversarial"] = "the module has no eval_threat_model, and no attack was given"
        else:
            sets["adversarial"] = {name: values[f"{name}_adversarial"] for name in ("energy", "r1")}
            settings["adversarial"] = {"attack": "PGD on the cross-entropy", "threat_model": asdict(self._attack)}
        for name, dataset, transform in self._data(trainer, left_out):
            compute = partial(_batch_values, pl_module)
            sets[name], images, details[name] = self.evaluate_images(
                trainer, pl_module, name, dataset, transform, compute
            )
            settings[name] = {"images": images}
        if not self._samples:
            left_out["generated"] = "no PGDSampler of the Trainer samples in test"
        for steps, batches in self._samples.items():
            name = f"generated_{steps}_steps"
            sets[name] = gather(batches, "the sampler gave no batch")
            settings[name] = self.plan.settings
        self._samples = {}
        for name, why in left_out.items():
            rank_zero_info(f"EnergyStatistics measures no {name} images: {why}")
        return self._figures(sets, settings, details, left_out)

    def _data(self, trainer: Trainer, left_out: dict[str, str]) -> list[tuple[str, SizedDataset, Transform]]:
        """Name, data and transform of training and OOD images; notes in ``left_out`` what there is not."""
        found: list[tuple[str, SizedDataset, Transform]] = []
        reference = getattr(trainer.datamodule, "reference_data", None)  # type: ignore[attr-defined]
        if callable(reference):
            data = reference()
            found.append(("train", data.dataset, data.transform))
        else:
            left_out["train"] = "the Trainer has no DataModule with reference_data()"
        others = self.ood_images(trainer)
        if not others:
            left_out["ood"] = "no datasets were given, and the Trainer has no DataModule with held-out OOD images"
        return found + [(f"ood_{name}", *data_and_transform) for name, data_and_transform in others.items()]

    def _figures(
        self,
        sets: Mapping[str, Values],
        settings: Mapping[str, Mapping[str, Any]],
        details: Mapping[str, Mapping[str, Any]],
        left_out: Mapping[str, str],
    ) -> list[Measurement]:
        for name, values in sets.items():
            wrong = sum(int((~values[quantity].isfinite()).sum()) for quantity in ("energy", "r1"))
            if wrong:
                raise InputError(f"EnergyStatistics: {wrong} energies or gradients of {name} are NaN or infinite")
        edges, counts = _histograms({name: values["energy"] for name, values in sets.items()}, self.num_bins)
        found: list[Measurement] = []
        meaning = {"energy": "E(x) = −logsumexp f(x)", "r1": "‖∇ₓE(x)‖²"}
        for name, values in sets.items():
            for quantity in ("energy", "r1"):
                more = {**_spread(values[quantity]), **details.get(name, {})}
                if quantity == "energy" and name == "test":
                    more |= {"histogram": {"edges": edges, "counts": counts}, "left_out": dict(left_out)}
                words = f"mean of {meaning[quantity]} over {name.replace('_', ' ')} images"
                mean, size = float(values[quantity].mean()), len(values[quantity])
                found.append(Measurement(f"{quantity}_{name}", mean, words, size, more, settings=settings[name]))
        return found


def energy_values(pl_module: LightningModule, x: Tensor) -> Values:
    """Returns ``energy`` E(x) and ``r1`` ‖∇ₓE(x)‖², (N,) each, float64 on the CPU, in eval mode, from any hook."""
    with torch.inference_mode(False), torch.enable_grad(), no_trace(pl_module):
        x = x.detach().clone()
        with torch.no_grad():
            logits = logits_of(pl_module, x, "EnergyStatistics")
        check_energy(logits, type(pl_module).__name__)
        r1 = energy_gradient_norm(pl_module, x)
    return {"energy": marginal_energy(logits.cpu().double()), "r1": r1.detach().cpu().double()}


def _batch_values(pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
    return energy_values(pl_module, batch["x"])


def _spread(values: Tensor) -> dict[str, Any]:
    """Standard deviation and quantiles, the latter interpolated linearly."""
    array = values.numpy()
    quantiles = np.quantile(array, _LEVELS)
    return {"std": float(array.std()), "quantile_levels": list(_LEVELS), "quantiles": quantiles.tolist()}


def _histograms(energies: Mapping[str, Tensor], num_bins: int) -> tuple[list[float], dict[str, list[int]]]:
    """Common edges, and each set's counts; every bin has its lower edge, the last one also its upper."""
    low = min(float(values.min()) for values in energies.values())
    high = max(float(values.max()) for values in energies.values())
    edges = np.linspace(low, high if high > low else low + 1, num_bins + 1)
    counts = {name: np.histogram(values.numpy(), edges)[0].tolist() for name, values in energies.items()}
    return edges.tolist(), counts
