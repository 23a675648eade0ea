from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dat_lightning import DigitsFeatures, PGDSampler, SampleMetrics
from dat_lightning.core.errors import InputError
from dat_lightning.evaluation import LabelAgreement
from dat_lightning.evaluation.label_agreement import classes_read
from dat_lightning.features import DigitsJudge
from dat_lightning.features.fidelity import FidelitySettings
from tests.tiny import digits, stage1, trainer


class Brightness(nn.Module):
    """Reads an image as the class of its first pixel's decile."""

    def forward(self, images: Tensor) -> Tensor:
        level = (images[:, 0, 0, 0] * 10).long().clamp(0, 9)
        return nn.functional.one_hot(level, 10).float()


def sampled(tmp_path: Path, agreement: LabelAgreement, *others: Any, num_steps: tuple[int, ...] = (1, 3)) -> Any:
    """Images after each number of steps, of 30 samples."""
    seen: dict[int, Tensor] = {}
    original = agreement.on_samples_batch

    def spy(run: Any, module: Any, batch: Any) -> None:
        for steps, images in batch.images.items():
            seen[steps] = torch.cat([seen.get(steps, images[:0]), images])
        original(run, module, batch)

    agreement.on_samples_batch = spy  # type: ignore[method-assign,assignment]
    sampler = PGDSampler(num_samples=30, num_steps=num_steps, step_size=0.5, batch_size=8)
    run = trainer(tmp_path, [sampler, *others, agreement])
    run.test(stage1(), datamodule=digits(), verbose=False)
    return seen


def test_the_share_is_that_of_images_read_as_their_class(tmp_path: Path) -> None:
    agreement = LabelAgreement(Brightness())
    seen = sampled(tmp_path, agreement)
    wanted = torch.arange(30) % 10
    shares = {steps: ((x[:, 0, 0, 0] * 10).long().clamp(0, 9) == wanted).double().mean() for steps, x in seen.items()}
    figures = {figure.name: figure for figure in agreement.figures}
    assert set(figures) == {"label_agreement", "label_agreement_1_steps", "label_agreement_3_steps"}
    for steps, share in shares.items():
        assert figures[f"label_agreement_{steps}_steps"].value == pytest.approx(float(share), rel=1e-12)
    assert figures["label_agreement"].value == figures["label_agreement_3_steps"].value
    assert figures["label_agreement"].details["sweep"] == [figures[f"label_agreement_{s}_steps"].value for s in (1, 3)]
    assert figures["label_agreement"].num_samples == 30


def test_the_number_of_steps_is_that_of_the_smallest_distance(tmp_path: Path) -> None:
    agreement = LabelAgreement(DigitsJudge())
    metrics = SampleMetrics(DigitsFeatures(), metrics=["fid"], settings=FidelitySettings())
    sampled(tmp_path, agreement, metrics, num_steps=(2, 40))
    best = metrics.figures[0].details["num_steps"]
    head = agreement.figures[0]
    assert head.details["num_steps"] == best
    assert head.value == dict(zip(head.details["sweep_steps"], head.details["sweep"], strict=True))[best]
    # Wherever it stands in the list.
    agreement._chooser = None
    assert agreement.figures[0].details["num_steps"] == 40


def test_without_samples_there_is_nothing_to_tell() -> None:
    assert LabelAgreement(Brightness()).figures == []


def test_wrong_judges_are_a_sentence(tmp_path: Path) -> None:
    module = stage1()
    run = trainer(tmp_path, [PGDSampler(num_samples=4, num_steps=(1,)), LabelAgreement(module.energy_model)])
    with pytest.raises(ValueError, match="judge must be independent of the network under test"):
        run.test(module, datamodule=digits(), verbose=False)


class Undecided(nn.Module):
    """Gives NaN, of which the largest is the first."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 3), torch.nan)


def test_a_judge_that_gives_nan_reads_nothing() -> None:
    with pytest.raises(InputError, match="a judge"):
        classes_read(Undecided(), torch.rand(2, 1, 4, 4), torch.tensor([0, 2]), "a judge")


class Coarse(nn.Module):
    """Knows five classes of the ten."""

    def forward(self, images: Tensor) -> Tensor:
        return Brightness().forward(images)[:, :5]


def test_a_judge_with_fewer_classes_than_labels_reads_nothing(tmp_path: Path) -> None:
    """It could never agree where a label is none of its classes: 0 % would be no finding."""
    with pytest.raises(InputError, match=r"LabelAgreement\.judge: labels must lie in 0 … 4, got 0 … 7"):
        sampled(tmp_path, LabelAgreement(Coarse()))
    images = torch.rand(3, 1, 4, 4)
    labels = torch.tensor([0, 4, 2])
    assert torch.equal(classes_read(Coarse(), images, labels, "a judge"), Coarse()(images).argmax(1))
    with pytest.raises(InputError, match=r"a judge: labels must lie in 0 … 4, got 0 … 5"):
        classes_read(Coarse(), images, labels + torch.tensor([0, 1, 0]), "a judge")
