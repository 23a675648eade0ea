"""Accuracy, and robust accuracy under PGD with restarts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dat_lightning.core.ascent import Logits, input_gradient, no_trace
from dat_lightning.core.attack import ascend
from dat_lightning.core.energy import first_weight
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.losses import is_right
from dat_lightning.core.objectives import cross_entropy
from dat_lightning.core.random_streams import stream_seed
from dat_lightning.core.threat_model import ThreatModel, vanishes
from dat_lightning.data.batches import logits_of
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.evaluation.masking import attack_name, masking_signs, share_of, wilson_interval
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement


class RobustAccuracy(Evaluator):
    """Measures accuracy, and robust accuracy under PGD with restarts for each of several threat models.

    An image counts as robust if it is classified correctly, and after every restart too. The first restart begins where
    the threat model says, later ones at random points of the ball; an unbounded one, in which no point is uniform, is
    walked once. Noise is a function of (seed, index, restart), and the first restart is the attack that
    :class:`~dat_lightning.modules.EnergyModule` logs. The network is attacked in eval mode and left as it was.

    With several threat models, results that contradict each other are reported as signs of gradient masking, see
    :func:`~dat_lightning.evaluation.masking.masking_signs`: as warnings, and in the figures' ``details["warnings"]``.
    Useful sets have one step next to many, growing ε, and one that can go anywhere.

    Logged: ``test/accuracy``, and ``test/{name}`` for each threat model, see :meth:`name`.

    Args:
        threat_models: The attacks.
        restarts: Walks per image and threat model.
        dirpath: Folder that keeps the values of each batch, see :class:`Evaluator`.
        seed: Seed of the random starts.

    Attributes:
        results: After a test, per image in the order of ``index``: ``correct``, ``vanished`` (whether the gradient
            vanishes at the image), and under each name whether it is robust after 1, 2, … restarts (N, restarts).

    Raises:
        InputError: If there are no restarts or no threat models, or two of the same name.

    Source: Madry et al. 2018 (arXiv 1706.06083); Athalye et al. 2018 (arXiv 1802.00420), Section 3.1, on the signs.
    """

    name = staticmethod(attack_name)

    def __init__(
        self,
        threat_models: ThreatModel | Sequence[ThreatModel] = ThreatModel(),
        restarts: int = 1,
        dirpath: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dirpath)
        self.threat_models = (threat_models,) if isinstance(threat_models, ThreatModel) else tuple(threat_models)
        names = [self.name(threat_model) for threat_model in self.threat_models]
        if not names or len(set(names)) < len(names):
            raise InputError(f"threat_models must be different ones, at least one, got {names}")
        require_at_least(1, restarts=restarts)
        self.restarts = restarts
        self.seed = seed
        self.results: Values = {}

    @override
    def settings(self) -> dict[str, Any]:
        """Returns attacks, restarts and seed."""
        return {"threat_models": self.threat_models, "restarts": self.restarts, "seed": self.seed}

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns the values of :attr:`results` for a batch, and the number of pixels as ``dimensions``."""
        logits = float_logits(pl_module, type(self).__name__)
        with torch.inference_mode(False), torch.no_grad(), no_trace(pl_module):
            x, y = batch["x"].detach().clone().float(), batch["y"].clone()
            draws = batch["index"].clone()
            output = logits(x)
            self.check_logits(output, y, least=1)
            correct = output.argmax(1) == y
            with torch.enable_grad():
                gradient = input_gradient(logits, x, y, cross_entropy)
            values = {
                "correct": correct,
                "vanished": vanishes(gradient),
                "dimensions": torch.full_like(y, x[0].numel()),
            }
            for threat_model in self.threat_models:
                values[self.name(threat_model)] = self.robust(logits, x, y, draws, correct, threat_model)
        return values

    def robust(
        self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, correct: Tensor, threat_model: ThreatModel
    ) -> Tensor:
        """Returns whether images are still classified correctly after 1, 2, … restarts, (N, restarts)."""
        robust, columns = correct.clone(), []
        for restart in range(self.restarts):
            walk, seed = threat_model, self.seed
            if restart and not math.isinf(threat_model.eps):
                walk, seed = replace(threat_model, random_start=True), stream_seed(self.seed, "restart", restart)
            left = robust.nonzero().squeeze(1)
            # What is broken stays broken, so only the others need another walk.
            if len(left) and not (restart and math.isinf(threat_model.eps)):
                x_adv = ascend(logits, x[left], y[left], cross_entropy, walk, draws=draws[left], seed=seed)
                robust[left] = is_right(logits(x_adv), y[left])
            columns.append(robust.clone())
        return torch.stack(columns, 1)

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns the accuracies with their confidence intervals, and warns of signs of gradient masking."""
        self.results = values
        correct = values["correct"]
        robust = {t: values[self.name(t)][:, -1] for t in self.threat_models}
        signs = masking_signs(correct, robust, values["vanished"], int(values["dimensions"].max()))
        clean = {"confidence_interval": wilson_interval(int(correct.sum()), len(correct))}
        words = "share of images classified correctly"
        found = [Measurement("accuracy", share_of(correct), words, len(correct), clean, "higher")]
        for threat_model, survived in robust.items():
            name = self.name(threat_model)
            warnings = [f"{name}: {sign}" for sign in signs[threat_model]]
            for warning in warnings:
                rank_zero_warn(f"{warning} This is a sign of gradient masking: the figure may be too high.")
            settings = {
                "attack": "PGD on the cross-entropy",
                "threat_model": asdict(threat_model),
                # An unbounded walk has no other start.
                "restarts": 1 if math.isinf(threat_model.eps) else self.restarts,
            }
            details = {
                "seed": self.seed,
                "confidence_interval": wilson_interval(int(survived.sum()), len(survived)),
                "accuracy_after_restarts": values[name].double().mean(0).tolist(),
                "vanishing_gradients": share_of(values["vanished"]),
                "warnings": warnings,
            }
            also, share = f"{words}, also after the attack", share_of(survived)
            found.append(Measurement(name, share, also, len(survived), details, "higher", settings))
        return found


def float_logits(module: LightningModule, who: str) -> Logits:
    """Returns a module of any precision as a function from and to float32.

    Pixels of half precision would be coarser than a small ε.
    """
    weight = first_weight(module, torch.empty(0))

    def logits(x: Tensor) -> Tensor:
        output = logits_of(module, x.to(weight.dtype), who)
        # A copy: Square writes into what it gets.
        return output.to(torch.float32, copy=True)

    return logits
