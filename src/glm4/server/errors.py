"""What can go wrong with a request, as HTTP has it: a status, and a body in the shape of the API that was asked."""

from __future__ import annotations

import math
import re

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm4.api.bodies import RENAMED, SAMPLING_NAMES, Json
from glm4.api.chat_completions import ChatCompletionBody
from glm4.api.completions import CompletionBody
from glm4.api.embeddings import EmbeddingsBody
from glm4.api.messages import MessagesBody
from glm4.api.responses import ResponsesBody
from glm4.errors import EngineError, Glm4Error

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What OpenAI's and Anthropic's APIs call a failure with this status; all others are "api_error"."""

_BODIES = (ChatCompletionBody, CompletionBody, ResponsesBody, MessagesBody, EmbeddingsBody)
_PARAMS = {*SAMPLING_NAMES, *RENAMED, "tokens"}.union(*(body.__struct_fields__ for body in _BODIES))
_NAMED = re.compile(r"unknown key '([^']*)'|(\w+)")
"""Messages about a key begin with it."""


class HttpError(Exception):
    """A request that gets no answer; the message is one line for the caller."""

    def __init__(self, status: int, message: str, *, param: str | None = None, retry_after: float | None = None):
        """`param`: the key of the request that is to blame; `retry_after`: seconds after which it may work."""
        super().__init__(message)
        self.status, self.param, self.retry_after = status, param, retry_after

    @classmethod
    def of(cls, error: Exception) -> HttpError:
        """What `error` is to the caller."""
        match error:
            case HttpError():
                return error
            case EngineError():
                return cls(503, str(error), retry_after=1)
            case Glm4Error():
                return cls(400, str(error), param=_param(str(error)))
            case HTTPException():
                return cls(error.status_code, f"{error.detail}: see /docs for what there is")
            case _:
                return cls(500, f"{type(error).__name__} in the server: its log says more")

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        return {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}

    @property
    def body(self) -> Json:
        """In OpenAI's shape."""
        kind = KINDS.get(self.status, "api_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}

    @property
    def anthropic_body(self) -> Json:
        """In Anthropic's."""
        return {"type": "error", "error": {"type": KINDS.get(self.status, "api_error"), "message": str(self)}}

    def response(self, path: str) -> Response:
        """The whole response to a request for `path`."""
        body = self.anthropic_body if path.startswith("/v1/messages") else self.body
        return JSONResponse(body, self.status, self.headers)


def _param(message: str) -> str | None:
    match = _NAMED.match(message)
    if match is None:
        return None
    return match[1] or (match[2] if match[2] in _PARAMS else None)


async def respond(request: Request, error: Exception) -> Response:
    """The handler of every exception that leaves an endpoint."""
    return HttpError.of(error).response(request.url.path)
