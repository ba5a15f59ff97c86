"""The engine's own process, seen from the program that starts it."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from contextlib import suppress

from glm4.engine.messages import (
    HEADER_BYTES,
    FromEngine,
    Load,
    decode_from_engine,
    payload_length,
    to_frame,
)
from glm4.errors import EngineError
from glm4.options import EngineOptions
from glm4.parallel.exit_status import exit_in_words

EXIT_SECONDS = 5.0
"""How long a process that closed its socket may take to be gone."""
_KEPT_LINES = 20
_MAX_LINE_BYTES = 1000

log = logging.getLogger("glm4")


class EngineProcess:
    """One process from start to end.

    It is in a session of its own, so that Ctrl-C reaches only the program that started it, and what it prints becomes
    lines of this program's log. It leaves by itself when this program is gone.
    """

    def __init__(self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use `start`."""
        self._process, self._reader, self._writer = process, reader, writer
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._log_task = asyncio.create_task(self._read_log())

    @classmethod
    async def start(cls, options: EngineOptions) -> EngineProcess:
        """Start a process that loads `options.model`. Raises EngineError where the system has no room for one."""
        # As multiprocessing's "spawn" does, hand down the import path; but import no __main__, so that any script,
        # with or without a guard, can start it.
        boot = f"import sys; sys.path[:] = {sys.path!r}; from glm4.engine.worker import main; main(int(sys.argv[1]))"
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-c", boot, str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),), start_new_session=True, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT,
                )  # fmt: skip
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except OSError as error:
            ours.close()
            raise EngineError(f"the engine's process cannot be started: {error.strerror}; free some memory") from error
        except BaseException:
            ours.close()
            raise
        writer.write(to_frame(Load(options, log.getEffectiveLevel())))
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, frame: bytes) -> None:
        """Send a message, as `to_frame` wrote it; what is sent to a process that is gone is lost."""
        self._writer.write(frame)

    async def receive(self) -> FromEngine | None:
        """The next message; None when the process has closed its end. Raises EngineError for another version's."""
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            message: FromEngine = decode_from_engine(await self._reader.readexactly(payload_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message

    async def reason_of_death(self) -> str:
        """How a process that has closed its end came to leave, and the last it printed; one line."""
        with suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                await self._process.wait()
                await asyncio.shield(self._log_task)
        return f"the engine's process {exit_in_words(self._process.returncode)}{self._last_words()}"

    async def stop(self, timeout: float) -> None:
        """Let the process leave, and kill it if it is still there after `timeout` seconds or on cancellation."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), timeout)
        except TimeoutError:
            log.warning("the engine's process does not stop within %g s and is killed", timeout)
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            self._log_task.cancel()

    async def _read_log(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while chunk := await self._process.stdout.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[:_MAX_LINE_BYTES]
            for line in lines:
                self._log_line(line)
        self._log_line(rest)

    def _log_line(self, printed: bytes) -> None:
        line = printed[:_MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if not line:
            return
        level_name, _, text = line.partition(" ")
        level = logging.getLevelNamesMapping().get(level_name)
        if level is None:  # not from our log: a library's, or a crash's
            level, text = logging.WARNING, line
        if level >= logging.WARNING:
            self._last_lines.append(text)
        log.log(level, "engine: %s", text)

    def _last_words(self) -> str:
        fatal = [line for line in self._last_lines if line.startswith("Fatal Python error")]  # a stack follows it
        lines = fatal or list(self._last_lines)[-3:]
        return f"; its last words: {' | '.join(line.strip()[:300] for line in lines)}" if lines else ""
