"""Measured numbers with their settings, gathered over ranks, and the files that keep them."""

from dat_lightning.results.evaluation_file import Evaluation, read_evaluation, write_evaluation
from dat_lightning.results.measurement import Measurement

Figure = Measurement
"""The name that it had when matplotlib's figures were not about."""

__all__ = ["Evaluation", "Figure", "Measurement", "read_evaluation", "write_evaluation"]
