import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dat_lightning.core import AUCCurriculum, auc


def history(curriculum: AUCCurriculum, values: list[float], batch_size: int) -> list[int]:
    """T after each of the updates."""
    steps = []
    for value in values:
        curriculum.update(torch.tensor(value), batch_size)
        steps.append(int(curriculum.num_steps))
    return steps


@settings(deadline=None)
@given(
    positive=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    negative=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
)
def test_auc_equals_scikit_learn_s_with_many_ties(positive: list[int], negative: list[int]) -> None:
    expected = roc_auc_score([1] * len(positive) + [0] * len(negative), positive + negative)
    value = auc(torch.tensor(positive, dtype=torch.float32), torch.tensor(negative, dtype=torch.float32))
    assert math.isclose(value.item(), expected, rel_tol=1e-6, abs_tol=1e-6)


def test_auc_equals_scikit_learn_s_without_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(64, generator=generator) + 0.5, torch.randn(50, generator=generator)
    expected = roc_auc_score(np.repeat([1, 0], [64, 50]), torch.cat([positive, negative]).numpy())
    assert math.isclose(auc(positive, negative).item(), expected, rel_tol=1e-6)


def test_auc_of_separated_scores_is_one_and_of_the_reverse_zero() -> None:
    high, low = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0, 1.5])
    assert (auc(high, low).item(), auc(low, high).item(), auc(low, low).item()) == (1.0, 0.0, 0.5)


def test_t_grows_once_the_window_is_full_and_the_window_is_emptied_then() -> None:
    curriculum = AUCCurriculum(max_steps=10, auc_threshold=0.75, window_samples=1000)
    # ceil(1000 / 300) = 4 values fill the window.
    assert history(curriculum, [1.0] * 9, 300) == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_the_window_slides_and_its_mean_counts_up_to_equality() -> None:
    curriculum = AUCCurriculum(max_steps=10, auc_threshold=0.75, window_samples=2)
    # Means of the last two: -, 0.625, 0.625, 0.75 (grow); then -, 0.5, 0.75 (grow).
    values = [1.0, 0.25, 1.0, 0.5, 0.5, 0.5, 1.0]
    assert history(curriculum, values, 1) == [0, 0, 0, 1, 1, 1, 2]


def test_t_never_exceeds_its_maximum() -> None:
    curriculum = AUCCurriculum(max_steps=2, auc_threshold=0.0, initial_steps=1, window_samples=1)
    assert history(curriculum, [1.0] * 5, 8) == [2, 2, 2, 2, 2]


def test_another_batch_size_starts_the_window_anew() -> None:
    curriculum = AUCCurriculum(max_steps=10, auc_threshold=0.5, window_samples=4)
    assert history(curriculum, [1.0, 1.0, 1.0], 1) == [0, 0, 0]
    # A window of two: the three easy steps before are of no use, and one more does not fill it.
    assert history(curriculum, [1.0, 0.0, 1.0], 2) == [0, 1, 1]


@settings(max_examples=60, deadline=None)
@given(
    updates=st.lists(st.tuples(st.integers(0, 8), st.sampled_from([1, 2, 3, 8])), max_size=40),
    threshold=st.integers(0, 8),
    max_steps=st.integers(0, 5),
    window_samples=st.integers(1, 7),
)
def test_the_curriculum_equals_a_plain_list(
    updates: list[tuple[int, int]], threshold: int, max_steps: int, window_samples: int
) -> None:
    curriculum = AUCCurriculum(max_steps, threshold / 8, window_samples=window_samples)
    steps, window, last_length = 0, list[int](), 0
    for eighths, batch_size in updates:
        length = math.ceil(window_samples / batch_size)
        window = window if length == last_length else []
        last_length = length
        window = [*window, eighths][-length:]
        if len(window) == length and sum(window) >= threshold * length and steps < max_steps:
            steps, window = steps + 1, []
        curriculum.update(torch.tensor(eighths / 8), batch_size)
        assert int(curriculum.num_steps) == steps


def test_a_step_without_an_auc_neither_counts_nor_drags_the_mean() -> None:
    curriculum = AUCCurriculum(auc_threshold=0.8, window_samples=30)
    for value in (1.0, math.nan, 0.9, math.nan, math.nan):
        curriculum.update(torch.tensor(value), 10)
    assert int(curriculum.num_steps) == 0
    curriculum.update(torch.tensor(0.5), 10)  # the third of the window, whose mean is 0.8
    assert int(curriculum.num_steps) == 1


def test_a_state_dict_carries_everything_at_any_moment() -> None:
    def curriculum() -> AUCCurriculum:
        return AUCCurriculum(max_steps=50, auc_threshold=0.5, window_samples=20)

    values = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    expected = history(curriculum(), values, 4)
    assert expected[-1] > 2
    for stop in range(30):
        first, second = curriculum(), curriculum()
        begun = history(first, values[:stop], 4)
        second.load_state_dict(first.state_dict())
        assert begun + history(second, values[stop:], 4) == expected


def test_updates_need_no_graph_and_leave_none() -> None:
    curriculum = AUCCurriculum(window_samples=2)
    curriculum.update(torch.tensor(0.5, requires_grad=True), 1)
    assert not any(buffer.requires_grad for buffer in curriculum.buffers())
    assert list(curriculum.parameters()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_steps": 51}, "initial_steps .* 51"),
        ({"initial_steps": -1}, "initial_steps .* -1"),
        ({"auc_threshold": 1.01}, "auc_threshold .* 1.01"),
        ({"window_samples": 0}, "window_samples .* 0"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AUCCurriculum(**arguments)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        AUCCurriculum().update(torch.tensor(0.5), 0)
