"""What real test images get is what a plain computation gets, whatever the samples are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_lightning import DigitsFeatures, PGDSampler, SampleMetrics
from dat_lightning.data import to_uint8_rgb
from dat_lightning.evaluation import RealImages
from dat_lightning.features.fidelity import FidelitySettings
from tests.tiny import digits, stage1, trainer


def features(images: Any) -> Tensor:
    extractor = DigitsFeatures().eval()
    with torch.no_grad():
        found: Tensor = extractor(to_uint8_rgb(torch.stack([images[k][0] for k in range(len(images))])))
    return found.double()


def inside(points: Tensor, manifold: Tensor, k: int) -> float:
    """Share of points within some manifold point's distance to its k-th neighbour."""
    radii = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
    return float((torch.cdist(points, manifold) <= radii).any(1).double().mean())


def measured(path: Path, order: tuple[int, int, int] = (0, 1, 2), **kwargs: Any) -> dict[str, Any]:
    real = RealImages(kwargs.pop("dirpath", None))
    parts = [PGDSampler(num_samples=20, num_steps=[1], step_size=0.5), SampleMetrics(DigitsFeatures(), **kwargs), real]
    run = trainer(path, [parts[k] for k in order])
    run.test(stage1(), datamodule=digits(), verbose=False)
    assert {f"test/{each.name}" for each in real.figures} <= set(run.callback_metrics)
    return {each.name: each for each in real.figures}


def test_the_figures_are_those_of_a_plain_computation(tmp_path: Path) -> None:
    settings = FidelitySettings(prc_neighborhood=4)
    found = measured(tmp_path, metrics=["fid", "prc"], settings=settings)
    data = digits()
    test, train = features(data.in_distribution("test")), features(data.reference_data().dataset)
    means, covariances = zip(*[(x.mean(0).numpy(), np.cov(x.numpy().T)) for x in (test, train)], strict=True)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0))
    distance = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum()
    assert found["real_fid"].value == pytest.approx(float(distance), rel=1e-4)
    assert found["real_precision"].value == pytest.approx(inside(test, train, 4), abs=0.003)
    assert found["real_recall"].value == pytest.approx(inside(train, test, 4), abs=0.003)
    for each in found.values():
        assert each.num_samples == len(test) == 360
        assert each.settings["test_images"]
        assert each.better is None


def test_neither_the_order_of_callbacks_nor_kept_values_change_them(tmp_path: Path) -> None:
    kept = str(tmp_path / "kept")
    first = measured(tmp_path, metrics=["fid"], dirpath=kept)
    assert list(Path(kept).rglob("*.*"))
    for order in ((2, 1, 0), (1, 2, 0)):
        again = measured(tmp_path, order, metrics=["fid"], dirpath=kept)
        assert again["real_fid"].value == first["real_fid"].value


def test_names_have_the_prefix_of_the_metrics(tmp_path: Path) -> None:
    assert list(measured(tmp_path, metrics=["fid"], prefix="dino_")) == ["real_dino_fid"]


def test_it_needs_sample_metrics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RealImages measures as SampleMetrics does: add one to trainer\.callbacks"):
        trainer(tmp_path, [RealImages()]).test(stage1(), datamodule=digits(), verbose=False)
