"""A Ray cluster of two machines on this one, and an empty folder to run commands in."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import Bench
from tiny import write_tiny_chat


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a cluster of two nodes with a CPU each."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'glm4[ray]'")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def ray_cluster(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, as `glm4` finds it."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    return ray_address


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    write_tiny_chat(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, monkeypatch, capfd)
