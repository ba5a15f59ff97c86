"""OpenAI's Completions: texts or token ids, continued as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glm4.api.bodies import Json, OpenAIBody, StreamOptions, read_body, refuse_unless, sampling_of
from glm4.api.events import DONE, data_event
from glm4.api.openai import Head, text_logprobs, usage
from glm4.engine.request import RequestOutput
from glm4.errors import OptionError, PromptError
from glm4.options import SamplingParams
from glm4.text.tokenizer import Tokenizer


class CompletionBody(OpenAIBody, kw_only=True):
    """The keys of a text completion beside those about sampling."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    suffix: str | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A text completion as it was asked for."""

    prompts: list[str | list[int]]
    sampling: SamplingParams
    model: str | None
    stream: bool
    include_usage: bool
    echo: bool
    """The answers begin with their prompts."""

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return self.sampling.n or 1

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> CompletionRequest:
        """Raises OptionError and PromptError for what is unknown, malformed or not supported."""
        said, values = read_body(body, CompletionBody)
        refuse_unless(said, store=(False,), service_tier=("auto", "default"), suffix=("",))
        if said.stream_options is not None and not said.stream:
            raise OptionError("stream_options needs stream: true")
        if said.echo and said.stream:
            raise OptionError("echo: a stream says only what is new; leave out echo or stream")
        sampling = sampling_of(body, values)
        if said.echo and sampling.logprobs is not None:
            sampling = replace(sampling, prompt_logprobs=sampling.logprobs)
        include_usage = said.stream_options is not None and said.stream_options.include_usage
        prompts = prompts_of(said.prompt, "prompt")
        return cls(prompts, sampling, said.model, bool(said.stream), include_usage, bool(said.echo))


def prompts_of(prompt: str | list[Any], name: str) -> list[str | list[int]]:
    """Each prompt by itself, whether one was given or several; PromptError, beginning with `name`, for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise PromptError(f"{name}: the list is empty; give at least one")
    if all(isinstance(item, int) for item in prompt):
        return [prompt]
    if any(isinstance(item, int) for item in prompt):
        raise PromptError(f"{name}: give a text, a list of token ids, or a list of either")
    return prompt


def text_completion(
    head: Head, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, n: int, echo: bool = False
) -> Json:
    """A `text_completion` object: `n` choices for each prompt, in order."""
    choices = [
        {"index": index, **_echoed(output, tokenizer, echo), "finish_reason": output.finish_reason}
        for index, output in enumerate(outputs)
    ]
    return {**head.of("cmpl", "text_completion"), "choices": choices, "usage": usage(outputs, n)}


def _echoed(output: RequestOutput, tokenizer: Tokenizer, echo: bool) -> Json:
    if not echo:
        return {"text": output.text, "logprobs": text_logprobs(output.logprobs, tokenizer)}
    prompt = tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
    logprobs = None
    if output.prompt_logprobs or output.logprobs:
        first = tokenizer.decode(output.prompt_token_ids[:1], skip_special_tokens=False)
        picked = [*output.prompt_logprobs, *output.logprobs]
        logprobs = text_logprobs(picked, tokenizer, offset=len(first))
        assert logprobs is not None
        for key, value in {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}.items():
            logprobs[key].insert(0, value)  # nothing comes before the first token that could foretell it
    return {"text": prompt + output.text, "logprobs": logprobs}


class CompletionEvents:
    """A streamed text completion, all its choices."""

    def __init__(self, head: Head, n: int, tokenizer: Tokenizer, include_usage: bool) -> None:
        """`n`: answers to each prompt."""
        self._head, self._n, self._tokenizer, self._include_usage = head, n, tokenizer, include_usage
        self._said: dict[int, tuple[int, int]] = {}
        """How many log-probabilities and characters of each choice were sent."""

    def push(self, number: int, output: RequestOutput) -> list[bytes]:
        """Events of an output of choice `number`."""
        if not output.delta and output.finish_reason is None:
            return []
        num_logprobs, offset = self._said.get(number, (0, 0))
        self._said[number] = len(output.logprobs), offset + len(output.delta)
        choice = {
            "index": number,
            "text": output.delta,
            "logprobs": text_logprobs(output.logprobs[num_logprobs:], self._tokenizer, offset),
            "finish_reason": output.finish_reason,
        }
        return [data_event({**self._head.of("cmpl", "text_completion"), "choices": [choice]})]

    def finish(self, outputs: Sequence[RequestOutput]) -> list[bytes]:
        """The count of tokens, if it was asked for, and the end."""
        if not self._include_usage:
            return [DONE]
        head = self._head.of("cmpl", "text_completion")
        return [data_event({**head, "choices": [], "usage": usage(outputs, self._n)}), DONE]
