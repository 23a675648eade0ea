"""Pages and plots from evaluation files, and the style that all pages share."""

from dat_lightning.reports.evaluation_file import Entry, Evaluation, read_evaluation, write_evaluation
from dat_lightning.reports.evaluation_page import write_evaluation_page

__all__ = [
    "Entry",
    "Evaluation",
    "read_evaluation",
    "write_evaluation",
    "write_evaluation_page",
]
