"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

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
