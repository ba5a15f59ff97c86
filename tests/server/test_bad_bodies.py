"""Thousands of bodies that no client should send: each is refused, and the server stays as it was."""

from __future__ import annotations

import http.client
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import Json, Server, ask

POSTS = {
    "/v1/chat/completions": ask("hi", max_tokens=1),
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/v1/messages": {"model": "glm4-demo", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
}
NOT_JSON = [
    b"", b"{", b"null", b"[]", b'"text"', b"1", b"nan", b"{'a': 1}", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe{}",
    b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\\ud800"}', b'{"a": "\\udc00x"}', b'{"a": 1e999}',
    b'{"a": 1,}', b"[" * 100_000, b'{"messages":' + b'[{"a":' * 20_000, b'{"a": ' + b"9" * 5000 + b"}",
    b"\x00" * 100, b"{}{}",
]  # fmt: skip
WRONG: list[Any] = [
    True, -1, 2**70, 1.5, "", "x", "<|user|>", "\x00", "😀" * 10, [], [[]], [None], [1, "a"], {}, {"a": {}},
    {"type": 5}, [{"role": "user"}], [{"type": "text"}], "x" * 100_000, [{"role": "a" * 10_000, "content": {}}],
]  # fmt: skip


def bad_bodies(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Bodies that are cut, of the wrong type somewhere, or with a key too many."""
    for path, good in POSTS.items():
        yield from ((path, body) for body in NOT_JSON)
        text = json.dumps(good).encode()
        yield from ((path, text[:cut]) for cut in range(len(text)))
        for key in good:
            for value in WRONG:
                yield path, json.dumps(good | {key: value, "unknown": rng.random()}).encode()
        for _ in range(1400):
            flipped = bytearray(text)
            flipped[rng.randrange(len(text))] = rng.randrange(0x80, 0x100)  # alone, it is no UTF-8
            yield path, bytes(flipped)


def memory_bytes(server: Server) -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def test_each_is_refused_and_the_server_goes_on(server: Server) -> None:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    before, count = memory_bytes(server), 0
    for path, body in bad_bodies(random.Random(5)):
        connection.request("POST", path, body)
        response = connection.getresponse()
        answer = response.read()
        assert 400 <= response.status < 500, (path, body[:200], answer)
        assert json.loads(answer)["error"]["message"]
        count += 1
    assert count >= 10_000
    assert memory_bytes(server) < before + 64 * 2**20
    for path, good in POSTS.items():
        assert server.post(path, good)


def test_wrong_types_alone_are_no_crash(server: Server) -> None:
    """Without a key too many, so that every value gets as far as it can: refused or answered, never a 5xx."""
    optional: Json = {
        "tools": [], "tool_choice": "auto", "stop": "a", "response_format": {"type": "text"}, "logit_bias": {"1": 2},
        "seed": 1, "n": 1, "top_p": 0.5, "json_schema": "{}", "stream_options": None, "metadata": {}, "thinking": None,
        "system": "a", "text": {}, "instructions": "b", "stop_sequences": [], "user": "c", "logprobs": None,
        "echo": None,
    }  # fmt: skip
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    for path, good in POSTS.items():
        for key in good | optional:
            for value in WRONG:
                connection.request("POST", path, json.dumps(good | {key: value}).encode())
                response = connection.getresponse()
                answer = response.read()
                assert response.status < 500, (path, key, value, answer)
