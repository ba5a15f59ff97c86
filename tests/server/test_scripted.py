"""What no demo model says: Rumination's calls, failures in the middle of an answer, bugs."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Literal

import pytest
from serving import DEMO, Json, ask, put_together, read_events
from starlette.testclient import TestClient

from glm4.engine.request import RequestOutput
from glm4.errors import EngineError
from glm4.options import GREEDY, EngineOptions, SamplingParams, ServerOptions
from glm4.server.app import create_app
from glm4.text.chat import ChatTemplate
from glm4.text.tokenizer import Tokenizer

PATH = "/v1/chat/completions"


class ScriptedLLM:
    """Says `pieces`, then raises `failure` if there is one; its text is a real folder's."""

    health = "ready"
    max_model_len = 2048
    num_restarts = 0
    sampling_defaults = GREEDY

    def __init__(self, folder: Path, pieces: list[str], failure: Exception | None = None) -> None:
        self.options = EngineOptions(model=str(folder))
        self.tokenizer, self._template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
        self.thinks, self.has_own_tools = self._template.thinks, self._template.has_own_tools
        self._pieces, self._failure = pieces, failure
        self.asked: list[SamplingParams] = []

    async def encode_chat(self, messages: Any, tools: Any = None, *, thinking: bool = True) -> list[int]:
        return self._template.encode(self.tokenizer, messages, tools, thinking=thinking)

    async def generate(self, prompt: list[int], sampling: SamplingParams, **more: Any) -> AsyncGenerator[RequestOutput]:
        self.asked.append(sampling)
        said = ""
        for at, piece in enumerate(self._pieces):
            said += piece
            reason: Literal["stop"] | None = "stop" if at == len(self._pieces) - 1 and self._failure is None else None
            yield RequestOutput(0, prompt, [5] * (at + 1), said, piece, reason)
        if self._failure is not None:
            raise self._failure


def client_of(llm: ScriptedLLM, **options: Any) -> TestClient:
    app = create_app(llm, ServerOptions(**options))  # type: ignore[arg-type]
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def rumination(shared: Path, tmp_path: Path) -> Path:
    """The demo's tokenizer with Rumination's template."""
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, tmp_path / file)
    template = shared / "glm4-0414" / "GLM-Z1-Rumination-32B-0414" / "chat_template.jinja"
    shutil.copy(template, tmp_path / "chat_template.jinja")
    return tmp_path


def test_ruminations_calls(rumination: Path) -> None:
    written = '<think>\nI search.\n</think>\n{"name": "search", "arguments": {"query": "GLM-4 北京"}}'
    llm = ScriptedLLM(rumination, list(written))
    client = client_of(llm)
    [choice] = client.post(PATH, json=ask("hi")).json()["choices"]
    assert llm.asked[-1].skip_special_tokens is False
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "\nI search.\n"
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "search", "arguments": '{"query": "GLM-4 北京"}'}
    [streamed] = put_together(read_events(client.post(PATH, json=ask("hi", stream=True)).text))
    assert [each["function"] for each in streamed["tool_calls"]] == [call["function"]]
    body = {"model": rumination.name, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    thought, used = client.post("/v1/messages", json=body).json()["content"]
    assert (thought["type"], used["name"], used["input"]) == ("thinking", "search", {"query": "GLM-4 北京"})


def test_rumination_takes_no_tools_and_no_system_prompt(rumination: Path, tools: dict[str, Json]) -> None:
    client = client_of(ScriptedLLM(rumination, ["x"]))
    refused = client.post(PATH, json=ask("hi", tools=[tools["search"]]))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
    assert "has tools of its own" in refused.json()["error"]["message"]
    system = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]}
    refused = client.post(PATH, json=system)
    assert refused.status_code == 400
    assert "has a system prompt of its own" in refused.json()["error"]["message"]


def test_its_template_alone_has_tools_of_its_own(shared: Path) -> None:
    found = {
        folder.name for folder in (shared / "glm4-0414").iterdir() if ChatTemplate.from_folder(folder).has_own_tools
    }
    assert found == {"GLM-Z1-Rumination-32B-0414"}


def test_a_failure_before_the_first_word_is_a_status() -> None:
    for stream in (False, True):
        failed = client_of(ScriptedLLM(DEMO, [], EngineError("the step failed"))).post(
            PATH, json=ask("hi", stream=stream)
        )
        assert failed.status_code == 503
        assert failed.headers["retry-after"] == "1"
        assert failed.json()["error"] == {
            "message": "the step failed", "type": "overloaded_error", "param": None, "code": 503,
        }  # fmt: skip


def test_a_failure_after_it_is_the_last_event() -> None:
    client = client_of(ScriptedLLM(DEMO, ["你", "好"], EngineError("the step failed")))
    *_, (name, last) = read_events(client.post(PATH, json=ask("hi", stream=True)).text)
    assert (name, last["error"]["message"]) == ("message", "the step failed")
    *_, (name, last) = read_events(client.post("/v1/responses", json={"input": "hi", "stream": True}).text)
    assert name == "response.failed"
    assert last["response"]["error"]["message"] == "the step failed"
    body = {"model": "glm4-demo", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    *_, (name, last) = read_events(client.post("/v1/messages", json=body).text)
    assert (name, last["type"], last["error"]["message"]) == ("error", "error", "the step failed")
    assert client.post(PATH, json=ask("hi")).status_code == 503


def test_a_bug_is_a_500_with_a_body() -> None:
    client = client_of(ScriptedLLM(DEMO, [], ZeroDivisionError("secret")))
    failed = client.post(PATH, json=ask("hi"))
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "api_error"
    assert "secret" not in failed.text


def test_a_prompt_is_logged_where_that_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "glm4.server")
    client_of(ScriptedLLM(DEMO, ["x"])).post(PATH, json=ask("words"))
    client_of(ScriptedLLM(DEMO, ["x"]), log_prompts=True).post(PATH, json=ask("words"))
    silent, told = [json.loads(record.getMessage()) for record in caplog.records if record.name == "glm4.server"]
    assert "prompt" not in silent
    assert told["prompt"] == [{"role": "user", "content": "words"}]


def test_the_folders_advice_on_sampling_comes_before_openais_default() -> None:
    llm = ScriptedLLM(DEMO, ["x"])
    client_of(llm).post(PATH, json={"messages": [{"role": "user", "content": "hi"}]})
    assert (llm.asked[-1].do_sample, llm.asked[-1].temperature) == (True, 1.0)
    client_of(llm).post(PATH, json=ask("hi"))
    assert llm.asked[-1].do_sample is False
    assert llm.asked[-1].max_new_tokens is None
    advice = SamplingParams(do_sample=True, temperature=0.6, top_p=0.95, max_new_tokens=30_000)
    llm.sampling_defaults = advice.over(GREEDY)
    for limit, expected in ((None, 30_000), (50_000, 30_000), (20, 20)):
        client_of(llm, max_answer_tokens=limit).post(PATH, json={"messages": [{"role": "user", "content": "hi"}]})
        asked = llm.asked[-1]
        assert (asked.temperature, asked.top_p, asked.max_new_tokens) == (0.6, 0.95, expected)
