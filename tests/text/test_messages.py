from __future__ import annotations

import enum
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from glm4.errors import PromptError
from glm4.text.chat import ChatTemplate
from glm4.text.messages import normalise_messages, normalise_tools

ARGUMENTS = {"city": "北京", "days": [1, 2]}


def call(arguments: Any, name: str = "get_weather") -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


OPENAI = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "天气"}, {"type": "text", "text": "？"}], "name": None},
    {"role": "assistant", "content": None, "tool_calls": [call(ARGUMENTS), call('{"a":1}', "get_time")]},
    {"role": "tool", "tool_call_id": "call_1", "content": "21"},
    {"role": "assistant", "content": "It is 21.", "tool_calls": []},
    {"role": "assistant", "content": "One moment.", "tool_calls": [{"name": "bare"}]},
]
GLM4 = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "天气？"},
    {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京", "days": [1, 2]}'},
    {"role": "assistant", "metadata": "get_time", "content": '{"a":1}'},
    {"role": "observation", "content": "21", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "It is 21."},
    {"role": "assistant", "content": "One moment."},
    {"role": "assistant", "metadata": "bare", "content": "{}"},
]


def test_openai_shapes_become_glm4s() -> None:
    before = json.dumps(OPENAI)
    assert normalise_messages(OPENAI) == GLM4
    assert json.dumps(OPENAI) == before
    assert normalise_messages(GLM4) == GLM4


def test_both_shapes_make_the_same_prompt(official_9b: Path) -> None:
    template = ChatTemplate.from_folder(official_9b)
    prompt = template.render(OPENAI)
    assert prompt == template.render(GLM4)
    assert '<|assistant|>get_weather\n{"city": "北京", "days": [1, 2]}<|assistant|>get_time\n{"a":1}' in prompt
    assert "<|observation|>\n21<|assistant|>\nIt is 21." in prompt


class Colour(str, enum.Enum):  # noqa: UP042 (str() of a StrEnum is its text; of this it is not)
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


def test_rich_values_become_plain_ones() -> None:
    message = MappingProxyType({"role": "user", "content": Colour.RED, "level": Level.HIGH})
    (plain,) = normalise_messages((message,))
    assert plain == {"role": "user", "content": "red", "level": 3}
    assert [type(value) for value in plain.values()] == [int, str, str]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("hi", "messages: expected a list of messages, got a str"),
        ({"role": "user", "content": "hi"}, "messages: expected a list of messages, got a dict"),
        (None, "messages: expected a list of messages, got nothing"),
        ([], "messages: the list is empty"),
        (["hi"], "messages[0]: expected an object, got a str"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "messages[1]: no role; give one of system, "),
        ([{"role": "usr", "content": "a"}], "messages[0]: unknown role 'usr'; did you mean 'user'?"),
        ([{"role": "zzz", "content": "a"}], "messages[0]: unknown role 'zzz'; known: assistant, developer, "),
        ([{"role": 5, "content": "a"}], "messages[0]: unknown role 5"),
        ([{"role": "user"}], "messages[0]: no content"),
        ([{"role": "assistant", "content": None}], "messages[0]: no content"),
        ([{"role": "user", "content": 5}], "messages[0]: content is a int, not text"),
        ([{"role": "user", "content": {"text": "a"}}], "messages[0]: content is a dict, not text"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]: 'a str' is not text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]: 'image_url' is not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]: text is nothing, not text"),
        (
            [{"role": "user", "content": "", "tool_calls": [call("{}")]}],
            "messages[0]: tool_calls belong to an assistant",
        ),
        ([{"role": "assistant", "tool_calls": "f"}], "messages[0]: tool_calls is a str, not a list"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "messages[0].tool_calls[0]: no function name"),
        ([{"role": "assistant", "tool_calls": [call({}, "")]}], "messages[0].tool_calls[0]: no function name"),
        ([{"role": "assistant", "content": "", "metadata": {}}], "messages[0]: metadata is a dict, not the name"),
        ([{"role": "user", "content": "", "x": object()}], "messages[0]: holds a object, which JSON does not have"),
        ([{"role": "user", "content": "", 0: 1}], "messages[0]: key 0 is a int, not text"),
    ],
)
def test_malformed_messages_are_named(messages: Any, error: str) -> None:
    with pytest.raises(PromptError) as caught:
        normalise_messages(messages)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ({"name": "f"}, "tools: expected a list of functions, got a dict"),
        (["f"], "tools[0]: expected an object, got a str"),
        ([{"name": "f"}, {"function": {}}], "tools[1]: no function name"),
        ([{"type": "function", "function": "f"}], "tools[0]: no function name"),
        ([{"name": " "}], "tools[0]: no function name"),
        ([{"name": "f", "parameters": {1, 2}}], "tools[0]: holds a set, which JSON does not have"),
    ],
)
def test_malformed_tools_are_named(tools: Any, error: str) -> None:
    with pytest.raises(PromptError) as caught:
        normalise_tools(tools)
    assert str(caught.value).startswith(error)


def test_endless_nesting_is_refused() -> None:
    tool: dict[str, Any] = {"name": "f"}
    tool["self"] = tool
    with pytest.raises(PromptError, match=r"tools\[0\]: nested deeper than 64"):
        normalise_tools([tool])


def test_no_tools_are_none() -> None:
    assert normalise_tools(None) == normalise_tools([]) == []
