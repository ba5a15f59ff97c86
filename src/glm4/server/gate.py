"""What every request passes on its way in and out: its id, its caller's key, its size, and the log."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4.errors import OptionError
from glm4.options import ServerOptions
from glm4.server.errors import HttpError
from glm4.server.metrics import Metrics
from glm4.server.streams import ClientGone

OPEN_PATHS = frozenset(["/", "/health", "/health/live", "/docs", "/openapi.json"])
"""What needs no key, beside the page: it says nothing that is not public, or only whether the server is well."""

_REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
log = logging.getLogger("glm4.server")


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics, paths: Iterable[str]) -> None:
        """`paths` are the application's; all others are counted as one. Raises OptionError for a bad key file."""
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._max_body, self._log_prompts = options.max_body, options.log_prompts
        self._keys = [_digest(key) for key in read_keys(options)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        facts: dict[str, Any] = {"id": request_id, "method": scope["method"], "path": scope["path"], "status": 499}
        scope.setdefault("state", {})["facts"] = facts
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, _limited(receive, self._max_body), send_with_id)
        except HttpError as error:
            await error.response(scope["path"])(scope, receive, send_with_id)
        except ClientGone:
            facts["status"] = 499  # nobody reads it; the log calls it so, as nginx does
        finally:
            self._record(facts, time.perf_counter() - started)

    def _check(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if self._keys and path not in OPEN_PATHS and not path.startswith("/page/"):
            bearer = headers.get("authorization", "").partition(" ")
            key = bearer[2].strip() if bearer[0].lower() == "bearer" else headers.get("x-api-key", "")
            digest = _digest(key)
            # all are compared, and each in constant time: how long it takes tells nothing about a key
            matches = [hmac.compare_digest(digest, known) for known in self._keys]
            if not any(matches):
                raise HttpError(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body:
            raise _too_large(self._max_body)

    def _record(self, facts: dict[str, Any], seconds: float) -> None:
        path = facts["path"] if facts["path"] in self._paths else "other"
        self._metrics.responses.labels(path, facts["status"]).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        prompt = facts.pop("prompt", None)
        if self._log_prompts and prompt is not None:
            facts["prompt"] = prompt
        log.info("%s", json.dumps(facts | {"seconds": round(seconds, 4)}, ensure_ascii=False))


def _limited(receive: Receive, max_body: int) -> Receive:
    """`receive`, which raises HttpError when a body without a content-length grows too long."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > max_body:
            raise _too_large(max_body)
        return message

    return limited


def _too_large(max_body: int) -> HttpError:
    return HttpError(413, f"the body has more than {max_body} bytes: shorten it")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(options: ServerOptions) -> list[str]:
    """Every key that opens the server. Raises OptionError for a file that cannot be used."""
    file = options.api_key_file
    if file is None:
        return list(options.api_key)
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"api_key_file: {file} cannot be read ({error}): give a text file") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise OptionError(f"api_key_file: {file} holds no key: write one a line")
    return [*options.api_key, *keys]
