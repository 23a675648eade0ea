"""Settings that all tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import _utils

# Their files come first, so that at the end no process is left alone with one.
LONG = ("test_frozen.py", "tests/runs/", "tests/ddp/", "test_cli.py", "test_demo.py", "test_studies.py", "tests/speed/")

# Torch waits 5 s for each process of a loader in which an image could not be read.
_utils.MP_STATUS_CHECK_INTERVAL = 0.5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts tests; those of a file stay together."""
    items.sort(key=lambda item: next((k for k, part in enumerate(LONG) if part in item.nodeid), len(LONG)))


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs each test with its own cache folder and leaves torch's global settings as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
