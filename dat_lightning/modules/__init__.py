"""LightningModules, one per way of training: Stage 1 in two ways, Stage 2, JEM, and what they share."""

from dat_lightning.modules.base import EnergyModule
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.jem import JEMModule
from dat_lightning.modules.robust_classifier import RobustClassifierModule
from dat_lightning.modules.trades import TradesModule

__all__ = [
    "DualAdversarialModule",
    "EnergyModule",
    "JEMModule",
    "JointLogits",
    "RobustClassifierModule",
    "TradesModule",
]
