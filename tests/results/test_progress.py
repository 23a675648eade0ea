from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import Trainer

from dat_lightning.results import progress


@pytest.mark.parametrize(
    ("parent", "world_size", "warned"), [(object(), 2, True), (None, 2, False), (object(), 1, False)]
)
def test_figures_that_stay_in_their_processes_are_told_of(
    parent: Any, world_size: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(progress, "rank_zero_warn", told.append)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: parent)
    progress.warn_if_spawned(cast(Trainer, SimpleNamespace(world_size=world_size)), "Calibration")
    assert bool(told) == warned
    assert all("Calibration: with a strategy that starts processes" in text for text in told)
