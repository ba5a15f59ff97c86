"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from serving import Z1_DEMO, Server, start_server

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; torch reads this when it is first imported
# Started in the background, this process ignores Ctrl-C, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("glm4", deadline=None)  # machines that run tests are busy; no test measures time
settings.load_profile("glm4")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository that holds the official small files; tests that need it skip without it."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "glm4-0414").is_dir():
        pytest.skip(f"{folder} with the official small files of GLM-4-0414 is not here")
    return folder


@pytest.fixture(scope="session")
def official_9b(shared: Path) -> Path:
    """The official GLM-4-9B-0414 folder: everything but the weights."""
    return shared / "glm4-0414" / "GLM-4-9B-0414"


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
