"""Measured numbers with their settings, gathered over ranks, and the files that keep them."""

from dat_lightning.results.evaluation_file import Entry, Evaluation, read_evaluation, write_evaluation
from dat_lightning.results.figures import Figure

__all__ = ["Entry", "Evaluation", "Figure", "read_evaluation", "write_evaluation"]
