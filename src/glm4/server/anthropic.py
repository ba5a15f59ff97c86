"""Endpoints of Anthropic's API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm4.api.events import data_event
from glm4.api.messages import MessagesRequest, MessageWriter, count_tokens_chat, whole_message
from glm4.server.answers import note_prompt, read_json, streamed, whole
from glm4.server.errors import HttpError
from glm4.server.service import Service


class AnthropicEndpoints:
    """Messages, and how many tokens one would take."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def messages(self, request: Request) -> Response:
        """Answer a conversation."""
        service = self._service
        asked = MessagesRequest.read(await read_json(request))
        head = service.head(asked.model)
        note_prompt(request, asked.chat.messages)
        job = await service.chat_job(asked.chat)
        if asked.stream:
            return await streamed(request, service, job, MessageWriter(head, job.form), _failure)
        [output] = await whole(request, service, job)
        return JSONResponse(whole_message(head, job.form, output))

    async def count_tokens(self, request: Request) -> Response:
        """The length of a conversation's prompt."""
        chat, model = count_tokens_chat(await read_json(request))
        self._service.head(model)
        return JSONResponse({"input_tokens": len(await self._service.chat_ids(chat))})


def _failure(error: HttpError) -> bytes:
    return data_event(error.anthropic_body, "error")
