"""What the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Stage


@pytest.fixture(scope="module")
def staged() -> Iterator[Stage]:
    """A factory of engines and gateways for a module whose tests leave them as they are."""
    made = Stage()
    yield made
    made.close()
