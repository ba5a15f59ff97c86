"""Server-sent events (WHATWG HTML, 9.2), in which the APIs stream their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from glm4.engine.request import RequestOutput

DONE = b"data: [DONE]\n\n"
"""Ends a stream of chat completions and completions."""


def data_event(data: Any, event: str | None = None) -> bytes:
    """One event with a JSON value."""
    name = b"" if event is None else b"event: %s\n" % event.encode()
    return name + b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventWriter(Protocol):
    """Writes the answers to one request as the events of an API."""

    def push(self, number: int, output: RequestOutput) -> list[bytes]:
        """The events of what is new in an answer; `number` is 0 unless there are several."""

    def finish(self, outputs: Sequence[RequestOutput]) -> list[bytes]:
        """The events after the last answer's end."""
