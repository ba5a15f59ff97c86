"""Streams of every chat API make the same answer, however the model's words are cut."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from serving import Json, put_together, read_events
from tool_call_corpus import NAMED, NAMES, Sample

from glm4.api.answer import AnswerForm, read_answer
from glm4.api.chat_completions import ChatCompletionEvents, chat_completion
from glm4.api.events import EventWriter
from glm4.api.messages import MessageWriter, whole_message
from glm4.api.openai import Head
from glm4.api.responses import ResponseWriter, whole_response
from glm4.engine.request import RequestOutput

HEAD = Head("name", "glm", 0)
CALLS = AnswerForm(tool_names=NAMES)
THOUGHTS = AnswerForm(inside_thought=True, tool_names=NAMES)


def outputs_of(text: str, cuts: list[int]) -> list[RequestOutput]:
    """The text in pieces, the last of which ends the answer."""
    marks = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[start:end] for start, end in zip([0, *marks], [*marks, len(text)], strict=True)]
    outputs = []
    for at, piece in enumerate(pieces):
        said = "".join(pieces[: at + 1])
        outputs.append(RequestOutput(0, [1, 2], [5] * at, said, piece, "stop" if at == len(cuts) else None))
    return outputs


def stream(writer: EventWriter, outputs: list[RequestOutput]) -> list[tuple[str, Any]]:
    events = [event for output in outputs for event in writer.push(0, output)]
    return read_events(b"".join([*events, *writer.finish(outputs[-1:])]).decode())


samples = st.sampled_from(NAMED)
cuts = st.lists(st.integers(0, 120), max_size=6)
forms = st.sampled_from([CALLS, THOUGHTS])


def spoken(sample: Sample, form: AnswerForm) -> str:
    return f"\nI think <b>.\n</think>{sample.output}" if form.inside_thought else sample.output


@given(samples, cuts, forms)
def test_chat_completions(sample: Sample, cuts: list[int], form: AnswerForm) -> None:
    outputs = outputs_of(spoken(sample, form), cuts)
    [choice] = put_together(stream(ChatCompletionEvents(HEAD, 1, None, form, False), outputs))  # type: ignore[arg-type]
    [whole] = chat_completion(HEAD, outputs[-1:], None, form)["choices"]  # type: ignore[arg-type]
    message = whole["message"]
    assert choice["content"] == (message["content"] or "")
    assert choice["reasoning_content"] == message.get("reasoning_content", "")
    assert choice["tool_calls"] == message.get("tool_calls", [])
    assert choice["finish_reason"] == whole["finish_reason"] == ("tool_calls" if sample.calls else "stop")


@given(samples, cuts, forms)
def test_responses(sample: Sample, cuts: list[int], form: AnswerForm) -> None:
    """Built up from its events, each item is what the last event says it is, and the parser's answer."""
    outputs = outputs_of(spoken(sample, form), cuts)
    items: list[Json] = []
    for name, event in stream(ResponseWriter(HEAD, {}, form), outputs):
        if name == "response.output_item.added":
            items.append({"words": "", "item": event["item"]})
        elif name.endswith(".delta"):
            assert (event["output_index"], event["item_id"]) == (len(items) - 1, items[-1]["item"]["id"])
            items[-1]["words"] += event["delta"]
        elif name.endswith(".done") and name != "response.output_item.done":
            assert items[-1]["words"] == event.get("text", event.get("arguments", event.get("part", {}).get("text")))
    final = event["response"]
    assert final == whole_response(HEAD, {}, form, outputs[-1])
    assert [item["item"]["id"] for item in items] == [item["id"] for item in final["output"]]
    answer = read_answer(outputs[-1].text, form)
    calls = [(item["name"], item["arguments"]) for item in final["output"] if item["type"] == "function_call"]
    assert calls == [(call.name, call.arguments) for call in answer.calls]
    texts = [item["content"][0]["text"] for item in final["output"] if item["type"] == "message"]
    assert "\n".join(texts).split() == answer.text.split()


@given(samples, cuts, forms)
def test_messages(sample: Sample, cuts: list[int], form: AnswerForm) -> None:
    outputs = outputs_of(spoken(sample, form), cuts)
    blocks: list[Json] = []
    open_block = False
    for name, event in stream(MessageWriter(HEAD, form), outputs):
        if name == "content_block_start":
            assert not open_block
            open_block = True
            blocks.append(event["content_block"] | {"words": ""})
        elif name == "content_block_delta":
            assert open_block
            assert event["index"] == len(blocks) - 1
            blocks[-1]["words"] += next(value for key, value in event["delta"].items() if key != "type")
        elif name == "content_block_stop":
            open_block = False
    assert not open_block
    whole = whole_message(HEAD, form, outputs[-1])["content"]
    assert [block["type"] for block in blocks] == [block["type"] for block in whole]
    for block, expected in zip(blocks, whole, strict=True):
        if block["type"] == "tool_use":
            assert (block["name"], block["id"]) == (expected["name"], expected["id"])
            assert expected["input"] in (block["words"], _loaded(block["words"]))
        else:
            assert block["words"] == expected[block["type"]]
    assert len([block for block in whole if block["type"] == "tool_use"]) == len(sample.calls)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
