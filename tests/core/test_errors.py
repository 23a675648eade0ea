"""The checks of least values, and that constructors which take numbers refuse null in a sentence."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from dat_lightning import AUCCurriculum, DigitsDataModule, DivergenceGuard, PGDSampler, RobustAccuracy, ThreatModel
from dat_lightning.core.errors import InputError, require_at_least, require_finite
from dat_lightning.evaluation import Calibration


@pytest.mark.parametrize(("minimum", "value"), [(1, 0), (0, -1), (0, -1e-9), (0, math.nan), (1, None)])
def test_what_is_less_than_the_least_value_is_named(minimum: float, value: float | None) -> None:
    with pytest.raises(InputError, match=f"^b must be at least {minimum}, got {value}$"):
        require_at_least(minimum, a=minimum, b=value)


@pytest.mark.parametrize(("minimum", "value"), [(1, 1), (0, 0), (0, 1e-9), (2, math.inf)])
def test_the_least_value_and_more_are_accepted(minimum: float, value: float) -> None:
    require_at_least(minimum, a=value)


@pytest.mark.parametrize("value", [-1e-9, -math.inf, math.inf, math.nan, None])
def test_what_is_to_be_finite_is_no_more_than_that(value: float | None) -> None:
    require_finite(0, a=0, b=1e300)
    with pytest.raises(InputError, match=f"^b must be a finite number of at least 0, got {value}$"):
        require_finite(0, a=0, b=value)


@pytest.mark.parametrize(
    ("made", "name", "what"),
    [
        (AUCCurriculum, "window_samples", "a whole number of at least 1"),
        (Calibration, "num_bins", "at least 1"),
        (DigitsDataModule, "batch_size", "a whole number of at least 1"),
        (DigitsDataModule, "num_workers", "a whole number of at least 0"),
        (DivergenceGuard, "max_saved", "at least 0"),
        (PGDSampler, "num_samples", "a whole number of at least 1"),
        (RobustAccuracy, "restarts", "at least 1"),
        (ThreatModel, "num_steps", "a whole number of at least 0"),
    ],
)
def test_null_is_refused_in_a_sentence(made: Callable[..., Any], name: str, what: str) -> None:
    with pytest.raises(InputError, match=f"^{name} must be {what}, got None$"):
        made(**{name: None})
