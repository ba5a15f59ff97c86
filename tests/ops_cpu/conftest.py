"""What the tests of the native kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from glm4.ops.cpu import library


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """The instruction sets that this CPU has; afterwards the best one is chosen again, with two threads."""
    if library.load() is None:
        pytest.skip(library.kernels_summary())
    yield [name for name in library.ISAS if library.select_isa(name)]
    library.select_isa(None)
    library.set_threads(2)
