"""`glm4 serve` as its users start it, in a process of its own, and ways to talk to it."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO, Z1_DEMO = REPOSITORY / "demo" / "glm4-demo", REPOSITORY / "demo" / "glm4-z1-demo"
Json = dict[str, Any]


@dataclass
class Server:
    """A running `glm4 serve`."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse()

    def post(self, path: str, body: Json) -> Json:
        """The JSON answer, which must be a success."""
        status, answer = self.try_post(path, body)
        assert status == 200, answer
        return answer

    def try_post(self, path: str, body: Json) -> tuple[int, Json]:
        response = self.request("POST", path, json.dumps(body).encode())
        return response.status, json.loads(response.read())

    def events(self, path: str, body: Json) -> list[tuple[str, Any]]:
        """(event, data) of a whole stream."""
        response = self.request("POST", path, json.dumps(body | {"stream": True}).encode())
        text = response.read().decode()
        assert response.status == 200, text
        assert response.headers["content-type"].startswith("text/event-stream")
        return read_events(text)

    def metric(self, name: str, **headers: str) -> float:
        """The value of a metric without labels."""
        text = self.request("GET", "/metrics", **headers).read().decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code, after this signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=30)


def read_events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events by their specification, as far as it is used."""
    events = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        assert lines.keys() <= {"event", "data"}
        data = lines["data"]
        events.append((lines.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return events


def start_server(*flags: str, model: Path = DEMO, **environment: str) -> Server:
    """`glm4 serve` on a free port, once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "glm4", "serve", "-m", str(model), "--port", "0", *flags],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "GLM4_THREADS": "1", **environment},
    )
    log: list[str] = []
    ready: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line.decode().rstrip())
            if log[-1].startswith("ready: "):
                ready.put(log[-1])
        ready.put("")

    threading.Thread(target=read, daemon=True).start()
    line = ready.get(timeout=60)
    assert line, "\n".join(log)
    host, _, port = line.rpartition("/")[2].rpartition(":")
    return Server(process, host, int(port), log)


def ask(text: str, **more: Any) -> Json:
    """The body of a greedy chat completion."""
    return {"temperature": 0, "messages": [{"role": "user", "content": text}], **more}


def put_together(events: list[tuple[str, Any]]) -> list[Json]:
    """The choices that the chunks of a streamed chat completion make, as the API's reference describes it."""
    assert events[-1] == ("message", "[DONE]")
    choices: dict[int, Json] = {}
    for _, chunk in events[:-1]:
        assert chunk["object"] == "chat.completion.chunk"
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"content": "", "reasoning_content": "", "tool_calls": []})
            assert "finish_reason" not in choice, "nothing comes after the end"
            delta = piece["delta"]
            for key in ("content", "reasoning_content"):
                choice[key] += delta.get(key, "")
            for call in delta.get("tool_calls", []):
                if call["index"] == len(choice["tool_calls"]):
                    choice["tool_calls"].append({"id": call["id"], "type": "function", "function": call["function"]})
                else:
                    assert call["index"] == len(choice["tool_calls"]) - 1
                    choice["tool_calls"][-1]["function"]["arguments"] += call["function"]["arguments"]
            if piece["logprobs"]:
                choice.setdefault("logprobs", []).extend(piece["logprobs"]["content"])
            if piece["finish_reason"]:
                choice["finish_reason"] = piece["finish_reason"]
    return [choices[index] for index in sorted(choices)]
