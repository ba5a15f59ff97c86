"""OpenAI's Chat Completions: its requests to ours, our answers to its objects, whole or streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from glm4.api.answer import Answer, AnswerForm, Part, read_answer
from glm4.api.bodies import (
    Json,
    JsonObjectFormat,
    Messages,
    OpenAIBody,
    StreamOptions,
    TextFormat,
    read_body,
    refuse_unless,
    sampling_of,
)
from glm4.api.chat import ChatRequest, Effort, ToolUse, thinking_of
from glm4.api.events import DONE, data_event
from glm4.api.openai import Head, token_logprobs, usage
from glm4.engine.request import RequestOutput
from glm4.engine.step import TokenLogprobs
from glm4.errors import OptionError
from glm4.text.tokenizer import Tokenizer


class _FunctionName(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """The function that is to be called."""

    type: Literal["function"]
    function: _FunctionName


class _NamedSchema(msgspec.Struct, forbid_unknown_fields=True):
    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that a schema accepts."""

    json_schema: _NamedSchema


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    """Whether a model that thinks first (GLM-Z1) does so."""

    type: Literal["enabled", "disabled"]


class ChatCompletionBody(OpenAIBody, kw_only=True):
    """The keys of a chat completion beside those about sampling."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None


@dataclass(frozen=True, slots=True)
class ChatCompletionRequest:
    """A chat completion as it was asked for."""

    chat: ChatRequest
    model: str | None
    stream: bool
    include_usage: bool
    """A stream ends in the count of tokens."""

    @property
    def n(self) -> int:
        """Answers."""
        return self.chat.sampling.n or 1

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ChatCompletionRequest:
        """Raises OptionError for what is unknown, malformed or not supported."""
        said, values = read_body(body, ChatCompletionBody)
        refuse_unless(said, store=(False,), service_tier=("auto", "default"))
        if said.stream_options is not None and not said.stream:
            raise OptionError("stream_options needs stream: true")
        if said.top_logprobs is not None and not said.logprobs:
            raise OptionError("top_logprobs needs logprobs: true")
        if said.logprobs:
            values["logprobs"] = said.top_logprobs or 0
        choice = said.tool_choice
        chat = ChatRequest(
            messages=said.messages,
            tools=ToolUse.of(
                said.tools,
                (choice.function.name,) if isinstance(choice, NamedTool) else choice or "auto",
                said.parallel_tool_calls,
            ),
            sampling=sampling_of(body, values),
            thinking=_thinking(said),
            answer_schema=_schema(said.response_format),
        )
        include_usage = said.stream_options is not None and said.stream_options.include_usage
        return cls(chat, said.model, bool(said.stream), include_usage)


def _thinking(said: ChatCompletionBody) -> bool | None:
    by_effort = thinking_of(said.reasoning_effort, "reasoning_effort")
    by_type = None if said.thinking is None else said.thinking.type == "enabled"
    answers = {by_effort, by_type} - {None}
    if len(answers) > 1:
        raise OptionError("reasoning_effort and thinking contradict each other: keep one of them")
    return answers.pop() if answers else None


def _schema(response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Json | None:
    match response_format:
        case JsonSchemaFormat():
            return response_format.json_schema.schema
        case JsonObjectFormat():
            return {"type": "object"}
        case _:
            return None


def chat_completion(head: Head, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, form: AnswerForm) -> Json:
    """A `chat.completion` object with one choice for each output; a thought goes into `reasoning_content`."""
    choices = []
    for index, output in enumerate(outputs):
        answer = read_answer(output.text, form)
        choices.append(
            {
                "index": index,
                "message": _message(answer, form, f"{head.name}_{index}"),
                "logprobs": _logprobs(output.logprobs, tokenizer),
                "finish_reason": finish_reason(output, bool(answer.calls)),
            }
        )
    return {**head.of("chatcmpl", "chat.completion"), "choices": choices, "usage": usage(outputs, len(outputs))}


def _message(answer: Answer, form: AnswerForm, name: str) -> Json:
    message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
    if form.inside_thought or answer.thought:
        message["reasoning_content"] = answer.thought
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [
            {
                "id": call_id(name, at),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for at, call in enumerate(answer.calls)
        ]
    return message


def call_id(name: str, at: int) -> str:
    """The id of an answer's call, which its result must name; `name` is the answer's."""
    return f"call_{name}_{at}"


def finish_reason(output: RequestOutput, has_calls: bool) -> str | None:
    """Why the answer ended, in OpenAI's words."""
    return "tool_calls" if has_calls and output.finish_reason == "stop" else output.finish_reason


def _logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> Json | None:
    return {"content": token_logprobs(logprobs, tokenizer), "refusal": None} if logprobs else None


class ChoiceChunks:
    """One choice of a streamed chat completion: `chat.completion.chunk` objects for each of its outputs."""

    def __init__(self, head: Head, index: int, tokenizer: Tokenizer, form: AnswerForm) -> None:
        self._head, self._index, self._tokenizer = head, index, tokenizer
        self._parser = form.parser()
        self._num_calls = self._num_logprobs = 0
        self._begun = False

    def push(self, output: RequestOutput) -> list[Json]:
        """The chunks that an output adds; its `delta` is what came since the output before."""
        ended = output.finish_reason is not None
        parts = self._parser.push(output.delta) + (self._parser.finish() if ended else [])
        deltas = [] if self._begun else [{"role": "assistant", "content": ""}]
        self._begun = True
        deltas += [self._delta(part) for part in parts]
        chunks = [self._chunk(delta) for delta in deltas]
        if ended:
            chunks.append(self._chunk({}, finish_reason(output, self._num_calls > 0)))
        if chunks and len(output.logprobs) > self._num_logprobs:  # those of held words come with the next ones
            new = output.logprobs[self._num_logprobs :]
            self._num_logprobs = len(output.logprobs)
            chunks[-1]["choices"][0]["logprobs"] = _logprobs(new, self._tokenizer)
        return chunks

    def _delta(self, part: Part) -> Json:
        kind, words = part
        match kind:
            case "thought":
                return {"reasoning_content": words}
            case "text":
                return {"content": words}
            case "call":
                self._num_calls += 1
                function = {"name": words, "arguments": ""}
                name = call_id(f"{self._head.name}_{self._index}", self._num_calls - 1)
                call: Json = {"index": self._num_calls - 1, "id": name, "type": "function", "function": function}
            case "arguments":
                call = {"index": self._num_calls - 1, "function": {"arguments": words}}
        return {"tool_calls": [call]}

    def _chunk(self, delta: Json, reason: str | None = None) -> Json:
        choice = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head.of("chatcmpl", "chat.completion.chunk"), "choices": [choice]}


class ChatCompletionEvents:
    """A streamed chat completion, all its choices."""

    def __init__(self, head: Head, n: int, tokenizer: Tokenizer, form: AnswerForm, include_usage: bool) -> None:
        self._head, self._include_usage = head, include_usage
        self._choices = [ChoiceChunks(head, index, tokenizer, form) for index in range(n)]

    def push(self, number: int, output: RequestOutput) -> list[bytes]:
        """Events of an output of choice `number`."""
        return [data_event(chunk) for chunk in self._choices[number].push(output)]

    def finish(self, outputs: Sequence[RequestOutput]) -> list[bytes]:
        """The count of tokens, if it was asked for, and the end."""
        if not self._include_usage:
            return [DONE]
        head = self._head.of("chatcmpl", "chat.completion.chunk")
        return [data_event({**head, "choices": [], "usage": usage(outputs, len(outputs))}), DONE]
