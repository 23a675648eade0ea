"""LightningModules, one per way of training: Stage 1 in three ways, DAT in seven, JEM, AT-EBM, and what they share."""

from dat_lightning.modules.at_ebm import ATEBMModule
from dat_lightning.modules.base import EnergyModule
from dat_lightning.modules.dat_balanced import DATBalancedModule
from dat_lightning.modules.dat_continued_chains import DATContinuedChainsModule
from dat_lightning.modules.dat_likelihood import DATLikelihoodModule
from dat_lightning.modules.dat_nce import DATNoiseContrastiveModule
from dat_lightning.modules.dat_ratio import DATRatioModule
from dat_lightning.modules.dat_warm_attacks import DATWarmAttacksModule
from dat_lightning.modules.dual_adversarial import DualAdversarialModule, JointLogits
from dat_lightning.modules.jem import JEMModule
from dat_lightning.modules.ratio import RATIOModule
from dat_lightning.modules.replay_buffer import ReplayBufferModule
from dat_lightning.modules.robust_classifier import RobustClassifierModule
from dat_lightning.modules.trades import TradesModule

__all__ = [
    "ATEBMModule",
    "DATBalancedModule",
    "DATContinuedChainsModule",
    "DATLikelihoodModule",
    "DATNoiseContrastiveModule",
    "DATRatioModule",
    "DATWarmAttacksModule",
    "DualAdversarialModule",
    "EnergyModule",
    "JEMModule",
    "JointLogits",
    "RATIOModule",
    "ReplayBufferModule",
    "RobustClassifierModule",
    "TradesModule",
]
