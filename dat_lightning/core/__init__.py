"""The method, in torch and NumPy alone: energies, objectives, threat models, ascents, losses, curriculum, streams."""

from dat_lightning.core.ascent import (
    AUTOCAST_DTYPES,
    Ascent,
    AttackMode,
    Logits,
    Precision,
    input_gradient,
    no_trace,
    unbounded_ascent,
)
from dat_lightning.core.attack import ascend
from dat_lightning.core.constraints import Constrained, Constraint, FixedPixels, PooledPixels, pooled
from dat_lightning.core.curriculum import AUCCurriculum, auc
from dat_lightning.core.editing import Edit, denoising, harmonic, inpainting, super_resolution
from dat_lightning.core.energy import batch_norm_layers, joint_energy, marginal_energy
from dat_lightning.core.jacobian import jacobian_norm
from dat_lightning.core.losses import (
    energy_bce,
    energy_difference,
    energy_gradient_norm,
    is_right,
    mean_distance_to_uniform,
    r1_penalty,
    robust_cross_entropy,
)
from dat_lightning.core.noise_contrastive import TiedGaussians, best_offset
from dat_lightning.core.objectives import (
    Objective,
    cross_entropy,
    distance_to_uniform,
    negative_marginal_energy,
    targeted_logit,
)
from dat_lightning.core.random_streams import (
    RandomPermutation,
    normal_noise,
    stream_generator,
    stream_seed,
    uniform_noise,
)
from dat_lightning.core.threat_model import Norm, ThreatModel, project, random_start, steepest_step, vanishes
from dat_lightning.core.update_rules import (
    Langevin,
    Momentum,
    PixelAdam,
    RandomLength,
    State,
    Steepest,
    Step,
    UpdateRule,
)

__all__ = [
    "AUTOCAST_DTYPES",
    "AUCCurriculum",
    "Ascent",
    "AttackMode",
    "Constrained",
    "Constraint",
    "Edit",
    "FixedPixels",
    "Langevin",
    "Logits",
    "Momentum",
    "Norm",
    "Objective",
    "PixelAdam",
    "PooledPixels",
    "Precision",
    "RandomLength",
    "RandomPermutation",
    "State",
    "Steepest",
    "Step",
    "ThreatModel",
    "TiedGaussians",
    "UpdateRule",
    "ascend",
    "auc",
    "batch_norm_layers",
    "best_offset",
    "cross_entropy",
    "denoising",
    "distance_to_uniform",
    "energy_bce",
    "energy_difference",
    "energy_gradient_norm",
    "harmonic",
    "inpainting",
    "input_gradient",
    "is_right",
    "jacobian_norm",
    "joint_energy",
    "marginal_energy",
    "mean_distance_to_uniform",
    "negative_marginal_energy",
    "no_trace",
    "normal_noise",
    "pooled",
    "project",
    "r1_penalty",
    "random_start",
    "robust_cross_entropy",
    "steepest_step",
    "stream_generator",
    "stream_seed",
    "super_resolution",
    "targeted_logit",
    "unbounded_ascent",
    "uniform_noise",
    "vanishes",
]
