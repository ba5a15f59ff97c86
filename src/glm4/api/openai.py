"""What OpenAI's APIs share in their answers: token counts, log-probabilities, the head of every object."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from glm4.api.bodies import Json
from glm4.engine.request import RequestOutput
from glm4.engine.step import TokenLogprobs
from glm4.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Head:
    """What stands at the top of each object of one answer."""

    name: str
    """What makes its id unique."""
    model: str
    created: int
    """Seconds since 1970."""

    def of(self, prefix: str, kind: str) -> Json:
        """The head of an object of this kind."""
        return {"id": f"{prefix}-{self.name}", "object": kind, "created": self.created, "model": self.model}


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


def text_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer, offset: int = 0) -> Json | None:
    """The same as text completions have it; `offset`: characters before the first token. None without any."""
    if not logprobs:
        return None
    entries = token_logprobs(logprobs, tokenizer)
    decoder, offsets = codecs.getincrementaldecoder("utf-8")("replace"), []
    for picked in logprobs:
        offsets.append(offset)
        offset += len(decoder.decode(tokenizer.token_bytes(picked.token_id)))
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{likely["token"]: likely["logprob"] for likely in e["top_logprobs"]} for e in entries],
        "text_offset": offsets,
    }
