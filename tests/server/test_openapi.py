"""The description of the API is true: a tool that knows only it finds no 5xx, and every option stands in it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from serving import Json, Server, start_server

from glm4.options import SamplingParams


@pytest.fixture(scope="module")
def document(server: Server) -> Json:
    described: Json = json.loads(server.request("GET", "/openapi.json").read())
    return described


def test_every_sampling_option_is_described_with_its_limits(document: Json) -> None:
    schemas = document["components"]["schemas"]
    for name in ("ChatCompletionBody", "CompletionBody", "ResponsesBody"):
        properties = schemas[name]["properties"]
        for option in fields(SamplingParams):
            if option.name != "prompt_logprobs":
                assert option.name in properties, option.name
        assert properties["top_p"]["exclusiveMinimum"] == 0
        assert properties["top_p"]["maximum"] == 1
        assert properties["max_completion_tokens"]["minimum"] == 1
        assert schemas[name]["additionalProperties"] is False
    assert schemas["ChatCompletionBody"]["required"] == ["messages"]


def test_every_path_of_it_is_served(server: Server, document: Json) -> None:
    for path, methods in document["paths"].items():
        for method in methods:
            response = server.request(method.upper(), path.replace("{model}", "glm4-demo"), b"{}")
            assert response.status in (200, 400), path


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_from_elsewhere(server: Server, document: Json) -> None:
    response = server.request("GET", "/docs")
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    text = response.read().decode()
    links = _Links()
    links.feed(text)
    assert links.addresses == ["openapi.json"]
    assert "script" not in links.tags
    assert all(path in text for path in document["paths"])


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """Short here; docs/server.md says how to run it for longer. Answers need a limit, for most set none."""
    server = start_server("--max-answer-tokens", "8")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error",
        "--max-examples", "8", "--request-timeout", "20", "--seed", "1", "--phases", "fuzzing",
        "--exclude-path", "/metrics", "--generation-database", "none", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    server.stop()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Tested: 12" in done.stdout
