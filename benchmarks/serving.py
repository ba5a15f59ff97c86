"""How the server stands many clients, and what it costs beside the engine alone.

    python benchmarks/serving.py clients --model DIR       200 streams at once, some of whose readers leave, 30 seconds
    python benchmarks/serving.py throughput --model DIR    tokens a second over HTTP against LLM.generate

Starts and stops its own server on a free port of the loopback device; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Json = dict[str, Any]
QUESTIONS = ["请介绍一下北京", "What is the capital of France?", "你好", "写一首短诗", "1+1=?", "介绍一下你自己"]
MAX_TOKENS = 48


class Server:
    """A `glm4 serve` of its own process group."""

    def __init__(self, model: str, *flags: str) -> None:
        argv = [sys.executable, "-m", "glm4", "serve", "-m", model, "--port", "0", "--max-queue", "1000", *flags]
        with tempfile.NamedTemporaryFile() as log:  # no pipe: reading it would take time from what is measured
            self.process = subprocess.Popen(argv, stderr=log)
            while not (ready := re.search(rb"^ready: .*:(\d+)$", Path(log.name).read_bytes(), re.MULTILINE)):
                assert self.process.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
        self.port = int(ready[1])

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


async def ask(port: int, body: Json, *, stream: bool = True, leave_after: int | None = None) -> tuple[str, int]:
    """The text of an answer and its tokens; `leave_after`: hang up after so many events of the stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    text, tokens, events = "", 0, 0
    try:
        status = (await reader.readline()).split()[1]
        if status != b"200":
            raise RuntimeError(f"status {status.decode()}")
        if not stream:
            answer = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
            return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            events += 1
            if leave_after is not None and events >= leave_after:
                return text, 0
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    finally:
        writer.close()
    return text, tokens


def body(question: str) -> Json:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MAX_TOKENS}


def metric(port: int, name: str) -> float:
    from urllib.request import urlopen

    text = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def clients(model: str, count: int, seconds: float) -> Json:
    """Streams that are whole must be the greedy answers; afterwards nothing is held."""
    server = Server(model)
    draw = random.Random(0)
    expected = {question: asyncio.run(ask(server.port, body(question)))[0] for question in QUESTIONS}
    before = server.descriptors()
    whole = left = wrong = 0
    failures: list[str] = []

    async def client(end: float) -> None:
        nonlocal whole, left, wrong
        while time.monotonic() < end:
            question = draw.choice(QUESTIONS)
            leaves = draw.randrange(1, 20) if draw.random() < 0.05 else None
            try:
                text, _ = await ask(server.port, body(question), leave_after=leaves)
            except (RuntimeError, OSError) as error:
                failures.append(str(error))
                continue
            left += leaves is not None
            whole += leaves is None and text == expected[question]
            wrong += leaves is None and text != expected[question]

    async def all_clients() -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(end) for _ in range(count)))
        await asyncio.sleep(1)

    asyncio.run(all_clients())
    found = {
        "clients": count,
        "seconds": seconds,
        "whole": whole,
        "left": left,
        "wrong": wrong,
        "failed": len(failures),
        "kv_blocks_used": metric(server.port, "glm4_kv_blocks_used"),
        "descriptors_more": server.descriptors() - before,
    }
    server.stop()
    print(f"{whole} streams whole and right, {wrong} wrong, {len(failures)} failed, {left} left early; afterwards "
          f"{found['kv_blocks_used']:g} blocks held, {found['descriptors_more']} descriptors more")  # fmt: skip
    return found


def throughput(model: str, rounds: int, copies: int) -> Json:
    """Streamed, whole, and LLM.generate alone, in turn, each warm; CPU time is what noise changes least."""
    from glm4 import LLM, SamplingParams

    server, llm = Server(model), LLM(model)
    [engine] = map(int, Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split())
    questions = QUESTIONS * copies
    sampling = SamplingParams(max_new_tokens=MAX_TOKENS, do_sample=False)

    def alone() -> int:
        outputs = llm.chat([[{"role": "user", "content": text}] for text in questions], sampling, progress=False)
        return sum(len(output.token_ids) for output in outputs)

    def served(stream: bool) -> int:
        async def every() -> int:
            answers = await asyncio.gather(*(ask(server.port, body(q), stream=stream) for q in questions))
            return sum(tokens for _, tokens in answers)

        return asyncio.run(every())

    def measured(work: Callable[[], int]) -> list[float]:
        """Tokens a second, and CPU microseconds a token of the server, its engine and this process."""
        before = cpu_seconds(server.process.pid), cpu_seconds(engine), time.process_time()
        started = time.perf_counter()
        tokens = work()
        seconds = time.perf_counter() - started
        after = cpu_seconds(server.process.pid), cpu_seconds(engine), time.process_time()
        return [tokens / seconds, *(1e6 * (b - a) / tokens for a, b in zip(before, after, strict=True))]

    ways = {"streamed": lambda: served(True), "whole": lambda: served(False), "alone": alone}
    rows: dict[str, list[list[float]]] = {name: [] for name in ways}
    for work in ways.values():
        work()
    for _ in range(rounds):
        for name, work in ways.items():
            rows[name].append(measured(work))
    server.stop()
    found: Json = {}
    for name in ways:
        speed, *cpu = (median(column) for column in zip(*rows[name], strict=True))
        share = median(row[0] / alone[0] for row, alone in zip(rows[name], rows["alone"], strict=True))
        found[name] = {"tokens_per_s": speed, "share": share, "cpu_us_a_token": cpu}
        print(f"{name:>8}: {speed:6.0f} tokens/s, {share:.0%}; CPU microseconds a token: server {cpu[0]:.0f}, "
              f"engine {cpu[1]:.0f}, this process {cpu[2]:.0f}")  # fmt: skip
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its threads so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clients", "throughput"))
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "demo" / "glm4-demo"))
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=40, help="of each question")
    args = parser.parse_args()
    if args.what == "clients":
        found = clients(args.model, args.clients, args.seconds)
    else:
        found = throughput(args.model, args.rounds, args.copies)
    print(json.dumps({"what": args.what} | found))


if __name__ == "__main__":
    main()
