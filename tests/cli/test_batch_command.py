"""`glm4 batch` as its users run it: killed, interrupted, resumed, through pipes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from programs import Bench, finish, start
from tiny import Reference

ONE_AT_A_TIME = ("--max-batch-requests", "1", "--seed", "3")


def write_requests(count: int, new_tokens: int = 60) -> None:
    """A mixture of both formats, sampled, with a line that cannot be answered."""
    requests: list[Any] = [
        {"prompt": f"question {i}", "max_new_tokens": new_tokens, "temperature": 2.0, "ignore_eos": True}
        if i % 2
        else {
            "custom_id": f"id {i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": f"{i}?"}], "max_tokens": new_tokens, "ignore_eos": True},
        }
        for i in range(count)
    ]
    requests[count // 2] = {"prmpt": "misspelt"}
    Path("in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))


def records(file: str) -> list[dict[str, Any]]:
    """What stands in a file of records, in the order of their lines, without the time of the answer."""
    found = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    for record in found:
        if record.get("response"):
            del record["response"]["body"]["created"]
    return sorted(found, key=lambda record: int(record["id"].split("_")[2]))


def started(*flags: str) -> subprocess.Popen[bytes]:
    return start(
        "batch",
        "in.jsonl",
        "-o",
        "out.jsonl",
        "-m",
        "model",
        *flags,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def wait_for_bytes(process: subprocess.Popen[bytes], size: int) -> None:
    """Until the output has grown beyond `size`, or the program has ended."""
    file = Path("out.jsonl")
    while process.poll() is None and (not file.exists() or file.stat().st_size <= size):
        time.sleep(0.001)


def test_killed_again_and_again_and_finished(bench: Bench) -> None:
    write_requests(40)
    assert bench.glm4("batch", "in.jsonl", "-o", "whole.jsonl", "-m", "model", *ONE_AT_A_TIME).code == 1
    whole = records("whole.jsonl")
    assert len(whole) == 40
    moments, kills, earlier = random.Random(0), 0, b""
    for _ in range(4):
        process = started(*ONE_AT_A_TIME)
        wait_for_bytes(process, len(earlier) + moments.randrange(2000))
        process.send_signal(signal.SIGKILL)
        kills += finish(process).code == -signal.SIGKILL
        now = Path("out.jsonl").read_bytes()
        assert now.startswith(earlier[: earlier.rfind(b"\n") + 1])  # what was there stays, torn records excepted
        earlier = now
    assert kills > 0
    assert finish(started(*ONE_AT_A_TIME)).code == 1
    assert records("out.jsonl") == whole


def test_interrupted_and_gone_on_with(bench: Bench) -> None:
    write_requests(40)
    process = started(*ONE_AT_A_TIME)
    wait_for_bytes(process, 1)
    process.send_signal(signal.SIGINT)
    ran = finish(process)
    assert ran.code == 130
    assert ran.message == "interrupted"
    done = Path("out.jsonl").read_bytes().count(b"\n")
    assert f"\n{done} of 40 requests have their record in out.jsonl: run the same command again to go on\n" in ran.err
    assert 0 < done < 40
    ran = finish(started(*ONE_AT_A_TIME))
    assert ran.code == 1
    assert ran.err.startswith(f"going on: {done} of 40 requests have their record already\n")
    assert [int(record["id"].split("_")[2]) for record in records("out.jsonl")] == list(range(1, 41))


def test_answers_and_summary(bench: Bench, reference: Reference) -> None:
    Path("in.jsonl").write_text('{"prompt": "hi"}\n\n{"prompt": "ho", "max_new_tokens": 2}\n')
    flags = ("-m", "model", "--option", "max_new_tokens", "5")
    ran = bench.glm4("batch", "in.jsonl", "-o", "out.jsonl", *flags)
    assert (ran.code, ran.out) == (0, "")
    prompts = [f"[gMASK]<sop><|user|>\n{word}<|assistant|>" for word in ("hi", "ho")]
    found = records("out.jsonl")
    assert [record["line"] for record in found] == [1, 3]
    assert [record["text"] for record in found] == [reference.answer(prompts[0], 5), reference.answer(prompts[1], 2)]
    count = sum(map(reference.count, prompts))
    assert ran.err.startswith(f"2 requests, 0 errors; {count} prompt tokens and 7 new ones in ")
    again = bench.glm4("batch", "in.jsonl", "-o", "out.jsonl", *flags)
    assert (again.code, again.err) == (0, "all 2 requests have their record in out.jsonl already\n")


def test_raw(bench: Bench, reference: Reference) -> None:
    Path("in.jsonl").write_text('{"prompt": "Once upon", "max_new_tokens": 6}\n')
    assert bench.glm4("batch", "in.jsonl", "-o", "out.jsonl", "-m", "model", "--raw").code == 0
    assert records("out.jsonl")[0]["text"] == reference.answer("Once upon", 6)


def test_through_pipes(bench: Bench, reference: Reference) -> None:
    lines = b'{"prompt": "hi", "max_new_tokens": 5}\nnonsense\n'
    ran = bench.glm4("batch", "-", "-o", "-", "-m", "model", stdin=lines)
    assert ran.code == 1
    good, bad = sorted(map(json.loads, ran.out.splitlines()), key=lambda record: record["line"])
    assert good["text"] == reference.answer("[gMASK]<sop><|user|>\nhi<|assistant|>", 5)
    assert bad["error"]["code"] == "invalid_json"


def test_standard_input_is_not_gone_on_with(bench: Bench) -> None:
    lines = b'{"prompt": "hi", "max_new_tokens": 2}\n'
    flags = ("batch", "-", "-o", "out.jsonl", "-m", "model")
    assert bench.glm4(*flags, stdin=lines).code == 0
    ran = bench.glm4(*flags, stdin=lines)
    assert ran.code == 7
    assert ran.message.startswith(
        "out.jsonl is not empty, and requests that come through a pipe cannot be gone on with"
    )
    assert bench.glm4(*flags, "--restart", stdin=lines).code == 0
    assert len(records("out.jsonl")) == 1


def test_an_edited_input_and_restart(bench: Bench) -> None:
    Path("in.jsonl").write_text('{"prompt": "hi", "max_new_tokens": 2}\n')
    flags = ("batch", "in.jsonl", "-o", "out.jsonl", "-m", "model")
    assert bench.glm4(*flags).code == 0
    before = Path("out.jsonl").read_bytes()
    Path("in.jsonl").write_text('{"prompt": "ho", "max_new_tokens": 2}\n')
    ran = bench.glm4(*flags)
    assert (ran.code, ran.message) == (
        4,
        "in.jsonl:1 has changed since out.jsonl was begun: use --restart to begin again, or choose another output",
    )
    assert bench.glm4(*flags[:-1], "nowhere", "--restart").code == 3
    assert Path("out.jsonl").read_bytes() == before  # nothing is thrown away for a model that is not there
    assert bench.glm4(*flags, "--restart").code == 0
    assert len(records("out.jsonl")) == 1
    assert Path("out.jsonl").read_bytes() != before


@pytest.mark.parametrize("flags", [("--raw",), ("--seed", "4"), ("--option", "max_new_tokens", "3")])
def test_other_options_are_noticed(bench: Bench, flags: tuple[str, ...]) -> None:
    Path("in.jsonl").write_text('{"prompt": "hi", "max_new_tokens": 2}\n')
    command = ("batch", "in.jsonl", "-o", "out.jsonl", "-m", "model")
    assert bench.glm4(*command).code == 0
    ran = bench.glm4(*command, *flags)
    assert ran.code == 2
    assert ran.message.startswith("out.jsonl was begun with another model or other options")
    assert bench.glm4(*command, "--max-batch-requests", "2").code == 0  # decides how fast, not what


@pytest.mark.parametrize(
    ("source", "output", "code", "message"),
    [
        ("nowhere.jsonl", "out.jsonl", 4, "nowhere.jsonl is not there: name a file with one JSON request a line"),
        ("model", "out.jsonl", 4, "model is a folder: name a file with one JSON request a line"),
        ("empty.jsonl", "out.jsonl", 4, "empty.jsonl is empty: write one JSON request a line"),
        ("in.jsonl", "in.jsonl", 2, "in.jsonl is both the input and the output: give -o another file"),
        ("in.jsonl", "model", 7, "model cannot be written: Is a directory; choose another file"),
        (
            "in.jsonl",
            "empty.txt",
            7,
            "empty.txt holds something else than records of `glm4 batch`: choose another file",
        ),
        ("in.jsonl", "/dev/full", 7, "/dev/full cannot be written: No space left on device; the 0 records in it are"),
    ],
)
def test_files_that_will_not_do(bench: Bench, source: str, output: str, code: int, message: str) -> None:
    Path("in.jsonl").write_text('{"prompt": "hi", "max_new_tokens": 2}\n')
    Path("empty.jsonl").write_text("\n")
    Path("empty.txt").write_text("not empty\n")
    ran = bench.glm4("batch", source, "-o", output, "-m", "model")
    assert ran.code == code
    assert ran.message.startswith(message)
    assert Path("in.jsonl").read_text() == '{"prompt": "hi", "max_new_tokens": 2}\n'
