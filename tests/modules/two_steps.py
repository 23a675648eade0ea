"""Stage-2 modules as tests of their losses begin with them."""

from typing import Any

from dat_lightning import AUCCurriculum, DualAdversarialModule
from tests import tiny


def with_two_steps(kind: type[DualAdversarialModule], **kwargs: Any) -> Any:
    """Returns a module with T = 2, which does not move."""
    curriculum = AUCCurriculum(max_steps=4, auc_threshold=1.0)
    curriculum.num_steps.fill_(2)
    fixed = {"energy_model": tiny.energy_model(), "threat_model": tiny.ATTACK, "contrastive_step_size": 0.4}
    module = kind(**{**fixed, "optimizer": tiny.SGD, "curriculum": curriculum, **kwargs})
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module
