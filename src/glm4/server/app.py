"""The server as an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from glm4.engine.async_llm import AsyncLLM
from glm4.errors import Glm4Error
from glm4.options import ServerOptions
from glm4.server.anthropic import AnthropicEndpoints
from glm4.server.errors import HttpError, respond
from glm4.server.gate import Gate
from glm4.server.metrics import Metrics
from glm4.server.openai import OpenAIEndpoints
from glm4.server.service import Service
from glm4.server.tokens import OwnEndpoints

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(llm: AsyncLLM, options: ServerOptions) -> ASGIApp:
    """The application that serves `llm`, which has been started. Raises OptionError for a bad file of keys."""
    metrics = Metrics()
    service = Service(llm, options, metrics)
    openai, anthropic, own = OpenAIEndpoints(service), AnthropicEndpoints(service), OwnEndpoints(service)
    endpoints: list[tuple[str, str, Endpoint]] = [
        ("POST", "/v1/chat/completions", openai.chat_completions),
        ("POST", "/v1/completions", openai.completions),
        ("POST", "/v1/responses", openai.responses),
        ("POST", "/v1/embeddings", openai.embeddings),
        ("POST", "/v1/messages", anthropic.messages),
        ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
        ("GET", "/v1/models", openai.models),
        ("GET", "/v1/models/{model:path}", openai.model),
        ("POST", "/tokenize", own.tokenize),
        ("POST", "/detokenize", own.detokenize),
        ("GET", "/health", own.health),
        ("GET", "/health/live", own.alive),
        ("GET", "/metrics", own.metrics),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((HttpError, Glm4Error, HTTPException, Exception), respond)
    app: ASGIApp = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in endpoints],
        exception_handlers=handlers,
    )
    app = Gate(app, options, metrics, [path for _, path, _ in endpoints])
    if options.cors_origins:
        app = CORSMiddleware(app, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app
