"""The method itself, in torch (hub.py: the Hub's client too): energies, attacks, losses, curriculum, statistics."""

from dat_lightning.core.architectures import architecture_of, build_architecture, register_architecture
from dat_lightning.core.curriculum import AUCCurriculum, auc
from dat_lightning.core.energy import batch_norm_layers, joint_energy, marginal_energy
from dat_lightning.core.fingerprint import SizedDataset, data_fingerprint, module_fingerprint, shared_images
from dat_lightning.core.folding import FoldedNetwork
from dat_lightning.core.gaussian_stats import FeatureMoments, Gaussian, frechet_distance
from dat_lightning.core.hub import EnergyModel
from dat_lightning.core.images import to_uint8_rgb
from dat_lightning.core.losses import energy_bce, energy_gradient_norm, r1_penalty, robust_cross_entropy
from dat_lightning.core.network_forms import CompiledNetwork, CompileMode, NetworkForms
from dat_lightning.core.objectives import (
    Objective,
    cross_entropy,
    distance_to_uniform,
    negative_marginal_energy,
    targeted_logit,
)
from dat_lightning.core.pgd import (
    AUTOCAST_DTYPES,
    AttackMode,
    Logits,
    Precision,
    ascend,
    ascend_snapshots,
    input_gradient,
    no_trace,
    unbounded_ascent,
)
from dat_lightning.core.random_streams import (
    RandomPermutation,
    normal_noise,
    stream_generator,
    stream_seed,
    uniform_noise,
)
from dat_lightning.core.threat_model import Norm, ThreatModel, project, random_start, steepest_step

__all__ = [
    "AUTOCAST_DTYPES",
    "AUCCurriculum",
    "AttackMode",
    "CompileMode",
    "CompiledNetwork",
    "EnergyModel",
    "FeatureMoments",
    "FoldedNetwork",
    "Gaussian",
    "Logits",
    "NetworkForms",
    "Norm",
    "Objective",
    "Precision",
    "RandomPermutation",
    "SizedDataset",
    "ThreatModel",
    "architecture_of",
    "ascend",
    "ascend_snapshots",
    "auc",
    "batch_norm_layers",
    "build_architecture",
    "cross_entropy",
    "data_fingerprint",
    "distance_to_uniform",
    "energy_bce",
    "energy_gradient_norm",
    "frechet_distance",
    "input_gradient",
    "joint_energy",
    "marginal_energy",
    "module_fingerprint",
    "negative_marginal_energy",
    "no_trace",
    "normal_noise",
    "project",
    "r1_penalty",
    "random_start",
    "register_architecture",
    "robust_cross_entropy",
    "shared_images",
    "steepest_step",
    "stream_generator",
    "stream_seed",
    "targeted_logit",
    "to_uint8_rgb",
    "unbounded_ascent",
    "uniform_noise",
]
