"""Studies: runs of several configurations and seeds that answer one question, trained, tested and told as one page."""

from dat_lightning.studies.label_agreement import DigitsJudge, LabelAgreement
from dat_lightning.studies.planning import Plan, plan
from dat_lightning.studies.study_file import Study, read_study

__all__ = ["DigitsJudge", "LabelAgreement", "Plan", "Study", "plan", "read_study"]
