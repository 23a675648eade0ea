"""Files of weights: ours and other people's in, without running code from them; safetensors and the Hub out."""

from dat_lightning.weights.foreign import StandIn
from dat_lightning.weights.hub import EnergyModel
from dat_lightning.weights.loading import LoadedWeights, load_weights
from dat_lightning.weights.reading import read_checkpoint
from dat_lightning.weights.shipped import pretrained, shipped_models
from dat_lightning.weights.stamp import (
    changed_settings,
    check_hyperparameters,
    check_stamp,
    check_states,
    run_of,
    settings_of_module,
    stamp,
)

__all__ = [
    "EnergyModel",
    "LoadedWeights",
    "StandIn",
    "changed_settings",
    "check_hyperparameters",
    "check_stamp",
    "check_states",
    "load_weights",
    "pretrained",
    "read_checkpoint",
    "run_of",
    "settings_of_module",
    "shipped_models",
    "stamp",
]
