"""An ascent in one call, for evaluation and for scripts: what a module does in training is in its own methods."""

from dataclasses import replace

import torch
from torch import Tensor

from dat_lightning.core.ascent import Ascent, AttackMode, Logits
from dat_lightning.core.errors import InputError
from dat_lightning.core.objectives import Objective
from dat_lightning.core.pixels import require_pixels
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.core.update_rules import STEEPEST, UpdateRule


def ascend(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    threat_model: ThreatModel,
    *,
    rule: UpdateRule = STEEPEST,
    num_steps: int | None = None,
    start: Tensor | None = None,
    mode: AttackMode = "eval",
    draws: Tensor | None = None,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the end of an :class:`Ascent`, shape of ``x``, detached, in one call.

    Its arguments are those of :class:`Ascent` and of :meth:`Ascent.snapshots`; ``num_steps`` takes the place of the
    threat model's.

    Raises:
        InputError: If images are not in [0, 1], which the walk would bring them into, or labels are negative, which
            torch's losses may leave out, besides what :meth:`Ascent.snapshots` refuses.
    """
    require_pixels(x, "x")
    if y.numel() and y.min() < 0:
        raise InputError(f"y must have labels of at least 0, got {int(y.min())}")
    if num_steps is not None:
        threat_model = replace(threat_model, num_steps=num_steps)
    return Ascent(objective, threat_model, rule)(
        logits, x, y, start=start, mode=mode, draws=draws, seed=seed, autocast_dtype=autocast_dtype
    )
