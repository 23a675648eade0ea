"""Settings that tests of pages and plots share."""

from collections.abc import Iterator

import pytest

from dat_lightning.pages.drawing import require_matplotlib


@pytest.fixture(autouse=True)
def _figures_are_closed() -> Iterator[None]:
    """Closes what a test has drawn by hand; matplotlib warns of too many open figures."""
    yield
    require_matplotlib().close("all")
