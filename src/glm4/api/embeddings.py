"""OpenAI's Embeddings: the mean of the last hidden states of a text's tokens."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from glm4.api.bodies import Json, read_body
from glm4.api.completions import prompts_of


class EmbeddingsBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys of an embedding."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """Embeddings as they were asked for."""

    prompts: list[str | list[int]]
    model: str | None
    base64: bool

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> EmbeddingsRequest:
        """Raises OptionError and PromptError for what is unknown, malformed or not supported."""
        said, _ = read_body(body, EmbeddingsBody, sampling=False)
        return cls(prompts_of(said.input, "input"), said.model, said.encoding_format == "base64")


def embeddings(asked: EmbeddingsRequest, model: str, vectors: Sequence[Sequence[float]], num_tokens: int) -> Json:
    """The `list` object of the vectors; base64 is of little-endian float32."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(vector) if asked.base64 else list(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
