"""Bytes over HTTP: small JSON answers, and large files that are resumed, checked and put in place whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from glm4.errors import DownloadError

PARTIAL_SUFFIX = ".incomplete"
TIMEOUT_SECONDS = 30.0
RETRIES = 4
"""Attempts after the first; a file that grew in between starts counting anew."""
FIRST_PAUSE_SECONDS = 1.0
"""Before the first retry; it doubles with each."""

_LONGEST_PAUSE_SECONDS = 60.0
_CHUNK_BYTES = 1 << 20
_LONGEST_JSON_BYTES = 64 << 20

_ADVICE = {
    401: "does not exist or needs a token: check the name, or pass --token",
    403: "may not be read: ask for access on the model's page, then pass --token",
    404: "does not exist: check the name and the revision",
}

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Digest:
    """The hash that a file must have."""

    algorithm: Literal["sha256", "git-sha1"]
    """"git-sha1" is the name that Git gives a blob: SHA-1 over "blob SIZE\\0" and the bytes."""
    hex: str

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has this hash."""
        digest = hashlib.sha256()
        if self.algorithm == "git-sha1":
            digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest() == self.hex.lower()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file on a hub: where it is and what it must be."""

    name: str
    url: str
    size: int
    """Bytes."""
    digest: Digest


def fetch_json(url: str, credentials: Mapping[str, str], subject: str) -> Any:
    """The JSON answer of `url`; `subject` is what an error message says cannot be had.

    Raises DownloadError.
    """

    def attempt() -> bytes:
        with _open(url, credentials, subject) as response:
            return _read(response, _LONGEST_JSON_BYTES)

    body = _with_retries(attempt, position=lambda: 0)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DownloadError(f"{_host(url)} did not answer with JSON: check --endpoint") from error


def fetch_file(
    file: RemoteFile, credentials: Mapping[str, str], folder: Path, on_position: Callable[[int], None]
) -> None:
    """Put `file` into `folder`, going on from a part of it that an earlier run left behind.

    The bytes grow in NAME.incomplete, which becomes NAME once size and hash are right and is removed if they are
    wrong. `on_position` hears how many bytes are there. Raises DownloadError, and OSError where writing fails.
    """
    partial = folder / (file.name + PARTIAL_SUFFIX)
    with partial.open("ab") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"{partial} is being written by another download: wait for it to end") from error
        if output.tell() > file.size:
            _empty(output)
        _with_retries(lambda: _append(file, credentials, output, on_position), position=output.tell)
        output.flush()
        if output.tell() > file.size or not file.digest.matches(partial):
            partial.unlink()
            raise DownloadError(
                f"{file.name}: {_host(file.url)} sent the wrong bytes (size or {file.digest.algorithm} differs): "
                "they were removed; run the same command again"
            )
        partial.replace(folder / file.name)  # while the lock is held, so that nobody else appends to it


def _append(
    file: RemoteFile, credentials: Mapping[str, str], output: BinaryIO, on_position: Callable[[int], None]
) -> None:
    start = output.tell()
    if start == file.size:
        return
    with _open(file.url, credentials, file.name, start) as response:
        if start and response.status != 206:  # the server does not resume: begin anew
            _empty(output)
        elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise DownloadError(f"{file.name}: {_host(file.url)} sent another part than the one asked for")
        while output.tell() <= file.size and (chunk := _read(response, _CHUNK_BYTES)):
            output.write(chunk)
            on_position(output.tell())
    if output.tell() < file.size:
        raise _TransientError(f"{_host(file.url)} cut the connection in the middle of {file.name}")


def _empty(output: BinaryIO) -> None:
    output.seek(0)  # `tell` must follow, although what is appended lands at the end anyway
    output.truncate()


class _TransientError(Exception):
    """A failure that may be gone a little later."""

    def __init__(self, message: str, pause_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.pause_seconds = pause_seconds


def _with_retries(attempt: Callable[[], Result], position: Callable[[], int]) -> Result:
    failures, reached = 0, position()
    while True:
        try:
            return attempt()
        except _TransientError as error:
            failures = 1 if position() > reached else failures + 1
            reached = position()
            if failures > RETRIES:
                raise DownloadError(
                    f"{error}: check the network and --endpoint, then run the same command again; it goes on from there"
                ) from error
            pause = max(error.pause_seconds, FIRST_PAUSE_SECONDS * 2 ** (failures - 1))
            time.sleep(min(pause, _LONGEST_PAUSE_SECONDS))


def _open(url: str, credentials: Mapping[str, str], subject: str, start: int = 0) -> HTTPResponse:
    """The answer to a GET of `url` from byte `start` on."""
    request = Request(url, headers={"User-Agent": "glm4"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    for name, value in credentials.items():
        request.add_unredirected_header(name, value)
    try:
        response: HTTPResponse = build_opener(_Redirects).open(request, timeout=TIMEOUT_SECONDS)
    except HTTPError as error:
        error.close()
        answer = f"{_host(error.url or url)} answered {error.code}"
        if error.code in (408, 429) or error.code >= 500:
            raise _TransientError(f"{subject}: {answer}", _retry_after(error.headers)) from error
        raise DownloadError(f"{subject} {_ADVICE.get(error.code, 'cannot be had')} ({answer})") from error
    except (URLError, HTTPException, OSError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{_host(url)} has a certificate that this machine does not trust: install ca-certificates, "
                "or set SSL_CERT_FILE"
            ) from error
        raise _TransientError(f"{_host(url)} cannot be reached ({_reason(reason)})") from error
    return response


def _read(response: HTTPResponse, count: int) -> bytes:
    try:
        return response.read(count)
    except (HTTPException, OSError) as error:
        raise _TransientError(f"{_host(response.url)} stopped answering ({_reason(error)})") from error


class _Redirects(HTTPRedirectHandler):
    """Sends credentials on only where a redirection stays on the same server: file stores are other people's."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        if redirected is not None and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            for name, value in req.unredirected_hdrs.items():
                redirected.add_unredirected_header(name, value)
        return redirected


def _retry_after(headers: Message) -> float:
    with contextlib.suppress(ValueError):  # it may also be a date
        return float(headers.get("Retry-After", "0"))
    return 0.0


def _reason(reason: object) -> str:
    if isinstance(reason, OSError) and reason.errno is not None and reason.errno > 0:
        return os.strerror(reason.errno)
    return " ".join(str(reason).split()) or type(reason).__name__


def _host(url: str) -> str:
    return urlsplit(url).netloc
