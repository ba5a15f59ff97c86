"""`glm4 batch --ray` on two nodes: the records of `glm4 batch`, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from serving import DEMO, REPOSITORY

from glm4 import LLM
from glm4.batch.files import Line
from glm4.batch.run import Batch
from glm4.cluster.placement import Scale
from glm4.cluster.ray_batch import RayBatch
from glm4.errors import CheckpointError, OptionError
from glm4.options import EngineOptions, SamplingParams

COUNT = 400
"""So many that they are still at work when the first ones are written."""
FLAGS = ("--option", "max_new_tokens", "40", "--option", "temperature", "0", "--device", "cpu", "--threads", "1")


def request_lines() -> list[Line]:
    requests: list[Any] = [{"prompt": f"{i % 100} 加五等于几", "custom_id": f"plain {i}"} for i in range(COUNT)]
    body = {"messages": [{"role": "user", "content": "请介绍一下北京"}]}
    requests[1] = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body}
    requests[60] = {"custom_id": "plain 0", "prompt": "a name that was there"}
    requests[61] = {"prompt": "x " * 5000}
    return [Line(number, json.dumps(each).encode()) for number, each in enumerate(requests, 1)]


def without_names(records: list[Any]) -> dict[int, Any]:
    """Records by line, without what differs in every run."""
    found = {}
    for record in records:
        number, _, _ = record.pop("id").removeprefix("batch_req_").split("_")
        if record.get("response"):
            response = record["response"]
            del response["body"]["created"], response["body"]["id"], response["request_id"]
        assert int(number) not in found, "a record is there twice"
        found[int(number)] = record
    return found


@pytest.fixture(scope="module")
def expected() -> dict[int, Any]:
    batch = Batch(LLM(DEMO, device="cpu"), "00000000", defaults=SamplingParams(temperature=0.0, max_new_tokens=40))
    return without_names([record for _, record in batch.run(request_lines())])


def started(*flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "glm4", "batch", "in.jsonl", "-o", "out.jsonl", "-m", str(DEMO), *FLAGS, *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def test_killed_and_gone_on_with(
    ray_cluster: str, expected: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_bytes(b"".join(line.data + b"\n" for line in request_lines()))
    output = Path("out.jsonl")
    process = started("--ray", "--data-parallel", "2")
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 20):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = output.read_bytes()
    assert 20 <= before.count(b"\n") < COUNT
    process = started("--ray", "--data-parallel", "2")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said.decode()
    assert b"INFO" not in said, "what Ray does is not told"
    assert f"going on: {before.count(10)} of {COUNT}" in said.decode()
    assert f"{COUNT} requests ({before.count(10)} of them before), 2 errors; " in said.decode()
    assert output.read_bytes().startswith(before)
    assert without_names([json.loads(line) for line in output.read_bytes().splitlines()]) == expected


def test_a_replica_that_dies_is_replaced(ray_cluster: str, expected: dict[int, Any]) -> None:
    options = EngineOptions(str(DEMO), device="cpu", threads=1, max_batch_requests=4)
    batch = RayBatch(options, Scale(2, 2), "00000000", defaults=SamplingParams(temperature=0.0, max_new_tokens=40))
    try:
        records = []
        for _, record in batch.run(request_lines()):
            records.append(record)
            if len(records) == 20:
                os.kill(actor_pids().pop(), signal.SIGKILL)
        assert without_names(records) == expected
    finally:
        batch.close()


def actor_pids() -> list[int]:
    """Processes of Ray that hold the demo model in memory."""
    return [
        int(maps.parent.name)
        for maps in Path("/proc").glob("[0-9]*/maps")
        if b"ray::" in (maps.parent / "cmdline").read_bytes() and str(DEMO / "model-").encode() in maps.read_bytes()
    ]


def test_what_cannot_be_started(ray_cluster: str, tmp_path: Path) -> None:
    batch = RayBatch(EngineOptions(str(tmp_path), device="cpu", threads=1), Scale(1, 1), "00000000")
    try:
        with pytest.raises(CheckpointError):
            list(batch.run(request_lines()))
    finally:
        batch.close()


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(
            OptionError, match=f"^the Ray cluster at {address} does not answer: Connection refused; set RAY_ADDRESS"
        ):
            RayBatch(EngineOptions(str(DEMO)), Scale(1, 1), "00000000")


def test_ray_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"^Ray is not installed: pip install 'glm4\[ray\]'$"):
        RayBatch(EngineOptions(str(DEMO)), Scale(1, 1), "00000000")
