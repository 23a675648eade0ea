"""Relative density: rank correlations and figures of groups against scipy and plain loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from dat_lightning import PlaneDataModule, RareDigitsDataModule, RelativeDensity
from dat_lightning.core.errors import InputError
from dat_lightning.evaluation import rank_correlation
from dat_lightning.results import Measurement
from tests import tiny
from tests.evaluation.planes import examples_of, plane_module, points


def measured(path: Path, module: LightningModule, data: Any, **trainer: Any) -> dict[str, Measurement]:
    evaluator = RelativeDensity()
    run = tiny.trainer(path, [evaluator], **trainer)
    run.test(module, datamodule=data, verbose=False)
    found = {figure.name: figure for figure in evaluator.figures}
    for name, figure in found.items():
        assert float(run.callback_metrics[f"test/{name}"]) == pytest.approx(figure.value, rel=1e-5)
    return found


@pytest.mark.parametrize("num_classes", [5, 1])
def test_figures_of_the_plane_are_those_of_scipy(num_classes: int, tmp_path: Path) -> None:
    data, module = points(), plane_module(num_classes)
    found = measured(tmp_path, module, data)
    x, y = examples_of(data)
    with torch.no_grad():
        logits = module.eval()(x).double().numpy()
    score = np.log(np.exp(logits).sum(1))
    log_p, groups = data.log_density(x, y).numpy(), y.numpy()
    assert found["rank_correlation"].value == pytest.approx(stats.spearmanr(score, log_p).statistic, rel=1e-6)
    rows = [np.flatnonzero(groups == k) for k in range(5)]
    least = min(map(len, rows))
    some = np.concatenate([row[:least] for row in rows])
    expected = stats.spearmanr(score[some], log_p[some]).statistic
    assert found["rank_correlation_balanced"].value == pytest.approx(expected, rel=1e-6)
    assert found["rank_correlation_balanced"].num_samples == 5 * least < 400
    each = [stats.spearmanr(score[row], log_p[row]).statistic for row in rows]
    assert found["rank_correlation_within"].value == pytest.approx(np.mean(each), rel=1e-6)
    for k, row in enumerate(rows):
        assert found[f"score_class_{k}"].value == pytest.approx(score[row].mean(), rel=1e-5)
        own = logits[row, 0 if num_classes == 1 else k].mean()
        assert found[f"class_score_class_{k}"].value == pytest.approx(own, rel=1e-5, abs=1e-6)
        if num_classes > 1:
            right = (logits[row].argmax(1) == k).mean()
            assert found[f"accuracy_class_{k}"].value == pytest.approx(right, abs=1e-12)
        if k:
            pairs = np.mean([[float(a > b) + 0.5 * float(a == b) for b in score[row]] for a in score[rows[0]]])
            assert found[f"rarity_auroc_class_{k}"].value == pytest.approx(pairs, rel=1e-6)
    assert ("accuracy_class_0" in found) == (num_classes > 1)
    assert "rarity_auroc_class_0" not in found


def test_an_energy_that_is_the_density_has_a_rank_correlation_of_one(tmp_path: Path) -> None:
    data = points("moons")

    class Exact(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            return data.log_density(x, x[:, 0]).float().unsqueeze(1).expand(-1, 2)

        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    found = measured(tmp_path, Exact(), data)
    for name in ("rank_correlation", "rank_correlation_balanced", "rank_correlation_within"):
        assert found[name].value == pytest.approx(1, abs=1e-3)
    assert found["rarity_auroc_class_1"].value > 0.9


@pytest.mark.parametrize("rare_by", ["class", "ink"])
def test_groups_of_digits_are_compared(rare_by: Any, tmp_path: Path) -> None:
    data, module = RareDigitsDataModule(rare_by, num_ood=50, num_held_out=50), tiny.stage1()
    found = measured(tmp_path, module, data)
    x, y = examples_of(data)
    with torch.no_grad():
        score = module.eval()(x).double().logsumexp(1).numpy()
    groups = data.groups(x, y).numpy()
    shares = np.log(np.array([1, 0.1, 0.01]))[groups]
    assert found["rank_correlation"].value == pytest.approx(stats.spearmanr(score, shares).statistic, rel=1e-6)
    # Within a group all have one density.
    assert "rank_correlation_within" not in found
    for k, name in ((1, "share_0.1"), (2, "share_0.01")):
        area = stats.mannwhitneyu(score[groups == 0], score[groups == k]).statistic
        expected = area / (groups == 0).sum() / (groups == k).sum()
        assert found[f"rarity_auroc_{name}"].value == pytest.approx(expected, rel=1e-6)


def test_kept_values_are_none_of_the_data_s_own(tmp_path: Path) -> None:
    """The same images are rare by one rule and common by the other: a folder that one has used does not tell."""
    module, found = tiny.stage1(), []
    for folder, rules in (("used", ("class", "ink")), ("fresh", ("ink",))):
        for rule in rules:
            evaluator = RelativeDensity(dirpath=str(tmp_path / folder))
            data = RareDigitsDataModule(rule, num_ood=50, num_held_out=50)  # type: ignore[arg-type]
            tiny.trainer(tmp_path, [evaluator]).test(module, datamodule=data, verbose=False)
            found.append({figure.name: figure.value for figure in evaluator.figures})
    by_class, by_ink, fresh = found
    assert by_ink == fresh
    assert by_class["rank_correlation"] != fresh["rank_correlation"]


def test_ties_have_their_mean_rank() -> None:
    a, b = torch.tensor([1.0, 1.0, 2.0, 5.0, 5.0, 5.0]), torch.tensor([3.0, 1.0, 1.0, 4.0, 7.0, 7.0])
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-6)
    # Differences that float32 cannot tell.
    a = 1 + torch.arange(5, dtype=torch.float64) * 1e-12
    assert rank_correlation(a, torch.arange(5)) == pytest.approx(1, rel=1e-6)


def test_batches_do_not_matter(tmp_path: Path) -> None:
    one, two = (
        measured(tmp_path, plane_module(), PlaneDataModule("pinwheel", 64, 400, eval_batch_size=n)) for n in (400, 33)
    )
    assert {n: f.value for n, f in two.items()} == pytest.approx({n: f.value for n, f in one.items()}, rel=1e-5)


def test_data_that_know_no_density_and_groups_without_images_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="RelativeDensity needs a DataModule with group_names"):
        measured(tmp_path, tiny.stage1(), tiny.digits())
    with pytest.raises(InputError, match="no test image is of the group 'class_1'"):
        measured(tmp_path, plane_module(), PlaneDataModule("pinwheel", 64, 2))
