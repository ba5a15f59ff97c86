"""The page to chat on, and the files that it is made of: all from this package, none from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""No script, style or request but the page's own, so that no word of a model can become one."""


def page_routes() -> list[Route]:
    """`/`, and `/page/NAME` for every other file; they are read once, here."""
    folder = files(__package__) / "page"
    parts = {file.name: _Part(file) for file in folder.iterdir() if file.is_file()}
    index = parts.pop("index.html")
    return [Route("/", index.respond), *(Route(f"/page/{name}", part.respond) for name, part in sorted(parts.items()))]


class _Part:
    """One file; browsers ask each time whether it is still the same, which costs no body."""

    def __init__(self, file: Traversable) -> None:
        self._content = file.read_bytes()
        etag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'
        media_type = _MEDIA_TYPES[file.name.rpartition(".")[2]]
        self._headers = {**SECURITY_HEADERS, "content-type": media_type, "cache-control": "no-cache", "etag": etag}

    async def respond(self, request: Request) -> Response:
        """The file, or 304 to who has it."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._headers["etag"] in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
