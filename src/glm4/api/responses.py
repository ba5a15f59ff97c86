"""OpenAI's Responses: its requests to ours, our answers to its objects and events. Nothing is stored between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from glm4.api.answer import AnswerForm, Part
from glm4.api.bodies import (
    Json,
    JsonObjectFormat,
    OpenAIBody,
    TextFormat,
    read_body,
    refuse_unless,
    sampling_of,
)
from glm4.api.chat import ChatRequest, Effort, ToolUse, thinking_of
from glm4.api.events import data_event
from glm4.api.openai import Head
from glm4.engine.request import RequestOutput
from glm4.errors import OptionError, PromptError


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The function that is to be called."""

    type: Literal["function"]
    name: str


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that may be called."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class SchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that a schema accepts."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, forbid_unknown_fields=True):
    """What the answer's text is to be."""

    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """Whether a model that thinks first (GLM-Z1) does so."""

    effort: Effort | None = None


class ResponsesBody(OpenAIBody, kw_only=True):
    """The keys of a response beside those about sampling."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    truncation: str | None = None
    background: bool | None = None


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """A response as it was asked for."""

    chat: ChatRequest
    model: str | None
    stream: bool
    echoed: Json
    """What the answer repeats of the request."""

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ResponsesRequest:
        """Raises OptionError and PromptError for what is unknown, malformed or not supported."""
        said, values = read_body(body, ResponsesBody)
        refuse_unless(
            said,
            store=(False,),
            service_tier=("auto", "default"),
            include=([],),
            truncation=("disabled",),
            background=(False,),
        )
        for key in ("n", "best_of", "logprobs"):
            if key in values:
                raise OptionError(f"{key}: a response is one answer in words; use /v1/chat/completions")
        choice, effort = said.tool_choice, said.reasoning.effort if said.reasoning else None
        tools = [{key: value for key, value in msgspec.to_builtins(tool).items() if value is not None}
                 for tool in said.tools or []]  # fmt: skip
        chat = ChatRequest(
            messages=_messages(said.instructions, said.input),
            tools=ToolUse.of(
                [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in tools],
                (choice.name,) if isinstance(choice, NamedFunction) else choice or "auto",
                said.parallel_tool_calls,
            ),
            sampling=sampling_of(body, values),
            thinking=thinking_of(effort, "reasoning.effort"),
            answer_schema=_schema(said.text),
        )
        echoed = {
            "instructions": said.instructions,
            "max_output_tokens": chat.sampling.max_new_tokens,
            "metadata": said.metadata or {},
            "parallel_tool_calls": chat.tools.parallel,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": chat.sampling.temperature,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [{"strict": False, "parameters": {}, **tool} for tool in tools],
            "top_p": chat.sampling.top_p,
            "truncation": "disabled",
        }
        return cls(chat, said.model, bool(said.stream), echoed)


def _schema(text: TextSettings | None) -> Json | None:
    match text.format if text else None:
        case SchemaFormat(schema):
            return schema
        case JsonObjectFormat():
            return {"type": "object"}
        case _:
            return None


def _messages(instructions: str | None, given: str | list[Json]) -> list[Json]:
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*system, {"role": "user", "content": given}]
    messages = [_message(item, f"input[{index}]") for index, item in enumerate(given)]
    return system + [message for message in messages if message is not None]


def _message(item: Json, where: str) -> Json | None:
    """The message that an item is; None for a thought, which a history leaves out."""
    match item.get("type", "message"):
        case "message":
            return {"role": item.get("role"), "content": _text(item.get("content"), where)}
        case "function_call":
            call = {"function": {"name": item.get("name"), "arguments": item.get("arguments", "{}")}}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            return {"role": "tool", "content": _text(item.get("output"), where)}
        case "reasoning":
            return None
        case kind:
            raise PromptError(f"{where}: {kind!r} is not supported: give messages, function calls and their outputs")


def _text(content: Any, where: str) -> Any:
    """The content of an item as chat messages have it."""
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text"):
            raise PromptError(f"{where}.content[{index}]: {kind!r} is not text, and GLM-4 reads only text")
    return [{"type": "text", "text": part.get("text")} for part in content]


@dataclass(slots=True)
class _Item:
    """A part of the answer that is not at its end."""

    kind: Literal["thought", "text", "call"]
    id: str
    name: str = ""
    call_id: str = ""
    words: str = ""

    def json(self, status: str) -> Json:
        """As OpenAI has it."""
        match self.kind:
            case "thought":
                content = [{"type": "reasoning_text", "text": self.words}] if status != "in_progress" else []
                return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status}
            case "text":
                parts = [self.part()] if status != "in_progress" else []
                return {"id": self.id, "type": "message", "role": "assistant", "content": parts, "status": status}
            case "call":
                call = {"call_id": self.call_id, "name": self.name, "arguments": self.words, "status": status}
                return {"id": self.id, "type": "function_call", **call}

    def part(self) -> Json:
        """The text as a part of its message."""
        return {"type": "output_text", "text": self.words, "annotations": [], "logprobs": []}


class ResponseWriter:
    """One response: its events as words come, and the whole of it."""

    def __init__(self, head: Head, echoed: Json, form: AnswerForm) -> None:
        self._head, self._echoed = head, echoed
        self._parser = form.parser()
        self._items: list[Json] = []
        """Those at their end."""
        self._item: _Item | None = None
        self._events: list[bytes] = []
        self._sequence = self._num_calls = 0
        self.ended: Json = {}
        """The whole response, once its output has ended."""

    def push(self, number: int, output: RequestOutput) -> list[bytes]:
        """The events of what is new."""
        if self._sequence == 0:
            started = self.response("in_progress")
            self._tell("response.created", response=started)
            self._tell("response.in_progress", response=started)
        for part in self._parser.push(output.delta):
            self._add(part)
        if output.finish_reason is not None:
            for part in self._parser.finish():
                self._add(part)
            status = "incomplete" if output.finish_reason == "length" else "completed"
            self._close(status)
            self.ended = self.response(status, output)
            self._tell(f"response.{status}", response=self.ended)
        events, self._events = self._events, []
        return events

    def finish(self, outputs: Sequence[RequestOutput]) -> list[bytes]:
        """Nothing comes after the last event of `push`."""
        return []

    def failure(self, body: Json) -> bytes:
        """The event that ends a response which failed."""
        error = {"code": "server_error", "message": body["error"]["message"]}
        self._tell("response.failed", response=self.response("failed") | {"error": error})
        return self._events.pop()

    def response(self, status: str, output: RequestOutput | None = None) -> Json:
        """The response as it stands."""
        usage = None
        if output is not None:
            given, made = len(output.prompt_token_ids), len(output.token_ids)
            usage = {"input_tokens": given, "output_tokens": made, "total_tokens": given + made}
        return {
            "id": f"resp_{self._head.name}",
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._head.model,
            "output": list(self._items),
            "usage": usage,
            **self._echoed,
        }

    def _add(self, part: Part) -> None:
        kind, words = part
        if kind == "call":
            self._close()
            name = f"{self._head.name}_{self._num_calls}"
            self._num_calls += 1
            self._open(_Item("call", f"fc_{name}", words, f"call_{name}"))
            return
        item = self._item
        if kind == "arguments":
            assert item is not None
        elif item is None or item.kind != kind:
            self._close()
            words = words.lstrip("\n")
            prefix = "rs" if kind == "thought" else "msg"
            item = _Item(kind, f"{prefix}_{self._head.name}_{len(self._items)}")
            self._open(item)
        item.words += words
        if words:
            event, place = _DELTAS[kind]
            self._tell(f"response.{event}.delta", **self._where(item), **place, delta=words)

    def _open(self, item: _Item) -> None:
        self._item = item
        where = {"output_index": len(self._items)}
        self._tell("response.output_item.added", **where, item=item.json("in_progress"))
        if item.kind == "text":
            self._tell("response.content_part.added", **self._where(item), content_index=0, part=item.part())

    def _close(self, status: str = "completed") -> None:
        item = self._item
        if item is None:
            return
        where = self._where(item)
        match item.kind:
            case "thought":
                self._tell("response.reasoning_text.done", **where, content_index=0, text=item.words)
            case "text":
                self._tell("response.output_text.done", **where, content_index=0, text=item.words, logprobs=[])
                self._tell("response.content_part.done", **where, content_index=0, part=item.part())
            case "call":
                self._tell("response.function_call_arguments.done", **where, name=item.name, arguments=item.words)
        done = item.json(status)
        self._tell("response.output_item.done", output_index=len(self._items), item=done)
        self._items.append(done)
        self._item = None

    def _where(self, item: _Item) -> Json:
        return {"item_id": item.id, "output_index": len(self._items)}

    def _tell(self, event: str, **values: Any) -> None:
        self._events.append(data_event({"type": event, "sequence_number": self._sequence, **values}, event))
        self._sequence += 1


_DELTAS: dict[str, tuple[str, Json]] = {
    "thought": ("reasoning_text", {"content_index": 0}),
    "text": ("output_text", {"content_index": 0, "logprobs": []}),
    "arguments": ("function_call_arguments", {}),
}


def whole_response(head: Head, echoed: Json, form: AnswerForm, output: RequestOutput) -> Json:
    """The response that a finished output is."""
    writer = ResponseWriter(head, echoed, form)
    writer.push(0, replace(output, delta=output.text))
    return writer.ended
