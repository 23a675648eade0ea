"""What a demonstration ends with: its figures as JSON and its samples as ``.npz``."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dat_lightning.demo.evaluation import ATTACK, CHANGE, Evaluation
from dat_lightning.demo.judge import Quality
from dat_lightning.demo.training import STAGES, History, Stage


@dataclass(frozen=True)
class Outcome:
    """Everything that files, report and summary are made of.

    Attributes:
        evaluations: Stage → what was measured.
        histories: Stage → what training logged.
        real_images: The test digits, uint8 (N, 3, H, W), in an order of their own.
        real: The figures of the 360 test digits, judged as if they were samples: what a perfect generator would get.
        contrastive_steps: T at the end of Stage 2.
        auc_threshold: The AUC at which T grows.
        seconds: ``stage1``, ``stage2`` and ``evaluation`` → duration.
        quick: Whether training was cut short, for a test.
    """

    evaluations: Mapping[Stage, Evaluation]
    histories: Mapping[Stage, History]
    real_images: Tensor
    real: Quality
    contrastive_steps: int
    auc_threshold: float
    seconds: Mapping[str, float]
    quick: bool = False

    def figures(self) -> dict[str, Any]:
        """Returns the contents of ``results.json``."""
        figures: dict[str, Any] = {stage: _stage_figures(self.evaluations[stage]) for stage in STAGES}
        figures["stage2"]["contrastive_steps"] = self.contrastive_steps
        figures["seconds"] = {name: round(value, 1) for name, value in self.seconds.items()}
        figures["real_test_digits"] = _rounded(self.real.as_dict())
        figures["sweep"] = {
            stage: {str(n): _rounded(quality.as_dict()) for n, quality in self.evaluations[stage].sweep.items()}
            for stage in STAGES
        }
        figures["robustness"] = {
            stage: {
                "attack_steps": {str(n): round(v, 4) for n, v in self.evaluations[stage].robustness.by_steps.items()},
                "attack_eps": {str(r): round(v, 4) for r, v in self.evaluations[stage].robustness.by_radius.items()},
            }
            for stage in STAGES
        }
        figures["protocol"] = {
            "attack": {
                "norm": ATTACK.norm,
                "eps": ATTACK.eps,
                "step_size": ATTACK.step_size,
                "steps": ATTACK.num_steps,
            },
            "counterfactual_eps": CHANGE.eps,
            "num_samples": len(self.evaluations["stage2"].samples.labels),
            "seeds": {stage: fingerprint(self.evaluations[stage].samples.seeds) for stage in STAGES},
            "quick": self.quick,
        }
        return figures


def write_results(out: Path, outcome: Outcome) -> None:
    """Writes ``results.json`` and one ``samples_{stage}.npz`` per stage, at the best number of steps.

    The ``.npz`` are those of the ADM evaluator: ``arr_0`` (uint8, N×H×W×3) and ``arr_1`` (labels, int64, N).
    """
    (out / "results.json").write_text(json.dumps(outcome.figures(), indent=2) + "\n")
    for stage in STAGES:
        evaluation = outcome.evaluations[stage]
        images = evaluation.samples.images[evaluation.best_steps]
        np.savez(
            out / f"samples_{stage}.npz",
            images.permute(0, 2, 3, 1).contiguous().numpy(),
            evaluation.samples.labels.numpy(),
        )


def fingerprint(images: Tensor) -> str:
    """Returns a short hash of a tensor's numbers: equal seeds have equal ones."""
    return hashlib.blake2b(images.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _stage_figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "accuracy": round(evaluation.robustness.accuracy, 4),
        "robust_accuracy": round(evaluation.robustness.robust_accuracy, 4),
        "sampling_steps": evaluation.best_steps,
        **_rounded(evaluation.best.as_dict()),
        "counterfactual_success": round(evaluation.counterfactuals.success, 4),
    }


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
