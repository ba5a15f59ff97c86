"""Offline batches: lines of JSON in, records out as their answers finish, a bounded number in flight."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from glm4.api.answer import AnswerForm
from glm4.api.bodies import SAMPLING_NAMES, Json, sampling_from_json
from glm4.api.chat_completions import ChatCompletionRequest, chat_completion
from glm4.api.completions import CompletionRequest, text_completion
from glm4.api.openai import Head, token_logprobs, usage
from glm4.batch.files import Line, record_id
from glm4.engine.llm import LLM
from glm4.engine.request import RequestOutput
from glm4.errors import ConfigError, EngineError, Glm4Error, MemoryPlanError, OptionError, PromptError
from glm4.files import parse_json
from glm4.options import SamplingParams, nearest
from glm4.text.reasoning import split_thought

Shape = Literal["plain", "chat", "completion", "unknown"]

_URLS: dict[str, Shape] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
_ENVELOPE = frozenset(["custom_id", "method", "url", "body"])
_PLAIN_KEYS = frozenset(["prompt", "messages", "tools", "custom_id", *SAMPLING_NAMES])
_FAILURES_IN_A_ROW = 3
"""Steps that may fail with nothing answered between them before the engine, not a request, is to blame."""


@dataclass(slots=True)
class BatchRequest:
    """One line of the input on its way to a record."""

    line: Line
    record_id: str
    shape: Shape = "unknown"
    """"unknown": a line from which nothing can be told."""
    custom_id: str | None = None
    model: str = ""
    prompts: list[list[int]] = field(default_factory=list)
    """Token ids; a text completion can have several."""
    through_template: bool = True
    form: AnswerForm = field(default_factory=AnswerForm)
    """How to read the answers of a chat completion."""
    echo: bool = False
    """Answers of a text completion begin with their prompts."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Without `n`: each prompt is continued `n` times, as requests of their own."""
    n: int = 1
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    """Choice to finished answer."""

    @property
    def num_choices(self) -> int:
        """How many answers make its record."""
        return len(self.prompts) * self.n


class Batch:
    """Answers lines of requests with one model."""

    def __init__(
        self,
        llm: LLM,
        settings: str,
        raw: bool = False,
        defaults: SamplingParams | None = None,
        limit: int | None = None,
        triaged: bool = False,
    ) -> None:
        """settings: see `settings_digest`; raw: a plain prompt does not go through the chat template; defaults: what
        holds where a request says nothing; limit: answers in flight, twice as many as run side by side by default;
        triaged: the lines come from `triage`, which has seen more of them than this.
        """
        self.llm, self.settings, self.raw = llm, settings, raw
        self.defaults = defaults or SamplingParams()
        self.limit = limit or 2 * llm.options.max_batch_requests
        self.model = Path(llm.options.model).resolve().name
        self.prompt_tokens = self.new_tokens = 0
        """Of finished requests."""
        self._in_flight: dict[int, tuple[BatchRequest, int]] = {}
        """Engine's request id to the request and which of its choices this is."""
        self._suspects: deque[BatchRequest] = deque()
        """In flight when a step failed: each is tried again alone, so that only the guilty one fails."""
        self._alone = False
        """A suspect is being tried."""
        self._failures = 0
        self._guilty: list[tuple[int, Json]] = []
        """Error records that wait until another answer shows that the engine is sound."""
        self._custom_ids: set[str] | None = None if triaged else set()

    def run(self, lines: Iterable[Line], done: Container[int] = ()) -> Generator[tuple[int, Json]]:
        """(line number, record) of every request in `lines` but those that are `done`, as they finish.

        `lines` is read no further than needed. Where it ends while answers are under way, it is asked again later: an
        iterator to which other threads add does not end for good. Raises EngineError when the engine itself is broken;
        what is in flight then, or when the caller leaves early, is aborted.
        """
        source = iter(lines)
        try:
            while True:
                yield from self._feed(source, done)
                if not self._in_flight:
                    break
                yield from self._step()
            yield from self._take_guilty()
        finally:
            self.llm.engine.abort(*self._in_flight)
            self._in_flight.clear()

    def close(self) -> None:
        """End the processes of the model, if it has others; it cannot be used afterwards."""
        self.llm.close()

    def _feed(self, source: Iterator[Line], done: Container[int]) -> Iterator[tuple[int, Json]]:
        if self._alone and self._in_flight:
            return
        self._alone = bool(self._suspects)
        if self._alone:
            self._add(self._suspects.popleft())
            return
        while len(self._in_flight) < self.limit and (line := next(source, None)) is not None:
            request = BatchRequest(line, record_id(line, self.settings))
            try:
                body = _identify(request, self._custom_ids)
                if line.number in done:
                    continue
                self._read(request, body)
                self._add(request)
            except Glm4Error as error:
                if line.number not in done:
                    yield line.number, _error_record(request, error)

    def _read(self, request: BatchRequest, body: Json) -> None:
        request.model = self.model
        if request.shape == "plain":
            sampling = self._read_plain(request, body)
        else:
            _check_model(request, body)
            sampling = self._read_chat(request, body) if request.shape == "chat" else self._read_texts(request, body)
        sampling = sampling.over(self.defaults)
        if sampling.best_of not in (None, sampling.n or 1):
            raise OptionError("best_of: a batch keeps every answer it draws, so say n alone")
        if sampling.seed is None and self.llm.options.seed is not None:
            sampling = replace(sampling, seed=self.llm.options.seed + request.line.number)  # the same in every run
        request.n = sampling.n or 1
        request.sampling = replace(sampling, n=None, best_of=None)

    def _read_plain(self, request: BatchRequest, body: Json) -> SamplingParams:
        for key in body:
            if key not in _PLAIN_KEYS:
                raise OptionError(f"unknown key {key!r}{nearest(key, _PLAIN_KEYS)}")
        said = {key: value for key, value in body.items() if value is not None}
        if ("prompt" in said) == ("messages" in said):
            raise PromptError("give either prompt, a text, or messages, a list")
        if "messages" in said:
            request.prompts = [self.llm.encode_chat(said["messages"], said.get("tools"))]
        else:
            request.prompts = [self._plain_prompt(said["prompt"], said.get("tools"))]
            request.through_template = not self.raw
        return sampling_from_json({key: value for key, value in said.items() if key in SAMPLING_NAMES})

    def _plain_prompt(self, text: Any, tools: Any) -> list[int]:
        if not isinstance(text, str):
            raise PromptError(f"prompt: {text!r} is not a text")
        if not text.strip():
            raise PromptError("prompt: it is empty; give some text")
        if not self.raw:
            if not self.llm.has_chat_template:
                raise PromptError("this model has no chat template, as base models do: run the batch with --raw")
            return self.llm.encode_chat([{"role": "user", "content": text}], tools)
        if tools:
            raise PromptError("tools need the chat template: run the batch without --raw")
        return self.llm.tokenizer.encode(text)

    def _read_chat(self, request: BatchRequest, body: Json) -> SamplingParams:
        asked = ChatCompletionRequest.read(body)
        _refuse_stream(asked.stream)
        chat = asked.chat
        request.prompts = [self.llm.encode_chat(chat.messages, chat.tools.shown, thinking=chat.thinking is not False)]
        request.form = chat.form(self.llm.thinks, self.llm.has_own_tools)
        return chat.constrained(self.llm.has_own_tools)

    def _read_texts(self, request: BatchRequest, body: Json) -> SamplingParams:
        asked = CompletionRequest.read(body)
        _refuse_stream(asked.stream)
        request.prompts = [self._ids(one) for one in asked.prompts]
        request.through_template, request.echo = False, asked.echo
        return asked.sampling

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self.llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _add(self, request: BatchRequest) -> None:
        """Hand every choice to the engine, or none."""
        engine = self.llm.engine
        ids: list[int] = []
        try:
            for prompt in request.prompts:
                first = None
                for choice in range(request.n):
                    arguments = (prompt, request.sampling)
                    ids.append(engine.add(*arguments, chat=request.through_template, choice=choice, after=first))
                    first = ids[-1] if first is None else first
        except Glm4Error:
            engine.abort(*ids)
            raise
        self._in_flight |= {request_id: (request, choice) for choice, request_id in enumerate(ids)}

    def _step(self) -> Iterator[tuple[int, Json]]:
        outputs = self.llm.engine.step()
        self._take_failures({output.request_id: output.error for output in outputs if output.error is not None})
        for output in outputs:
            if output.finish_reason is not None and output.request_id in self._in_flight:
                request, choice = self._in_flight.pop(output.request_id)
                request.outputs[choice] = output
                if len(request.outputs) == request.num_choices:
                    self._failures = 0
                    yield from self._take_guilty()
                    yield request.line.number, self._record(request)

    def _take_guilty(self) -> list[tuple[int, Json]]:
        taken, self._guilty = self._guilty, []
        return taken

    def _take_failures(self, reasons: dict[int, str]) -> None:
        """Requests that failed beside others are tried again alone; `reasons` by the engine's request id."""
        if not reasons:
            return
        self._failures += 1
        if self._failures > _FAILURES_IN_A_ROW:
            raise EngineError(next(iter(reasons.values())))
        alone = len({id(request) for request, _ in self._in_flight.values()}) == 1
        failed = {id(self._in_flight[i][0]): (self._in_flight[i][0], reason) for i, reason in reasons.items()}
        for request, reason in failed.values():
            ids = [i for i, (each, _) in self._in_flight.items() if each is request]
            self.llm.engine.abort(*ids)
            for request_id in ids:
                del self._in_flight[request_id]
            request.outputs.clear()
            if alone:
                self._guilty.append((request.line.number, _error_record(request, EngineError(reason))))
            else:
                self._suspects.append(request)

    def _record(self, request: BatchRequest) -> Json:
        outputs = [request.outputs[choice] for choice in range(request.num_choices)]
        counts = usage(outputs, request.n)
        self.prompt_tokens += counts["prompt_tokens"]
        self.new_tokens += counts["completion_tokens"]
        if request.shape == "plain":
            return self._plain_record(request, outputs, counts)
        name = request.record_id.removeprefix("batch_req_")
        head = Head(name, request.model, int(time.time()))
        if request.shape == "chat":
            body = chat_completion(head, outputs, self.llm.tokenizer, request.form)
        else:
            body = text_completion(head, outputs, self.llm.tokenizer, request.n, request.echo)
        response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
        return {"id": request.record_id, "custom_id": request.custom_id, "response": response, "error": None}

    def _plain_record(self, request: BatchRequest, outputs: list[RequestOutput], counts: Json) -> Json:
        answers = [self._plain_answer(output, request.through_template) for output in outputs]
        named = {} if request.custom_id is None else {"custom_id": request.custom_id}
        said = answers[0] if request.n == 1 else {"choices": answers}
        return {"id": request.record_id, "line": request.line.number, **named, **said, "usage": counts, "error": None}

    def _plain_answer(self, output: RequestOutput, through_template: bool) -> Json:
        answer: Json = {"text": output.text}
        if through_template:
            thought, answer["text"] = split_thought(output.text, inside=self.llm.thinks)
            if thought is not None:
                answer["reasoning"] = thought
        answer["finish_reason"] = output.finish_reason
        for name in ("logprobs", "prompt_logprobs"):
            if found := getattr(output, name):
                answer[name] = token_logprobs(found, self.llm.tokenizer)
        return answer


def triage(lines: Iterable[Line], done: Container[int], settings: str) -> Iterator[Line | tuple[int, Json]]:
    """What several `Batch`es can share out among themselves: lines, and records of those that nobody can answer.

    Whether a custom_id stands on an earlier line too can be told only where all lines are seen.
    """
    custom_ids: set[str] = set()
    for line in lines:
        request = BatchRequest(line, record_id(line, settings))
        found: Line | tuple[int, Json] = line
        try:
            _identify(request, custom_ids)
        except Glm4Error as error:
            found = line.number, _error_record(request, error)
        if line.number not in done:
            yield found


def token_counts(record: Json) -> tuple[int, int]:
    """Tokens of the prompts and of the answers in a record; none in that of an error."""
    counts = record.get("usage") or ((record.get("response") or {}).get("body") or {}).get("usage") or {}
    return counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)


def _identify(request: BatchRequest, custom_ids: set[str] | None) -> Json:
    """Tell the shape and the name of a request, and return the rest of it; `custom_ids`: those of earlier lines."""
    content = parse_json(request.line.data, "the request")
    request.shape = "chat" if _ENVELOPE & content.keys() - {"custom_id"} else "plain"
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str | None):
        raise OptionError(f"custom_id: {custom_id!r} is not a text")
    request.custom_id = custom_id
    if custom_id is not None and custom_ids is not None:
        if custom_id in custom_ids:
            raise OptionError(f"custom_id {custom_id!r} stands on an earlier line too: give each request its own")
        custom_ids.add(custom_id)
    return content if request.shape == "plain" else _unwrap(request, content)


def _unwrap(request: BatchRequest, content: Json) -> Json:
    """The body in an OpenAI batch line; the request's shape follows from its url."""
    for key in content:
        if key not in _ENVELOPE:
            raise OptionError(f"unknown key {key!r}{nearest(key, _ENVELOPE)}")
    if request.custom_id is None:
        raise OptionError("custom_id is missing: give each request a text of its own")
    if content.get("method", "POST") != "POST":
        raise OptionError(f"method: {content['method']!r} is not 'POST'")
    url = content.get("url")
    if not isinstance(url, str) or url not in _URLS:
        raise OptionError(f"url: {url!r} is none of {', '.join(_URLS)}")
    if not isinstance(content.get("body"), dict):
        raise OptionError("body: an object with the request is missing")
    request.shape = _URLS[url]
    body: Json = content["body"]
    return body


def _check_model(request: BatchRequest, body: Json) -> None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise OptionError(f"model: {model!r} is not a text")
    request.model = model or request.model  # whatever it is called there, it is the folder's model that answers


def _refuse_stream(stream: bool) -> None:
    if stream:
        raise OptionError("stream true is not supported: leave it at false")


def _error_record(request: BatchRequest, error: Glm4Error) -> Json:
    problem = {"error": {"code": _code(error), "message": str(error)}}
    identity: Json = {"id": request.record_id}
    if request.shape in ("plain", "unknown"):
        identity["line"] = request.line.number
    if request.shape == "plain":
        return identity | ({} if request.custom_id is None else {"custom_id": request.custom_id}) | problem
    return identity | {"custom_id": request.custom_id, "response": None} | problem


def _code(error: Glm4Error) -> str:
    for kind, code in ((EngineError, "engine_error"), (MemoryPlanError, "too_large"), (ConfigError, "invalid_json")):
        if isinstance(error, kind):
            return code
    return "invalid_request"
