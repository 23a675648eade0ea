"""Studies: runs of several configurations and seeds that answer one question, trained, tested and told as one page."""

from dat_lightning.evaluation.label_agreement import LabelAgreement
from dat_lightning.features.digits_judge import DigitsJudge
from dat_lightning.studies.planning import Plan, plan
from dat_lightning.studies.study_file import Study, read_study

__all__ = ["DigitsJudge", "LabelAgreement", "Plan", "Study", "plan", "read_study"]
