"""OpenAI's shapes of a request and of its answer (API reference: Chat Completions, Completions), to ours and back."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from glm4.engine.request import RequestOutput
from glm4.engine.step import TokenLogprobs
from glm4.errors import OptionError
from glm4.options import SamplingParams, nearest
from glm4.text.reasoning import split_thought
from glm4.text.tokenizer import Tokenizer

Json = dict[str, Any]

SAMPLING_NAMES = frozenset(option.name for option in fields(SamplingParams))
_NOT_IN_ANSWERS = frozenset(["prompt_logprobs"])
"""Options whose result has no place in OpenAI's answers."""
_OUR_NAME = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_CHAT_ONLY = frozenset(["messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "top_logprobs"])
_COMPLETION_ONLY = frozenset(["prompt", "echo", "suffix"])
_IGNORED = frozenset(
    ["model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"]
)
"""Keys that name things of OpenAI's service and change no word of an answer."""

_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
}
"""Values that ask for what happens anyway; any other value of these keys is refused."""


def chat_sampling(body: Mapping[str, Any]) -> SamplingParams:
    """What the body of a chat completion says about sampling; our own option names are taken as well.

    Raises OptionError for an unknown key, a value of the wrong type or out of range, and a feature there is not.
    """
    values = _sampling_values(body, _CHAT_ONLY)
    wanted, top = values.pop("logprobs", None), body.get("top_logprobs")
    if not isinstance(wanted, bool | None):
        raise OptionError(f"logprobs: {wanted!r} is not true or false (top_logprobs says how many)")
    if top is not None and not wanted:
        raise OptionError("top_logprobs needs logprobs: true")
    return sampling_from_json(values | ({"logprobs": 0 if top is None else top} if wanted else {}))


def completion_sampling(body: Mapping[str, Any]) -> SamplingParams:
    """The same of a text completion, where `logprobs` is a number."""
    return sampling_from_json(_sampling_values(body, _COMPLETION_ONLY))


def _sampling_values(body: Mapping[str, Any], own_keys: frozenset[str]) -> Json:
    known = {"stream", *own_keys, *_IGNORED, *_OUR_NAME, *SAMPLING_NAMES} - _NOT_IN_ANSWERS
    values: Json = {}
    for key, value in body.items():
        if key not in known:
            raise OptionError(f"unknown key {key!r}{nearest(key, known)}")
        if value is None:
            continue
        if key in _NO_EFFECT and value not in _NO_EFFECT[key]:
            allowed = " or ".join(json.dumps(one) for one in _NO_EFFECT[key])
            raise OptionError(f"{key} {json.dumps(value, ensure_ascii=False)} is not supported: leave it at {allowed}")
        name = _OUR_NAME.get(key, key)
        if name in values:
            raise OptionError(f"{key}: the limit is said twice; keep one of max_tokens and max_completion_tokens")
        if name in SAMPLING_NAMES:
            values[name] = value
    return values


def sampling_from_json(values: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from values as JSON has them: a text is never taken for a number.

    Raises OptionError for a value of the wrong type or out of range. `values` has no unknown names.
    """
    for option in fields(SamplingParams):
        value = values.get(option.name, ())
        is_list = str(option.type).startswith("tuple") and "parse" not in option.metadata
        if is_list and not isinstance(value, list | tuple) and not (option.name == "stop" and isinstance(value, str)):
            raise OptionError(f"{option.name}: {value!r} is not a list")
    return SamplingParams(**values)


def chat_completion(
    name: str, model: str, created: int, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, thinks: bool
) -> Json:
    """A `chat.completion` object with one choice for each output; a thought goes into `reasoning_content`.

    name: what makes the answer's id unique; created: seconds since 1970; thinks: answers begin inside a thought.
    """
    choices = []
    for index, output in enumerate(outputs):
        thought, text = split_thought(output.text, inside=thinks)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if thought is not None:
            message["reasoning_content"] = thought
        content = token_logprobs(output.logprobs, tokenizer)
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": {"content": content, "refusal": None} if content else None,
                "finish_reason": output.finish_reason,
            }
        )
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(outputs, len(outputs)),
    }


def text_completion(
    name: str, model: str, created: int, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, n: int
) -> Json:
    """A `text_completion` object: `n` choices for each prompt; other parameters as for `chat_completion`."""
    return {
        "id": f"cmpl-{name}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                "text": output.text,
                "logprobs": _completion_logprobs(output.logprobs, tokenizer),
                "finish_reason": output.finish_reason,
            }
            for index, output in enumerate(outputs)
        ],
        "usage": usage(outputs, n),
    }


def usage(outputs: Sequence[RequestOutput], n: int) -> Json:
    """Token counts; a prompt, which has `n` outputs in a row, counts once."""
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs[::n])
    new_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def token_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[Json]:
    """One entry for each picked token: its text, log-probability and bytes, and the same of the likeliest ones."""

    def entry(token_id: int, logprob: float) -> Json:
        spelled = tokenizer.token_bytes(token_id, skip_special_tokens=False)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}

    return [
        entry(picked.token_id, picked.logprob) | {"top_logprobs": [entry(*likely) for likely in picked.top]}
        for picked in logprobs
    ]


def _completion_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> Json | None:
    if not logprobs:
        return None
    entries = token_logprobs(logprobs, tokenizer)
    decoder, offset, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for picked in logprobs:
        offsets.append(offset)
        offset += len(decoder.decode(tokenizer.token_bytes(picked.token_id)))
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{likely["token"]: likely["logprob"] for likely in e["top_logprobs"]} for e in entries],
        "text_offset": offsets,
    }
