"""Where MindSpore is not installed these tests are skipped; `make test-mindspore` has an environment for them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import SHAPES, TinyCheckpoint, write_tiny

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.device_mindspore import MindSporeDevice
from glm4.engine.step import Runner
from glm4.model.configuration_glm4 import Glm4Config

MakeRunner = Callable[..., Runner]


@pytest.fixture(scope="session")
def mindspore() -> None:
    try:
        importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("MindSpore is not installed here: make test-mindspore")


@pytest.fixture(params=[True, False], ids=["graph", "PyNative"])
def device(request: pytest.FixtureRequest, mindspore: None) -> MindSporeDevice:
    return MindSporeDevice.open(graph=request.param)


@pytest.fixture
def make_runner(device: MindSporeDevice) -> MakeRunner:
    """From a folder to a runner in float32."""

    def make(path: Path, num_blocks: int = 16, block_size: int = 4, unknown_ids: list[int] | None = None) -> Runner:
        from glm4.engine.mindspore_runner import MindSporeRunner

        folder = ModelFolder.open(path)
        config = Glm4Config.from_dict(folder.read_json("config.json"))
        checkpoint = Checkpoint.open(folder)
        return MindSporeRunner(checkpoint, config, device, "float32", num_blocks, block_size, unknown_ids or [])

    return make


@pytest.fixture(scope="session", params=SHAPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """One model of each kind."""
    options: dict[str, Any] = SHAPES[request.param]
    return write_tiny(tmp_path_factory.mktemp("tiny"), vocab_size=321, **options)
