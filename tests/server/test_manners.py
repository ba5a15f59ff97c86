"""A server that others can rely on: keys, limits, callers who leave, engines that die, and an orderly end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import DEMO, Json, Server, ask, start_server

from glm4.engine.async_llm import AsyncLLM, RestartPolicy
from glm4.errors import EngineError
from glm4.options import ServerOptions
from glm4.server.run import serve, take_address

PATH = "/v1/chat/completions"
LONG: Json = {
    "messages": [{"role": "user", "content": "讲一个故事"}],
    "max_tokens": 1500,
    "ignore_eos": True,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys and narrow limits."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "keys").write_text("# two\nfirst-key\n\nsecond-key\n")
    (folder / "config.yaml").write_text(
        f"api_key_file: {folder / 'keys'}\nmax_body: 20000B\nmax_prompt_tokens: 100\nmax_answer_tokens: 1600\n"
        "max_queue: 7\nmax_batch_requests: 2\nrequest_timeout: 100\ncors_origins: ['https://a.example']\n"
        "served_model_name: [glm, other]\n"
    )
    server = start_server(
        "--config", str(folder / "config.yaml"), "--max-queue", "1",
        GLM4_API_KEY="third-key", GLM4_REQUEST_TIMEOUT="2.5",
    )  # fmt: skip
    yield server
    server.stop()


def with_key(server: Server, body: Json, path: str = PATH) -> http.client.HTTPResponse:
    return server.request("POST", path, json.dumps(body).encode(), authorization="Bearer first-key")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_stream(server: Server, body: Json = LONG, **headers: str) -> http.client.HTTPResponse:
    """A stream of which the first event has come."""
    response = server.request("POST", PATH, json.dumps(body | {"stream": True}).encode(), **headers)
    assert response.status == 200
    assert response.readline().startswith(b"data: ")
    return response


@pytest.mark.parametrize("key", ["first-key", "second-key", "third-key"])
def test_any_of_the_keys_opens(strict: Server, key: str) -> None:
    assert strict.request("GET", "/v1/models", authorization=f"Bearer {key}").status == 200
    assert strict.request("GET", "/v1/models", authorization=f"bearer {key}").status == 200
    assert strict.request("GET", "/v1/models", x_api_key=key).status == 200


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"},
                                     {"x_api_key": "first-key2"}, {"authorization": "Bearer # two"},
                                     {"authorization": "Bearer "}])  # fmt: skip
def test_nothing_else_does(strict: Server, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/metrics", "/nothing"):
        response = strict.request("GET", path, **headers)
        assert response.status == 401
        assert json.loads(response.read())["error"]["type"] == "authentication_error"
    for path in ("/health", "/health/live", "/docs", "/openapi.json"):
        assert strict.request("GET", path, **headers).status == 200


def test_limits(strict: Server) -> None:
    too_long = with_key(strict, ask("x" * 30_000))
    assert too_long.status == 413
    body = json.dumps(ask("x" * 30_000)).encode()
    chunked = http.client.HTTPConnection(strict.host, strict.port, timeout=30)
    chunked.request("POST", PATH, iter([body[:5000]] * 8), {"authorization": "Bearer first-key"}, encode_chunked=True)
    assert chunked.getresponse().status == 413
    answer = json.loads(with_key(strict, ask("北 京" * 60)).read())["error"]
    assert re.search(r"the prompt has \d+ tokens, and this server takes 100", answer["message"])
    answer = json.loads(with_key(strict, ask("x", max_tokens=1601)).read())["error"]
    assert answer["param"] == "max_tokens"
    answer = json.loads(with_key(strict, ask("x", n=4)).read())["error"]
    assert answer["message"].startswith("4 answers are more than this server gives at a time")


def test_names_of_the_model(strict: Server) -> None:
    response = strict.request("GET", "/v1/models", authorization="Bearer first-key")
    assert [model["id"] for model in json.loads(response.read())["data"]] == ["glm", "other"]
    assert json.loads(with_key(strict, ask("你好", model="other")).read())["model"] == "other"
    assert with_key(strict, ask("你好", model="glm4-demo")).status == 404
    assert strict.request("GET", "/v1/models/other", authorization="Bearer first-key").status == 200
    assert strict.request("GET", "/v1/models/glm4-demo", authorization="Bearer first-key").status == 404


def test_a_full_queue_says_when_to_come_back(strict: Server) -> None:
    """Two run side by side, one waits, and the fourth is refused."""
    streams = [start_stream(strict, LONG, authorization="Bearer first-key") for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        third = pool.submit(with_key, strict, ask("你好", max_tokens=1))
        until(lambda: strict.metric("glm4_waiting", authorization="Bearer first-key") == 1)
        refused = with_key(strict, ask("你好", max_tokens=1))
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert json.loads(refused.read())["error"]["type"] == "rate_limit_error"
        for stream in streams:
            stream.close()
        assert third.result().status == 200


def test_a_request_has_a_deadline(strict: Server) -> None:
    never = LONG | {"max_tokens": 1600, "n": 3, "logprobs": True, "top_logprobs": 20}
    response = with_key(strict, never)
    assert response.status == 504
    assert json.loads(response.read())["error"]["type"] == "timeout_error"


def test_web_pages_of_named_origins_only(strict: Server, server: Server) -> None:
    preflight = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    allowed = strict.request("OPTIONS", PATH, origin="https://a.example", **preflight)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert strict.request("OPTIONS", PATH, origin="https://b.example", **preflight).status == 400
    assert server.request("GET", "/health", origin="https://a.example").headers["access-control-allow-origin"] is None


def test_every_response_has_an_id_and_a_line_in_the_log_without_its_prompt(server: Server) -> None:
    body = json.dumps(ask("secret words", user="me", max_tokens=3)).encode()
    given = server.request("POST", PATH, body, x_request_id="my-id.1")
    assert given.headers["x-request-id"] == "my-id.1"
    forged = server.request("GET", "/health", x_request_id='a"b c')
    assert re.fullmatch("[0-9a-f]{24}", forged.headers["x-request-id"])
    until(lambda: any("my-id.1" in line for line in server.log))
    [line] = [json.loads(line) for line in server.log if "my-id.1" in line]
    assert line.pop("seconds") > 0
    tokens = {"prompt_tokens": 10, "answer_tokens": 3}
    assert line == {"id": "my-id.1", "method": "POST", "path": PATH, "status": 200, **tokens}
    assert not any("secret words" in line for line in server.log)


def test_a_caller_who_leaves_frees_the_blocks(server: Server) -> None:
    aborts = server.metric("glm4_aborts_total")
    stream = start_stream(server)
    assert server.metric("glm4_kv_blocks_used") > 0
    stream.close()
    waiting = socket.create_connection((server.host, server.port))
    body = json.dumps(LONG | {"n": 4}).encode()
    waiting.sendall(b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), len(body)) + body)
    until(lambda: server.metric("glm4_running") == 4)
    waiting.close()
    until(lambda: server.metric("glm4_running") == 0 and server.metric("glm4_kv_blocks_used") == 0)
    assert server.metric("glm4_aborts_total") == aborts + 5


def open_files(server: Server) -> int:
    return sum(1 for _ in Path(f"/proc/{server.process.pid}/fd").iterdir())


def test_many_streams_some_of_whose_readers_leave(server: Server) -> None:
    questions = ["请介绍一下北京", "你好", "三加五等于几？", "What is the capital of France?"]
    expected = {q: server.post(PATH, ask(q))["choices"][0]["message"]["content"] for q in questions}
    before = open_files(server)

    def one(number: int) -> bool:
        question = questions[number % 4]
        if number % 10 == 3:
            start_stream(server).close()
            return True
        events = server.events(PATH, ask(question))
        return expected[question] == "".join(
            chunk["choices"][0]["delta"].get("content", "") for _, chunk in events[:-1]
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert all(pool.map(one, range(100)))
    until(lambda: server.metric("glm4_kv_blocks_used") == 0)
    until(lambda: open_files(server) <= before + 1)


def test_metrics_count(server: Server) -> None:
    names = ("glm4_prompt_tokens_total", "glm4_answer_tokens_total", "glm4_time_to_first_token_seconds_count")
    before = [server.metric(name) for name in names]
    usage = server.post(PATH, ask("请介绍一下北京"))["usage"]
    after = [server.metric(name) for name in names]
    counted = [b - a for a, b in zip(before, after, strict=True)]
    assert counted == [usage["prompt_tokens"], usage["completion_tokens"], 1]


def engine_pid(server: Server) -> int:
    [pid] = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return int(pid)


def test_an_engine_that_is_killed_is_replaced() -> None:
    server = start_server()
    stream = start_stream(server)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        whole = pool.submit(server.try_post, PATH, LONG)
        until(lambda: server.metric("glm4_running") == 2)
        os.kill(engine_pid(server), signal.SIGKILL)
        status, answer = whole.result()
    assert status == 503
    assert "repeat the request" in answer["error"]["message"]
    last = stream.read().decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
    assert server.post(PATH, ask("你好"))["choices"], "a request waits for the new engine"
    assert server.request("GET", "/health").status == 200
    assert server.metric("glm4_engine_restarts_total") == 1
    assert server.stop() == 0


def test_it_leaves_with_an_engine_that_is_dead_for_good() -> None:
    async def main() -> None:
        options = ServerOptions(port=0)
        llm = await AsyncLLM(DEMO, threads=1, restarts=RestartPolicy(max_restarts=0)).start()
        with take_address(options) as listener:
            serving = asyncio.create_task(serve(llm, options, listener))
            await asyncio.sleep(0.1)
            assert llm.pid is not None
            os.kill(llm.pid, signal.SIGKILL)
            try:
                await serving
            finally:
                await llm.shutdown()

    with pytest.raises(EngineError, match="the engine has died for good"):
        asyncio.run(main())


def test_it_drains_when_it_is_told_to_stop() -> None:
    server = start_server()
    stream = start_stream(server, LONG | {"max_tokens": 600})
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.request("GET", "/health").status == 503)
    assert json.loads(server.request("GET", "/health").read()) == {"status": "draining"}
    assert server.request("GET", "/health/live").status == 200
    refused = server.request("POST", PATH, json.dumps(ask("你好")).encode())
    assert refused.status == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert stream.read().endswith(b"data: [DONE]\n\n"), "what runs comes to its end"
    assert server.process.wait(timeout=30) == 0


@pytest.mark.parametrize(("flags", "signals"), [((), 2), (("--drain-timeout", "0.2"), 1)])
def test_it_does_not_wait_for_ever(flags: tuple[str, ...], signals: int) -> None:
    server = start_server(*flags)
    stream = start_stream(server, LONG | {"n": 16})
    for _ in range(signals):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert server.process.wait(timeout=30) == 130
    assert not stream.read().endswith(b"[DONE]\n\n")


def test_https(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = start_server("--tls-cert", str(cert), "--tls-key", str(key))
    trusting = ssl.create_default_context(cafile=str(cert))
    connection = http.client.HTTPSConnection(server.host, server.port, context=trusting, timeout=30)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ready"}
    connection.close()
    assert any(line == f"ready: https://127.0.0.1:{server.port}" for line in server.log)
    assert server.stop() == 0


def test_it_listens_on_loopback_only(server: Server) -> None:
    inodes = set()
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        if link.is_symlink() and (match := re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))):
            inodes.add(match[1])
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    listening = [line.split() for table in tables for line in table]
    addresses = {row[1].split(":")[0] for row in listening if row[3] == "0A" and row[9] in inodes}
    assert addresses == {"0100007F"}, "127.0.0.1, as the kernel writes it"
