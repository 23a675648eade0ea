"""Rare digits: how many of each are kept, which ones, and that nothing else changes."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_lightning import DigitsDataModule, RareDigitsDataModule
from dat_lightning.core.errors import InputError


def entries(data: DigitsDataModule, split: Any = "train") -> tuple[Tensor, Tensor]:
    images = data.in_distribution(split)
    x, y = zip(*(images[k] for k in range(len(images))), strict=True)
    return torch.stack(x), torch.stack(y)


def fingerprints(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_classes_are_kept_in_their_shares(seed: int) -> None:
    whole = Counter(entries(DigitsDataModule())[1].tolist())
    kept = Counter(entries(RareDigitsDataModule(seed=seed))[1].tolist())
    for label in range(10):
        share = (1.0, 0.1, 0.01)[(label + seed) % 3]
        assert kept[label] == max(1, round(whole[label] * share))
    assert sorted(set(kept.values()))[:1] == [1]
    assert {count for count in kept.values() if 5 < count < 20} <= {12, 13}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_styles_are_thirds_of_each_class_by_ink(seed: int) -> None:
    x, y = entries(DigitsDataModule())
    kept_x, kept_y = entries(RareDigitsDataModule("ink", seed=seed))
    kept = set(fingerprints(kept_x))
    for label in range(10):
        mine = x[y == label]
        ink = mine.double().sum((1, 2, 3)).numpy()
        third = np.digitize(ink, np.quantile(ink, [1 / 3, 2 / 3]), right=True)
        for number in range(3):
            part = np.flatnonzero(third == number)
            assert abs(len(part) - len(ink) / 3) < 6  # images of equal ink stay together
            share = (1.0, 0.1, 0.01)[(number + seed) % 3]
            count = sum(f in kept for f in fingerprints(mine[torch.as_tensor(part)]))
            assert count == max(1, round(share * len(part)))
    assert len(kept_y) < 0.45 * len(y)


@pytest.mark.parametrize("rare_by", ["class", "ink"])
def test_which_are_kept_is_a_function_of_the_seed_and_all_are_training_images(rare_by: Any) -> None:
    whole = set(fingerprints(entries(DigitsDataModule())[0]))
    found = {seed: fingerprints(entries(RareDigitsDataModule(rare_by, seed=seed))[0]) for seed in (0, 3)}
    assert found[0] == fingerprints(entries(RareDigitsDataModule(rare_by))[0])
    # The same groups, other images of the rare ones.
    assert 0.7 < len(set(found[0]) & set(found[3])) / len(found[0]) < 1
    assert all(set(each) <= whole for each in found.values())


@pytest.mark.parametrize("rare_by", ["class", "ink"])
def test_group_and_density_of_an_image_say_what_was_kept_of_its_like(rare_by: Any) -> None:
    data = RareDigitsDataModule(rare_by, shares=(1.0, 0.25), seed=1)
    x, y = entries(data, "test")
    groups, log_density = data.groups(x, y), data.log_density(x, y)
    assert data.group_names == ("share_1", "share_0.25")
    assert torch.equal(log_density, torch.tensor([1.0, 0.25], dtype=torch.float64).log()[groups])
    if rare_by == "class":
        assert torch.equal(groups, (y + 1) % 2)
    else:
        train_x, train_y = entries(DigitsDataModule())
        medians = torch.stack([train_x[train_y == k].double().sum((1, 2, 3)).median() for k in range(10)])
        bold = x.double().sum((1, 2, 3)) > medians[y]
        assert float((groups == (bold.long() + 1) % 2).double().mean()) > 0.98


def test_nobody_changes_another_s_groups() -> None:
    """What one DataModule hands out, or keeps, is none of the next one's."""
    found = []
    for _ in range(2):
        data = RareDigitsDataModule("ink")
        x, y = entries(data)
        found.append(data.groups(x, y).clone())
        data._ink_levels.zero_()
    assert torch.equal(*found)


def test_validation_test_and_reference_images_are_all_digits() -> None:
    ours, all_digits = RareDigitsDataModule(seed=2), DigitsDataModule()
    for split in ("val", "test"):
        assert torch.equal(entries(ours, split)[0], entries(all_digits, split)[0])
    assert len(ours.reference_data().dataset) == 1437
    assert ours.training_size < 0.5 * all_digits.training_size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rare_by": "size"}, "rare_by must be 'class' or 'ink', got 'size'"),
        ({"shares": [0.1, 1.0]}, r"shares must be two or more falling numbers in \(0, 1\], got \[0.1, 1.0\]"),
        ({"shares": [1.0, 0.1, 0.1]}, r"falling numbers .*, got \[1.0, 0.1, 0.1\]"),
        ({"shares": [0.1234567, 0.1234566]}, "shares must differ in six digits"),
        ({"shares": [1.0]}, "shares must be two or more"),
        ({"shares": [1.0, 0.0]}, r"in \(0, 1\]"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RareDigitsDataModule(**arguments)
