"""From a job to its response: whole, or as a stream of events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from glm4.api.bodies import Json, decode_json
from glm4.api.events import EventWriter, data_event
from glm4.engine.request import RequestOutput
from glm4.server.errors import HttpError
from glm4.server.service import Job, Service
from glm4.server.streams import EventStream, primed, unless_gone

log = logging.getLogger("glm4.server")


async def read_json(request: Request) -> Json:
    """The JSON object in the body. Raises OptionError."""
    return decode_json(await request.body())


def note_prompt(request: Request, prompt: Any) -> None:
    """Remember what was asked, for a log that says so."""
    request.state.facts["prompt"] = prompt


async def whole(request: Request, service: Service, job: Job) -> list[RequestOutput]:
    """Every answer at its end. Raises ClientGone when nobody waits for them any more."""
    outputs = await unless_gone(request.receive, service.whole(job))
    _count(request, job, outputs)
    return outputs


def _openai_failure(error: HttpError) -> bytes:
    return data_event(error.body)


async def streamed(
    request: Request,
    service: Service,
    job: Job,
    writer: EventWriter,
    failure: Callable[[HttpError], bytes] = _openai_failure,
) -> Response:
    """The answers as events, once there is the first; an error after that is the last event."""
    stream = await unless_gone(request.receive, primed(service.outputs(job)))

    async def events() -> AsyncGenerator[bytes, None]:
        latest: dict[int, RequestOutput] = {}
        try:
            async with aclosing(stream):
                async for number, output in stream:
                    latest[number] = output
                    for event in writer.push(number, output):
                        yield event
            for event in writer.finish([latest[number] for number in sorted(latest)]):
                yield event
        except Exception as error:
            told = HttpError.of(error)
            if told.status == 500:
                log.exception("a stream failed")
            request.state.facts["error"] = str(told)
            yield failure(told)
        finally:
            _count(request, job, list(latest.values()))

    return EventStream(events())


def _count(request: Request, job: Job, outputs: Sequence[RequestOutput]) -> None:
    facts = request.state.facts
    facts["prompt_tokens"] = sum(map(len, job.prompts))
    facts["answer_tokens"] = sum(len(output.token_ids) for output in outputs)
