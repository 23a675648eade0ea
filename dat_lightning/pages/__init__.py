"""Pages and plots made from evaluation files, and the style that they share."""

from dat_lightning.pages.evaluation_page import write_evaluation_page
from dat_lightning.pages.evaluation_report import EvaluationReport

__all__ = ["EvaluationReport", "write_evaluation_page"]
