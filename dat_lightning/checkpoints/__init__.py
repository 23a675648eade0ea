"""Weights from files, ours and other people's, read without running code from them."""

from dat_lightning.checkpoints.layouts import energy_model_weights
from dat_lightning.checkpoints.loading import LoadedWeights, load_weights
from dat_lightning.checkpoints.pickles import StandIn
from dat_lightning.checkpoints.reading import read_checkpoint

__all__ = ["LoadedWeights", "StandIn", "energy_model_weights", "load_weights", "read_checkpoint"]
