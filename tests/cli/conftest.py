"""A tiny model to talk to, and an empty folder to talk in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from programs import Bench
from tiny import Reference, write_tiny_chat


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("tiny")).path


@pytest.fixture(scope="session")
def reference(tiny_chat: Path) -> Reference:
    return Reference(tiny_chat)


@pytest.fixture
def bench(tiny_chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    shutil.copytree(tiny_chat, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for name in ("GLM4_MODEL", "GLM4_DEBUG", "WORLD_SIZE", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("glm4.device.available_devices", lambda: ["cpu"])
    return Bench(tmp_path, monkeypatch, capfd)
