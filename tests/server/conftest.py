"""What the demo model says without a server, and its tools."""

from __future__ import annotations

import json

import pytest
from serving import DEMO, REPOSITORY, Json

from glm4 import LLM


@pytest.fixture(scope="session")
def offline() -> LLM:
    """The same model without a server."""
    return LLM(DEMO)


@pytest.fixture(scope="session")
def tools() -> dict[str, Json]:
    """The tools that the demo model knows, by name."""
    definitions: dict[str, Json] = json.loads((REPOSITORY / "demo" / "corpus" / "tools.json").read_text("utf-8"))
    return definitions
