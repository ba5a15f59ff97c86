"""Completions, responses, messages, embeddings and tokens: raw, beside what the offline model says."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import jsonschema
import pytest
from serving import Json, Server, ask

from glm4 import LLM, SamplingParams

BEIJING = "请介绍一下北京"
GREEDY = SamplingParams(do_sample=False)


def user(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def test_completions(server: Server, offline: LLM) -> None:
    prompts = ["北京", offline.tokenizer.encode("上海是")]
    expected = offline.generate(prompts, SamplingParams(do_sample=False, max_new_tokens=9))
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 9}
    answer = server.post("/v1/completions", body)
    assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected]
    assert answer["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in expected)
    events = server.events("/v1/completions", body | {"stream_options": {"include_usage": True}})
    texts = ["", ""]
    for _, chunk in events[:-2]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [output.text for output in expected]
    assert events[-2][1]["usage"] == answer["usage"]
    assert events[-1] == ("message", "[DONE]")


def test_an_echo_has_the_log_probabilities_of_the_prompt(server: Server, offline: LLM) -> None:
    sampling = SamplingParams(do_sample=False, max_new_tokens=3, logprobs=1, prompt_logprobs=1)
    [expected] = offline.generate("北京是中国的首都", sampling)
    body = {"prompt": "北京是中国的首都", "temperature": 0, "max_tokens": 3, "echo": True, "logprobs": 1}
    [choice] = server.post("/v1/completions", body)["choices"]
    assert choice["text"] == "北京是中国的首都" + expected.text
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is None
    picked = [*expected.prompt_logprobs, *expected.logprobs]
    assert told["token_logprobs"][1:] == pytest.approx([entry.logprob for entry in picked], abs=1e-4)
    assert "".join(told["tokens"]) == choice["text"]
    assert [
        choice["text"][at:].startswith(token) for at, token in zip(told["text_offset"], told["tokens"], strict=True)
    ]


@pytest.mark.parametrize("bad", [{"prompt": []}, {"prompt": [1, "a"]}, {"prompt": [[]]}, {"prompt": 5}, {},
                                 {"prompt": "a", "suffix": "b"}, {"prompt": "a", "echo": True, "stream": True},
                                 {"prompt": "a", "messages": []}, {"prompt": [10**7]}, {"prompt": ""}])  # fmt: skip
def test_bad_completions(server: Server, bad: Json) -> None:
    status, answer = server.try_post("/v1/completions", bad)
    assert status == 400, answer


def test_tokens(server: Server, offline: LLM) -> None:
    text = "北京 and <|user|> [gMASK] 😀"
    tokens = server.post("/tokenize", {"prompt": text})
    assert tokens["tokens"] == offline.tokenizer.encode(text)
    assert tokens["count"] == len(tokens["tokens"])
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}) == {"prompt": text}
    assert server.post("/tokenize", {"messages": user(BEIJING)})["tokens"] == offline.encode_chat(user(BEIJING))
    assert server.try_post("/tokenize", {"prompt": "a", "messages": user("b")})[0] == 400
    assert server.try_post("/tokenize", {"prompt": "a", "tools": []})[0] == 400
    assert server.try_post("/detokenize", {"tokens": [10**9]})[0] == 400
    assert server.try_post("/detokenize", {"tokens": [-1]})[0] == 400


def test_embeddings(server: Server, offline: LLM) -> None:
    texts = ["北京", "你好，世界"]
    expected = offline.embed(texts)
    answer = server.post("/v1/embeddings", {"input": texts})
    for entry, vector in zip(answer["data"], expected, strict=True):
        assert entry["embedding"] == pytest.approx(vector, abs=1e-5)
    packed = server.post("/v1/embeddings", {"input": texts[0], "encoding_format": "base64"})["data"][0]["embedding"]
    raw = base64.b64decode(packed)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(expected[0], abs=1e-5)
    assert server.try_post("/v1/embeddings", {"input": texts, "dimensions": 5})[1]["error"]["param"] == "dimensions"
    assert server.try_post("/v1/embeddings", {"input": []})[0] == 400
    assert server.try_post("/v1/embeddings", {"input": ""})[0] == 400


def response_body(question: str, **more: Any) -> Json:
    return {"input": question, "temperature": 0, **more}


def flat(tool: Json) -> Json:
    """A tool as responses have it."""
    return {"type": "function", **tool["function"]}


def test_responses(server: Server, offline: LLM, tools: dict[str, Json]) -> None:
    [expected] = offline.chat(user(BEIJING), GREEDY)
    answer = server.post("/v1/responses", response_body(BEIJING))
    [item] = answer["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", expected.text)
    assert answer["usage"]["output_tokens"] == len(expected.token_ids)
    events = server.events("/v1/responses", response_body(BEIJING))
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    assert all(name == event["type"] for name, event in events)
    assert "".join(e["delta"] for name, e in events if name == "response.output_text.delta") == expected.text
    assert events[-1][0] == "response.completed"
    final = events[-1][1]["response"]
    assert final["output"][0]["content"] == item["content"]
    assert final["status"] == answer["status"] == "completed"

    question = {"role": "user", "content": "北京和上海今天天气怎么样"}
    called = server.post(
        "/v1/responses", {"input": [question], "temperature": 0, "tools": [flat(tools["get_weather"])]}
    )
    calls = called["output"]
    assert [(call["type"], call["name"]) for call in calls] == [("function_call", "get_weather")] * 2
    results = [
        '{"city": "北京", "weather": "晴", "temperature": 0}',
        '{"city": "上海", "weather": "多云", "temperature": 7}',
    ]
    outputs = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": result}
        for call, result in zip(calls, results, strict=True)
    ]
    body = {"input": [question, *calls, *outputs], "temperature": 0, "tools": [flat(tools["get_weather"])]}
    [told] = server.post("/v1/responses", body)["output"]
    assert told["content"][0]["text"] == "北京今天晴，气温0度；上海今天多云，气温7度。"


def test_responses_in_a_form(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    [item] = server.post("/v1/responses", response_body(BEIJING, text=form))["output"]
    jsonschema.validate(json.loads(item["content"][0]["text"]), schema)
    cut = server.post("/v1/responses", response_body(BEIJING, max_output_tokens=3))
    assert cut["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut["output"][0]["status"] == "incomplete"


def test_thoughts_in_responses(z1_server: Server) -> None:
    answer = z1_server.post("/v1/responses", response_body("三加五等于几？"))
    thought, said = answer["output"]
    assert thought["type"] == "reasoning"
    assert thought["content"][0]["text"].strip()
    assert said["content"][0]["text"] == "三加五等于八。"
    history = [*user("三加五等于几？"), thought, said, *user("三加五等于几？")]
    assert z1_server.post("/v1/responses", {"input": history, "temperature": 0})["output"]
    [at_once] = z1_server.post("/v1/responses", response_body("三加五等于几？", reasoning={"effort": "none"}))["output"]
    assert at_once["content"][0]["text"] == "三加五等于八。"


@pytest.mark.parametrize(("more", "param"), [
    ({"previous_response_id": "a"}, "previous_response_id"), ({"store": True}, "store"), ({"n": 2}, "n"),
    ({"include": ["x"]}, "include"), ({"background": True}, "background"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"input": [{"type": "item_reference", "id": "a"}]}, "input"), ({"input": 5}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
])  # fmt: skip
def test_bad_responses(server: Server, more: Json, param: str) -> None:
    status, answer = server.try_post("/v1/responses", response_body("hi") | more)
    assert (status, answer["error"]["param"]) == (400, param)


def messages_body(text: str, **more: Any) -> Json:
    return {"model": "glm4-demo", "max_tokens": 200, "temperature": 0, "messages": user(text), **more}


def anthropic_tool(tool: Json) -> Json:
    function = tool["function"]
    return {
        k: function[v] for k, v in {"name": "name", "description": "description", "input_schema": "parameters"}.items()
    }


def test_messages(server: Server, offline: LLM, tools: dict[str, Json]) -> None:
    [expected] = offline.chat(user(BEIJING), GREEDY)
    answer = server.post("/v1/messages", messages_body(BEIJING))
    assert answer["content"] == [{"type": "text", "text": expected.text}]
    assert answer["stop_reason"] == "end_turn"
    assert answer["usage"] == {"input_tokens": len(expected.prompt_token_ids), "output_tokens": len(expected.token_ids)}
    counted = server.post("/v1/messages/count_tokens", {"model": "glm4-demo", "messages": user(BEIJING)})
    assert counted == {"input_tokens": len(expected.prompt_token_ids)}
    stopped = server.post("/v1/messages", messages_body(BEIJING, stop_sequences=["中国"]))
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "中国")
    assert server.post("/v1/messages", messages_body(BEIJING, max_tokens=2))["stop_reason"] == "max_tokens"

    events = server.events("/v1/messages", messages_body(BEIJING))
    assert all(name == event["type"] for name, event in events)
    assert [events[0][0], events[-2][0], events[-1][0]] == ["message_start", "message_delta", "message_stop"]
    assert "".join(e["delta"]["text"] for name, e in events if name == "content_block_delta") == expected.text

    question = messages_body("北京和上海今天天气怎么样", tools=[anthropic_tool(tools["get_weather"])])
    called = server.post("/v1/messages", question)
    assert called["stop_reason"] == "tool_use"
    assert [block["input"] for block in called["content"]] == [{"city": "北京"}, {"city": "上海"}]
    results = [
        '{"city": "北京", "weather": "晴", "temperature": 0}',
        '{"city": "上海", "weather": "多云", "temperature": 7}',
    ]
    told = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": result}]}
        for block, result in zip(called["content"], results, strict=True)
    ]
    history = [
        *question["messages"],
        {"role": "assistant", "content": called["content"]},
        {"role": "user", "content": told},
    ]
    [block] = server.post("/v1/messages", question | {"messages": history})["content"]
    assert block["text"] == "北京今天晴，气温0度；上海今天多云，气温7度。"
    one = question | {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    assert len(server.post("/v1/messages", one)["content"]) == 1


def test_several_text_blocks_are_one_message(server: Server) -> None:
    blocks = [{"type": "text", "text": "请介绍"}, {"type": "text", "text": "一下北京"}]
    body = messages_body("", messages=[{"role": "user", "content": blocks}])
    assert (
        server.post("/v1/messages", body)["content"] == server.post("/v1/messages", messages_body(BEIJING))["content"]
    )


def test_a_system_prompt_comes_first(server: Server) -> None:
    body = {"model": "glm4-demo", "messages": user("hi"), "system": [{"type": "text", "text": "Be brief."}]}
    messages = [{"role": "system", "content": "Be brief."}, *user("hi")]
    expected = server.post("/tokenize", {"messages": messages})["count"]
    assert server.post("/v1/messages/count_tokens", body)["input_tokens"] == expected


def test_thoughts_in_messages(z1_server: Server) -> None:
    body = messages_body("三加五等于几？") | {"model": "glm4-z1-demo"}
    thought, said = z1_server.post("/v1/messages", body)["content"]
    assert thought["type"] == "thinking"
    assert thought["thinking"].strip()
    assert said["text"] == "三加五等于八。"
    [at_once] = z1_server.post("/v1/messages", body | {"thinking": {"type": "disabled"}})["content"]
    assert at_once["text"] == "三加五等于八。"


@pytest.mark.parametrize("more", [
    {"max_tokens": None}, {"max_tokens": 0}, {"system": 5}, {"messages": []}, {"thinking": {"type": "enabled"}},
    {"tool_choice": {"type": "tool"}}, {"tool_choice": {"type": "any"}}, {"logprobs": True}, {"top_k": -1},
    {"messages": [{"role": "system", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
])  # fmt: skip
def test_bad_messages(server: Server, more: Json) -> None:
    status, answer = server.try_post("/v1/messages", messages_body("hi") | more)
    assert status == 400, answer
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"


def test_what_is_not_there(server: Server) -> None:
    status, answer = server.try_post("/v1/messages", messages_body("hi") | {"model": "claude"})
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    assert server.try_post("/v1/nothing", {})[0] == 404
    assert server.request("GET", "/v1/chat/completions").status == 405
    assert server.try_post("/v1/chat/completions", ask("hi", model=""))[0] == 404
