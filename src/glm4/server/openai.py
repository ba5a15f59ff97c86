"""Endpoints of OpenAI's API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm4.api.chat_completions import ChatCompletionEvents, ChatCompletionRequest, chat_completion
from glm4.api.completions import CompletionEvents, CompletionRequest, text_completion
from glm4.api.embeddings import EmbeddingsRequest, embeddings
from glm4.api.responses import ResponsesRequest, ResponseWriter, whole_response
from glm4.server.answers import note_prompt, read_json, streamed, whole
from glm4.server.errors import HttpError
from glm4.server.service import Service
from glm4.server.streams import unless_gone


class OpenAIEndpoints:
    """Chat completions, completions, responses, embeddings and models."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        service = self._service
        asked = ChatCompletionRequest.read(await read_json(request))
        head = service.head(asked.model)
        note_prompt(request, asked.chat.messages)
        job = await service.chat_job(asked.chat)
        tokenizer = service.llm.tokenizer
        if asked.stream:
            writer = ChatCompletionEvents(head, job.n, tokenizer, job.form, asked.include_usage)
            return await streamed(request, service, job, writer)
        return JSONResponse(chat_completion(head, await whole(request, service, job), tokenizer, job.form))

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        service = self._service
        asked = CompletionRequest.read(await read_json(request))
        head = service.head(asked.model)
        note_prompt(request, asked.prompts)
        job = service.job([await service.text_ids(prompt) for prompt in asked.prompts], asked.sampling)
        tokenizer = service.llm.tokenizer
        if asked.stream:
            writer = CompletionEvents(head, job.n, tokenizer, asked.include_usage)
            return await streamed(request, service, job, writer)
        outputs = await whole(request, service, job)
        return JSONResponse(text_completion(head, outputs, tokenizer, job.n, asked.echo))

    async def responses(self, request: Request) -> Response:
        """Answer a conversation, in the newer of OpenAI's forms; nothing is stored."""
        service = self._service
        asked = ResponsesRequest.read(await read_json(request))
        head = service.head(asked.model)
        note_prompt(request, asked.chat.messages)
        job = await service.chat_job(asked.chat)
        if asked.stream:
            writer = ResponseWriter(head, asked.echoed, job.form)
            return await streamed(request, service, job, writer, lambda error: writer.failure(error.body))
        [output] = await whole(request, service, job)
        return JSONResponse(whole_response(head, asked.echoed, job.form, output))

    async def embeddings(self, request: Request) -> Response:
        """The mean of the last hidden states of each text; the model was not trained for it."""
        service = self._service
        asked = EmbeddingsRequest.read(await read_json(request))
        head = service.head(asked.model)
        note_prompt(request, asked.prompts)
        prompts = [await service.text_ids(prompt) for prompt in asked.prompts]
        vectors = await unless_gone(request.receive, service.embeddings(prompts))
        num_tokens = request.state.facts["prompt_tokens"] = sum(map(len, prompts))
        return JSONResponse(embeddings(asked, head.model, vectors, num_tokens))

    async def models(self, request: Request) -> Response:
        """Every name of the model."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._service.names]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["model"]
        if name not in self._service.names:
            raise HttpError(404, f"model {name!r} is not served here: see /v1/models", param="model")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, object]:
        llm = self._service.llm
        return {
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "glm4",
            "max_model_len": llm.max_model_len,
        }
