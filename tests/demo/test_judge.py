"""The judge's figures, each against a derivation of its own."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from dat_lightning.data import to_uint8_rgb
from dat_lightning.demo.judge import Judge, digits_for_testing, spread
from dat_lightning.features import DigitsFeatures
from dat_lightning.features.layers import extract_features
from dat_lightning.sampling import FrechetDistance


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def test_real_digits_are_read_as_well_as_the_support_vector_machine_can(judge: Judge) -> None:
    digits = load_digits()
    places = np.arange(len(digits.target))
    train, test = train_test_split(places, test_size=360, stratify=digits.target, random_state=0)
    machine = SVC(C=10, gamma="scale").fit(digits.data[train] / 16, digits.target[train])
    x, y = digits_for_testing()
    assert y.tolist() == digits.target[test].tolist()
    # An area average of 2×2 pixels, on the eight bits that the judge is given.
    pixels = (x.numpy()[:, 0] * 255).round() / 255
    blocks = pixels.reshape(360, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(360, 64)
    expected = (machine.predict(blocks) == digits.target[test]).mean()
    assert judge.label_agreement(to_uint8_rgb(x), y) == pytest.approx(expected, abs=1e-9)
    assert expected > 0.97
    assert expected == pytest.approx(machine.score(digits.data[test] / 16, digits.target[test]), abs=0.01)


def test_training_digits_judged_as_samples_are_perfect(judge: Judge) -> None:
    quality = judge.score(judge.real_images, judge.real_labels)
    assert quality.precision == 1
    assert quality.recall == 1
    assert quality.fid == pytest.approx(0, abs=1e-6)
    assert quality.diversity == 1
    assert quality.label_agreement > 0.99


def test_one_digit_over_and_over_is_precise_and_not_varied(judge: Judge) -> None:
    images, labels = judge.real_images[:1].repeat(300, 1, 1, 1), judge.real_labels[:1].repeat(300)
    quality = judge.score(images, labels)
    assert quality.precision == 1
    assert quality.recall < 0.05
    assert quality.diversity == 0
    assert quality.fid > 100


def test_noise_is_far_from_digits_and_covers_none(judge: Judge) -> None:
    generator = torch.Generator().manual_seed(0)
    images = to_uint8_rgb(torch.rand(200, 1, 16, 16, generator=generator))
    quality = judge.score(images, torch.arange(200) % 10)
    assert quality.recall < 0.1
    assert quality.fid > 100
    assert quality.label_agreement < 0.3


def test_wrong_labels_do_not_agree(judge: Judge) -> None:
    x, y = digits_for_testing()
    assert judge.label_agreement(to_uint8_rgb(x), (y + 1) % 10) < 0.02


def test_the_features_are_those_of_the_callback(judge: Judge) -> None:
    x, _ = digits_for_testing()
    callback = FrechetDistance(DigitsFeatures())
    torch.testing.assert_close(judge.features(to_uint8_rgb(x[:50])), extract_features(callback.extractor, x[:50]))


def test_spread_is_the_mean_distance_within_classes() -> None:
    images = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    images[1] = 255  # class 0: one pair, at distance 2
    images[3, 0, 0, 0] = 255  # class 1: one pair, at distance 1
    # Class 2 has a single image and no distance.
    assert spread(images, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(1.5)


def test_the_report_says_how_large_digits_are() -> None:
    x, y = digits_for_testing()
    flat = x.flatten(1)
    distances = torch.cdist(flat, flat).masked_fill(y[:, None] == y[None], float("inf"))
    assert round(float(flat.norm(dim=1).mean())) == 7
    assert round(float(distances.min(1).values.mean())) == 3
