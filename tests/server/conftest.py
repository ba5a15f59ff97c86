"""Servers on the demo models, one of each for all tests."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from serving import DEMO, REPOSITORY, Z1_DEMO, Json, Server, start_server

from glm4 import LLM


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One that serves glm4-demo."""
    server = start_server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def z1_server() -> Iterator[Server]:
    """One that serves glm4-z1-demo."""
    server = start_server(model=Z1_DEMO)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def offline() -> LLM:
    """The same model without a server."""
    return LLM(DEMO)


@pytest.fixture(scope="session")
def tools() -> dict[str, Json]:
    """The tools that the demo model knows, by name."""
    definitions: dict[str, Json] = json.loads((REPOSITORY / "demo" / "corpus" / "tools.json").read_text("utf-8"))
    return definitions
