"""The server as an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from glm4.api.chat_completions import ChatCompletionBody
from glm4.api.completions import CompletionBody
from glm4.api.embeddings import EmbeddingsBody
from glm4.api.messages import CountTokensBody, MessagesBody
from glm4.api.responses import ResponsesBody
from glm4.engine.served_model import ServedModel
from glm4.errors import Glm4Error
from glm4.options import ServerOptions
from glm4.server.anthropic import AnthropicEndpoints
from glm4.server.errors import HttpError, respond
from glm4.server.gate import Gate
from glm4.server.metrics import Metrics
from glm4.server.openai import OpenAIEndpoints
from glm4.server.openapi import Description, Operation
from glm4.server.page import page_routes
from glm4.server.service import Service
from glm4.server.tokens import DetokenizeBody, OwnEndpoints, TokenizeBody
from glm4.server.tracing import traced

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(llm: ServedModel, options: ServerOptions) -> ASGIApp:
    """The application that serves `llm`, which has been started. Raises OptionError for a bad file of keys."""
    metrics = Metrics()
    service = Service(llm, options, metrics)
    endpoints = _endpoints(service)
    description = Description([operation for operation, _ in endpoints])
    routes = [Route(each.path, endpoint, methods=[each.method]) for each, endpoint in endpoints]
    routes += [Route("/openapi.json", description.openapi), Route("/docs", description.docs), *page_routes()]
    handlers: dict[Any, Any] = dict.fromkeys((HttpError, Glm4Error, HTTPException, Exception), respond)
    app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
    app = Gate(app, options, metrics, [route.path for route in routes])
    if options.cors_origins:
        app = CORSMiddleware(app, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return traced(app)


def _endpoints(service: Service) -> list[tuple[Operation, Endpoint]]:
    openai, anthropic, own = OpenAIEndpoints(service), AnthropicEndpoints(service), OwnEndpoints(service)

    def get(path: str, endpoint: Endpoint, **more: Any) -> tuple[Operation, Endpoint]:
        return Operation("GET", path, _summary(endpoint), **more), endpoint

    def post(path: str, endpoint: Endpoint, body: type[Struct], streams: bool = False) -> tuple[Operation, Endpoint]:
        return Operation("POST", path, _summary(endpoint), body, streams=streams), endpoint

    return [
        post("/v1/chat/completions", openai.chat_completions, ChatCompletionBody, streams=True),
        post("/v1/completions", openai.completions, CompletionBody, streams=True),
        post("/v1/responses", openai.responses, ResponsesBody, streams=True),
        post("/v1/embeddings", openai.embeddings, EmbeddingsBody),
        post("/v1/messages", anthropic.messages, MessagesBody, streams=True),
        post("/v1/messages/count_tokens", anthropic.count_tokens, CountTokensBody),
        get("/v1/models", openai.models),
        get("/v1/models/{model:path}", openai.model),
        post("/tokenize", own.tokenize, TokenizeBody),
        post("/detokenize", own.detokenize, DetokenizeBody),
        get("/health", own.health),
        get("/health/live", own.alive),
        get("/metrics", own.metrics, media_type="text/plain"),
    ]


def _summary(endpoint: Endpoint) -> str:
    return (endpoint.__doc__ or "").partition("\n")[0]
