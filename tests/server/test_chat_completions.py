"""/v1/chat/completions answers as `LLM` does, whole and streamed, with calls, thoughts and forms."""

from __future__ import annotations

import json

import jsonschema
import pytest
from serving import Json, Server, ask, put_together

from glm4 import LLM, SamplingParams

PATH = "/v1/chat/completions"
BEIJING = "请介绍一下北京"
GREEDY = SamplingParams(do_sample=False)


def message(answer: Json, choice: int = 0) -> Json:
    found: Json = answer["choices"][choice]["message"]
    return found


def test_it_answers_as_offline(server: Server, offline: LLM) -> None:
    [expected] = offline.chat([{"role": "user", "content": BEIJING}], GREEDY)
    answer = server.post(PATH, ask(BEIJING, model="glm4-demo"))
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "glm4-demo"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt, new = len(expected.prompt_token_ids), len(expected.token_ids)
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def test_a_stream_says_the_same(server: Server) -> None:
    body = ask(BEIJING, logprobs=True, top_logprobs=2)
    whole = server.post(PATH, body)
    events = server.events(PATH, body | {"stream_options": {"include_usage": True}})
    [choice] = put_together(events)
    assert choice["content"] == message(whole)["content"]
    assert choice["finish_reason"] == "stop"
    assert events[-2][1]["choices"] == []
    assert events[-2][1]["usage"] == whole["usage"]
    streamed, said = choice["logprobs"], whole["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in said]
    assert [entry["logprob"] for entry in streamed] == pytest.approx([entry["logprob"] for entry in said], abs=1e-4)
    assert len(streamed) == whole["usage"]["completion_tokens"]
    assert "usage" not in server.events(PATH, body)[-2][1]


def test_logprobs_are_those_of_the_model(server: Server, offline: LLM) -> None:
    [expected] = offline.chat(
        [{"role": "user", "content": BEIJING}], SamplingParams(do_sample=False, logprobs=3, max_new_tokens=8)
    )
    answer = server.post(PATH, ask(BEIJING, logprobs=True, top_logprobs=3, max_completion_tokens=8))
    entries = answer["choices"][0]["logprobs"]["content"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert [entry["logprob"] for entry in entries] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode().lstrip("\n") == expected.text
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)


def test_sampling_has_a_seed_and_openais_temperature(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "讲一个故事"}], "max_tokens": 30, "n": 3}
    first = server.post(PATH, body | {"seed": 7})
    again = server.post(PATH, body | {"seed": 7})
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(texts)) > 1, "a temperature of 1 where nothing is said"
    assert texts == [choice["content"] for choice in put_together(server.events(PATH, body | {"seed": 7}))]


def test_stop_and_logit_bias(server: Server, offline: LLM) -> None:
    text = message(server.post(PATH, ask(BEIJING)))["content"]
    stopped = server.post(PATH, ask(BEIJING, stop=["中国"]))
    assert message(stopped)["content"] == text.partition("中国")[0]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    [banned] = offline.tokenizer.encode("北京")
    other = message(server.post(PATH, ask(BEIJING, logit_bias={str(banned): -100}, max_tokens=20)))["content"]
    assert "北京" in text
    assert "北京" not in other


def test_two_calls_in_one_turn_and_the_answer_to_their_results(server: Server, tools: dict[str, Json]) -> None:
    question = ask("北京和上海今天天气怎么样", tools=[tools["get_weather"]])
    answer = server.post(PATH, question)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    called = message(answer)
    assert called["content"] is None
    functions = [call["function"] for call in called["tool_calls"]]
    assert [function["name"] for function in functions] == ["get_weather", "get_weather"]
    assert [json.loads(function["arguments"])["city"] for function in functions] == ["北京", "上海"]
    assert len({call["id"] for call in called["tool_calls"]}) == 2
    [streamed] = put_together(server.events(PATH, question))
    assert streamed["finish_reason"] == "tool_calls"
    assert streamed["content"] == ""
    assert [call["function"] for call in streamed["tool_calls"]] == functions

    weather = [
        '{"city": "北京", "weather": "晴", "temperature": 0}',
        '{"city": "上海", "weather": "多云", "temperature": 7}',
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": result}
        for call, result in zip(called["tool_calls"], weather, strict=True)
    ]
    told = server.post(PATH, question | {"messages": [*question["messages"], called, *results]})
    assert message(told)["content"] == "北京今天晴，气温0度；上海今天多云，气温7度。"
    assert told["choices"][0]["finish_reason"] == "stop"


def test_arguments_are_streamed_as_they_come(server: Server, tools: dict[str, Json]) -> None:
    """A slow reader gets them merged, so there are as many pieces as the reader was fast: two at least, in some try."""
    for _ in range(20):
        events = server.events(PATH, ask("北京和上海今天天气怎么样", tools=[tools["get_weather"]]))
        deltas = [chunk["choices"][0]["delta"] for _, chunk in events[:-1]]
        if sum("tool_calls" in delta for delta in deltas) > 4:
            break
    else:
        pytest.fail("two calls never came in more than their names and whole arguments")


def test_tool_choice(server: Server, tools: dict[str, Json]) -> None:
    both = [tools["get_weather"], tools["search"]]
    hello = ask("你好", tools=both, max_tokens=60)
    assert message(server.post(PATH, hello))["content"]
    required = message(server.post(PATH, hello | {"tool_choice": "required"}))
    assert required["tool_calls"][0]["function"]["name"] in ("get_weather", "search")
    named = {"type": "function", "function": {"name": "search"}}
    forced = message(server.post(PATH, hello | {"tool_choice": named}))["tool_calls"][0]["function"]
    assert forced["name"] == "search"
    jsonschema.validate(json.loads(forced["arguments"]), tools["search"]["function"]["parameters"])
    weather = ask("北京今天天气怎么样", tools=both, tool_choice="none")
    assert "tool_calls" not in message(server.post(PATH, weather))


def test_one_call_where_they_may_not_be_parallel(server: Server, tools: dict[str, Json]) -> None:
    question = ask("北京和上海今天天气怎么样", tools=[tools["get_weather"]], parallel_tool_calls=False)
    [call] = message(server.post(PATH, question))["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "北京"}'}


def test_strict_arguments_satisfy_their_schema(server: Server, tools: dict[str, Json]) -> None:
    function = tools["get_weather"]["function"]
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    strict = {"type": "function", "function": {**function, "parameters": schema, "strict": True}}
    answer = server.post(PATH, ask("北京今天天气怎么样", tools=[strict], max_tokens=60))
    first, *_ = message(answer)["tool_calls"]
    jsonschema.validate(json.loads(first["function"]["arguments"]), schema)
    assert (
        message(server.post(PATH, ask("你好", tools=[strict])))["content"]
        == message(server.post(PATH, ask("你好", tools=[tools["get_weather"]])))["content"]
    )


@pytest.mark.parametrize("stream", [False, True])
def test_response_format(server: Server, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "big": {"type": "boolean"}},
        "required": ["name", "big"],
        "additionalProperties": False,
    }
    body = ask(BEIJING, response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}})
    if stream:
        text = put_together(server.events(PATH, body))[0]["content"]
    else:
        text = message(server.post(PATH, body))["content"]
    jsonschema.validate(json.loads(text), schema)


def test_response_format_beside_tools(server: Server, tools: dict[str, Json]) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = ask("北京今天天气怎么样", tools=[tools["get_weather"]], response_format=form, max_tokens=60)
    assert message(server.post(PATH, body))["tool_calls"]
    text = message(server.post(PATH, body | {"messages": [{"role": "user", "content": "你好"}]}))["content"]
    jsonschema.validate(json.loads(text), schema)


def test_a_form_of_our_own(server: Server) -> None:
    assert message(server.post(PATH, ask(BEIJING, choice=["上海", "北京"])))["content"] in ("上海", "北京")
    assert message(server.post(PATH, ask(BEIJING, regex="[0-9]{4}")))["content"].isdecimal()


def test_thoughts(z1_server: Server) -> None:
    question = ask("三加五等于几？")
    thought = message(z1_server.post(PATH, question))
    assert thought["content"] == "三加五等于八。"
    assert thought["reasoning_content"].strip()
    [streamed] = put_together(z1_server.events(PATH, question))
    assert streamed["content"] == thought["content"]
    assert streamed["reasoning_content"] == thought["reasoning_content"]
    for off in ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}):
        at_once = message(z1_server.post(PATH, question | off))
        assert at_once["content"] == "三加五等于八。"
        assert "reasoning_content" not in at_once


def test_a_thought_and_then_a_form(z1_server: Server) -> None:
    body = ask("三加五等于几？", response_format={"type": "json_object"}, max_tokens=200)
    answer = message(z1_server.post(PATH, body | {"regex": None}))
    assert answer["reasoning_content"].strip()
    assert answer["content"].startswith("{")


def test_a_thought_and_then_a_call_that_must_be(z1_server: Server, tools: dict[str, Json]) -> None:
    expression = {"type": "object", "properties": {"expression": {"enum": ["3+5"]}}, "required": ["expression"]}
    function = {**tools["calculator"]["function"], "parameters": {**expression, "additionalProperties": False}}
    tool = {"type": "function", "function": function}
    body = ask("三加五等于几？", tools=[tool], tool_choice="required", parallel_tool_calls=False)
    answer = message(z1_server.post(PATH, body))
    assert answer["reasoning_content"].strip()
    [call] = answer["tool_calls"]
    assert call["function"]["name"] == "calculator"
    assert json.loads(call["function"]["arguments"]) == {"expression": "3+5"}


BAD: list[tuple[Json, str | None]] = [
    (ask("x", foo=1), "foo"),
    (ask("x", functions=[]), "functions"),
    (ask("x", temperature="hot"), "temperature"),
    (ask("x", temperature=-1), "temperature"),
    (ask("x", max_tokens=0), "max_tokens"),
    (ask("x", max_tokens=5, max_completion_tokens=5), "max_completion_tokens"),
    (ask("x", n=0), "n"),
    (ask("x", n=129), "n"),
    (ask("x", best_of=2), "best_of"),
    (ask("x", prompt_logprobs=1), "prompt_logprobs"),
    (ask("x", top_logprobs=2), "top_logprobs"),
    (ask("x", logprobs=True, top_logprobs=21), "logprobs"),
    (ask("x", stop=[""]), "stop"),
    (ask("x", stop=5), "stop"),
    (ask("x", logit_bias={"999999": 1}), "logit_bias"),
    (ask("x", logit_bias={"a": 1}), None),
    (ask("x", store=True), "store"),
    (ask("x", service_tier="flex"), "service_tier"),
    (ask("x", stream=False, stream_options={"include_usage": True}), "stream_options"),
    (ask("x", stream=1), "stream"),
    (ask("x", tool_choice="required"), "tool_choice"),
    (ask("x", tool_choice="perhaps"), "tool_choice"),
    (ask("x", tools=[{"type": "function"}]), "tools"),
    (ask("x", tools=[{"name": "a"}, {"name": "a"}]), "tools"),
    (ask("x", response_format={"type": "xml"}), "response_format"),
    (ask("x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "wrong"}}}), "json_schema"),
    (ask("x", reasoning_effort="high"), "reasoning_effort"),
    (ask("x", reasoning_effort="most"), "reasoning_effort"),
    (ask("x", thinking={"type": "enabled"}), "thinking"),
    (ask("x", reasoning_effort="none", thinking={"type": "enabled"}), "reasoning_effort"),
    (ask("x", grammar="start: ("), "grammar"),
    (ask("x", regex="a", choice=["b"]), None),
    (ask("x", min_new_tokens=9, max_tokens=8), "min_new_tokens"),
    (ask("x", tools=[{"name": "two\nlines"}]), "tools"),
    (ask("x", tools=[{"name": " a"}]), "tools"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({}, "messages"),
    (ask("x" * 5000), None),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: str(value)[:50])
def test_what_is_not_supported_is_refused_by_name(server: Server, body: Json, param: str | None) -> None:
    for stream in (False, True):
        status, answer = server.try_post(PATH, {"stream": stream} | body)
        assert status == 400, answer
        error = answer["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert error["param"] == param, error


def test_another_model_is_not_found(server: Server) -> None:
    status, answer = server.try_post(PATH, ask("x", model="gpt-4o"))
    assert status == 404
    assert answer["error"]["param"] == "model"
    assert "glm4-demo" in answer["error"]["message"]
