"""A batch over two copies: the records of one, in whichever order, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from serving import DEMO

from glm4 import LLM
from glm4.batch.files import Line
from glm4.batch.run import Batch
from glm4.cluster.local_batch import LocalBatch
from glm4.errors import CheckpointError, EngineError
from glm4.options import EngineOptions, SamplingParams

OPTIONS = EngineOptions(str(DEMO), device="cpu", threads=1, max_batch_requests=2, data_parallel=2)
DEFAULTS = SamplingParams(temperature=0.0, max_new_tokens=30)


def request_lines(count: int) -> list[Line]:
    """Both formats, and every way in which a line can be wrong on its own or because of an earlier one."""
    requests: list[Any] = [{"prompt": f"{i} 加五等于几", "custom_id": f"plain {i}"} for i in range(count)]
    body = {"messages": [{"role": "user", "content": "请介绍一下北京"}]}
    chat = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    requests[1] = {"custom_id": "chat", **chat}
    requests[2] = {"custom_id": "text", **chat, "url": "/v1/completions", "body": {"prompt": "Once", "n": 2}}
    requests[3] = {"custom_id": "plain 0", "prompt": "a name that was there"}
    requests[4] = {"custom_id": "wrong", **chat, "url": "/v1/nothing"}
    requests[5] = {"prompt": "x " * 5000}
    data = [json.dumps(each).encode() for each in requests]
    data[6] = b"not JSON"
    return [Line(number, each) for number, each in enumerate(data, 1)]


def without_time(records: dict[int, Any]) -> dict[int, Any]:
    for record in records.values():
        if record.get("response"):
            del record["response"]["body"]["created"]
    return records


@pytest.fixture(scope="module")
def expected() -> dict[int, Any]:
    batch = Batch(LLM(DEMO, device="cpu"), "00000000", defaults=DEFAULTS)
    return without_time(dict(batch.run(request_lines(24))))


@pytest.fixture
def batch() -> Any:
    batch = LocalBatch(OPTIONS, "00000000", defaults=DEFAULTS)
    yield batch
    processes = [worker.process for worker in batch._workers]
    batch.close()
    assert all(process.returncode == 0 for process in processes)


def test_the_records_of_one(batch: LocalBatch, expected: dict[int, Any]) -> None:
    records = list(batch.run(request_lines(24), done={9, 10}))
    assert len(records) == len(dict(records)) == 22
    assert without_time(dict(records)) == {n: record for n, record in expected.items() if n not in (9, 10)}
    usages = [(each.get("usage") or each["response"]["body"]["usage"]) for _, each in records if not each["error"]]
    assert batch.prompt_tokens == sum(each["prompt_tokens"] for each in usages)
    assert batch.new_tokens == sum(each["completion_tokens"] for each in usages)


def test_one_dies(batch: LocalBatch, expected: dict[int, Any]) -> None:
    records = {}
    for number, record in batch.run(request_lines(24)):
        assert number not in records
        records[number] = record
        if len(records) == 8:
            assert all(worker.lines for worker in batch._workers)
            os.kill(batch._workers[0].process.pid, signal.SIGKILL)
    assert len(batch._workers) == 1
    assert without_time(records) == expected


def test_all_die(batch: LocalBatch) -> None:
    with pytest.raises(EngineError, match="the last one: run the same command again"):
        for _ in batch.run(request_lines(24)):
            for worker in batch._workers:
                os.kill(worker.process.pid, signal.SIGKILL)


def test_the_command_killed_and_gone_on_with(
    expected: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_bytes(b"".join(line.data + b"\n" for line in request_lines(24)))
    output = Path("out.jsonl")
    options = ("--option", "max_new_tokens", "30", "--option", "temperature", "0", "--device", "cpu")
    flags = (*options, "--data-parallel", "2", "--threads", "1", "--max-batch-requests", "1")
    command = [sys.executable, "-m", "glm4", "batch", "in.jsonl", "-o", "out.jsonl", "-m", str(DEMO), *flags]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 8):
        time.sleep(0.001)
    workers = worker_pids(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(workers) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they notice, and leave
        time.sleep(0.01)
    before = output.read_bytes()
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    assert ran.returncode == 1, ran.stderr.decode()
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    records = [json.loads(line) for line in output.read_bytes().splitlines()]
    found = {int(record["id"].split("_")[2]): record for record in records}
    assert len(records) == len(found) == 24
    for number, record in without_time(found).items():
        there = expected[number]
        assert (record.get("text"), record["error"]) == (there.get("text"), there["error"])


def worker_pids(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in map(int, children) if b"local_batch" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_folder_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        LocalBatch(EngineOptions(str(tmp_path), device="cpu", data_parallel=2), "00000000")
