"""Anthropic's Messages: its requests to ours, our answers to its objects and events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from glm4.api.answer import AnswerForm, Part
from glm4.api.bodies import Json, read_body, refuse_unless, sampling_from_json
from glm4.api.chat import ChatRequest, ToolUse
from glm4.api.events import data_event
from glm4.api.openai import Head
from glm4.engine.request import RequestOutput
from glm4.errors import OptionError, PromptError


class InputTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that may be called."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    """Beginnings that prompts share are always kept."""
    eager_input_streaming: bool | None = None
    """Arguments always come as they are written."""


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Whether, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingSettings(msgspec.Struct, forbid_unknown_fields=True):
    """Whether a model that thinks first (GLM-Z1) does so; how long it takes is up to the model."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class SchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that a schema accepts."""

    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    """What the answer's text is to be."""

    format: SchemaFormat | None = None


class CountTokensBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What makes a prompt."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[InputTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingSettings | None = None
    cache_control: dict[str, Any] | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountTokensBody, kw_only=True):
    """The keys of a message."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """A message as it was asked for."""

    chat: ChatRequest
    model: str
    stream: bool

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> MessagesRequest:
        """Raises OptionError and PromptError for what is unknown, malformed or not supported."""
        said, _ = read_body(body, MessagesBody, sampling=False)
        refuse_unless(said, service_tier=("auto", "standard_only"))
        values = {"max_new_tokens": said.max_tokens, "stop": said.stop_sequences or ()}
        values |= {
            name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(said, name)) is not None
        }
        try:
            chat = _chat(said, values)
        except OptionError as error:
            raise OptionError(str(error).replace("max_new_tokens", "max_tokens")) from error
        return cls(chat, said.model, bool(said.stream))


def count_tokens_chat(body: Mapping[str, Any]) -> tuple[ChatRequest, str]:
    """The conversation whose prompt is to be counted, and the model that is to do it."""
    said, _ = read_body(body, CountTokensBody, sampling=False)
    return _chat(said, {}), said.model


def _chat(said: CountTokensBody, values: Json) -> ChatRequest:
    choice: Any = said.tool_choice.type if said.tool_choice else "auto"
    if choice == "tool":
        if said.tool_choice is None or said.tool_choice.name is None:
            raise OptionError("tool_choice: type tool needs the name of one")
        choice = (said.tool_choice.name,)
    tools = [
        {
            "name": tool.name,
            "description": tool.description or "",
            "parameters": tool.input_schema,
            "strict": tool.strict,
        }
        for tool in said.tools or []
    ]
    system = [] if said.system is None else [{"role": "system", "content": said.system}]
    return ChatRequest(
        messages=system + [part for index, each in enumerate(said.messages) for part in _parts(each, index)],
        tools=ToolUse.of(
            tools,
            "required" if choice == "any" else choice,
            parallel=not (said.tool_choice and said.tool_choice.disable_parallel_tool_use),
        ),
        sampling=sampling_from_json(values),
        answer_schema=said.output_config.format.schema if said.output_config and said.output_config.format else None,
        thinking={"enabled": True, "disabled": False}.get(said.thinking.type) if said.thinking else None,
    )


def _parts(message: Json, index: int) -> list[Json]:
    """A message as those that chat templates know: calls and their results stand by themselves."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise PromptError(f"messages[{index}]: role {role!r} is neither 'user' nor 'assistant'")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    parts: list[Json] = []
    for at, block in enumerate(content):
        part = _block(block, role, f"messages[{index}].content[{at}]")
        if part is None:
            continue
        if block["type"] == "text" and parts and parts[-1]["role"] == role and "tool_calls" not in parts[-1]:
            parts[-1]["content"] += part["content"]
        else:
            parts.append(part)
    return parts or [{"role": role, "content": ""}]


def _block(block: Any, role: str, where: str) -> Json | None:
    kind = block.get("type") if isinstance(block, dict) else None
    match role, kind:
        case _, "text":
            return {"role": role, "content": [{"type": "text", "text": block.get("text")}]}
        case "assistant", "thinking" | "redacted_thinking":
            return None  # a history holds answers only
        case "assistant", "tool_use":
            arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
            call = {"function": {"name": block.get("name"), "arguments": arguments}}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "user", "tool_result":
            content = block.get("content", "")
            if isinstance(content, list):
                content = [{"type": each.get("type"), "text": each.get("text")} if isinstance(each, dict) else each
                           for each in content]  # fmt: skip
            return {"role": "tool", "content": content}
        case _:
            raise PromptError(f"{where}: {kind!r} is not supported in a message of role {role!r}: GLM-4 reads text")


def _stop_reason(output: RequestOutput, has_calls: bool) -> str:
    if output.finish_reason == "length":
        return "max_tokens"
    if has_calls:
        return "tool_use"
    return "stop_sequence" if isinstance(output.stop_reason, str) else "end_turn"


def _stop(output: RequestOutput, has_calls: bool) -> Json:
    """Why the answer ended."""
    sequence = output.stop_reason if isinstance(output.stop_reason, str) else None
    return {"stop_reason": _stop_reason(output, has_calls), "stop_sequence": sequence}


def whole_message(head: Head, form: AnswerForm, output: RequestOutput) -> Json:
    """The message that a finished output is."""
    writer = MessageWriter(head, form)
    writer.push(0, replace(output, delta=output.text))
    return writer.ended


class MessageWriter:
    """One message: its events as words come, and the whole of it."""

    def __init__(self, head: Head, form: AnswerForm) -> None:
        self._head = head
        self._parser = form.parser()
        self._blocks: list[Json] = []
        self._arguments = ""
        """Of the call that is the last block."""
        self._events: list[bytes] = []
        self._begun = self._has_calls = False
        self.ended: Json = {}
        """The whole message, once its output has ended."""

    def push(self, number: int, output: RequestOutput) -> list[bytes]:
        """The events of what is new."""
        if not self._begun:
            self._begun = True
            self._tell("message_start", message=self._message(output, {"stop_reason": None, "stop_sequence": None}))
        for part in self._parser.push(output.delta):
            self._add(part)
        if output.finish_reason is not None:
            for part in self._parser.finish():
                self._add(part)
            self._close()
            stop = _stop(output, self._has_calls)
            self.ended = self._message(output, stop)
            self._tell("message_delta", delta=stop, usage={"output_tokens": len(output.token_ids)})
            self._tell("message_stop")
        events, self._events = self._events, []
        return events

    def finish(self, outputs: Sequence[RequestOutput]) -> list[bytes]:
        """Nothing comes after the last event of `push`."""
        return []

    def _message(self, output: RequestOutput, stop: Json) -> Json:
        usage = {"input_tokens": len(output.prompt_token_ids), "output_tokens": len(output.token_ids)}
        return {
            "id": f"msg_{self._head.name}",
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": list(self._blocks),
            **stop,
            "usage": usage,
        }

    def _add(self, part: Part) -> None:
        kind, words = part
        match kind:
            case "thought":
                self._say({"type": "thinking", "thinking": "", "signature": ""}, "thinking", words)
            case "text":
                self._say({"type": "text", "text": ""}, "text", words)
            case "call":
                at = sum(block["type"] == "tool_use" for block in self._blocks)
                self._open({"type": "tool_use", "id": f"toolu_{self._head.name}_{at}", "name": words, "input": {}})
                self._has_calls, self._arguments = True, ""
            case "arguments":
                self._arguments += words
                self._delta(type="input_json_delta", partial_json=words)

    def _say(self, block: Json, key: str, words: str) -> None:
        if not self._blocks or self._blocks[-1]["type"] != block["type"]:
            words = words.lstrip("\n")
            if not words:
                return
            self._open(block)
        self._blocks[-1][key] += words
        self._delta(type=f"{key}_delta", **{key: words})

    def _open(self, block: Json) -> None:
        self._close()
        self._blocks.append(block)
        self._tell("content_block_start", index=len(self._blocks) - 1, content_block=dict(block))

    def _close(self) -> None:
        if not self._blocks:
            return
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"] = _arguments(self._arguments)
        self._tell("content_block_stop", index=len(self._blocks) - 1)

    def _delta(self, **delta: str) -> None:
        self._tell("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _tell(self, event: str, **values: Any) -> None:
        self._events.append(data_event({"type": event, **values}, event))


def _arguments(text: str) -> Any:
    """The arguments of a call as an object, or the text itself where it is none, as after a cut."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
