"""Endpoints of our own: tokens, health and metrics."""

from __future__ import annotations

from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm4.api.bodies import Messages, read_body
from glm4.api.chat import ChatRequest, ToolUse
from glm4.errors import OptionError
from glm4.options import SamplingParams
from glm4.server.answers import read_json
from glm4.server.service import Service


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


class OwnEndpoints:
    """What no other API has."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text, or of the prompt that a conversation makes."""
        said, _ = read_body(await read_json(request), TokenizeBody, sampling=False)
        service = self._service
        service.head(said.model)
        if (said.prompt is None) == (said.messages is None):
            raise OptionError("prompt: give either prompt, a text, or messages, a list")
        if said.messages is not None:
            ids = await service.chat_ids(ChatRequest(said.messages, ToolUse.of(said.tools), SamplingParams()))
        elif said.tools is not None:
            raise OptionError("tools belong to messages: a prompt is a text as it is")
        else:
            ids = await service.text_ids(said.prompt or "")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.llm.max_model_len})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, control tokens included."""
        said, _ = read_body(await read_json(request), DetokenizeBody, sampling=False)
        self._service.head(said.model)
        tokenizer = self._service.llm.tokenizer
        beyond = [token for token in said.tokens if not 0 <= token < tokenizer.vocab_size]
        if beyond:
            raise OptionError(f"tokens: {beyond[0]} is no token: ids are 0 to {tokenizer.vocab_size - 1}")
        return JSONResponse({"prompt": tokenizer.decode(said.tokens, skip_special_tokens=False)})

    async def health(self, request: Request) -> Response:
        """Whether requests are served: 200 if so, else 503 with the reason."""
        health = self._service.llm.health
        return JSONResponse({"status": health}, 200 if health == "ready" else 503)

    async def alive(self, request: Request) -> Response:
        """Whether the server runs at all."""
        return JSONResponse({"status": "alive"})

    async def metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(await self._service.exposition(), media_type=CONTENT_TYPE_LATEST)
