"""One batch, shared out among several copies of the model on this machine, each in a process of its own."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from glm4 import errors
from glm4.api.bodies import Json
from glm4.batch.files import Line
from glm4.batch.run import Batch, token_counts, triage
from glm4.cluster.line_worker import LineWorker
from glm4.cluster.placement import replica_options
from glm4.engine.llm import LLM
from glm4.errors import EngineError, Glm4Error
from glm4.options import EngineOptions, SamplingParams
from glm4.parallel.exit_status import exit_in_words

_STOP_SECONDS = 5.0

log = logging.getLogger("glm4")


@dataclass(slots=True, eq=False)
class _Worker:
    """One process, and the lines that it has been given and not answered."""

    process: subprocess.Popen[bytes]
    connection: Connection
    lines: dict[int, Line] = field(default_factory=dict)

    def stop(self) -> None:
        """Hang up, after which it leaves."""
        self.connection.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalBatch:
    """`Batch` over `data_parallel` engines; the lines of one that dies go to the others."""

    def __init__(
        self,
        options: EngineOptions,
        settings: str,
        raw: bool = False,
        defaults: SamplingParams | None = None,
        on_load: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Load the copies side by side. The arguments are those of `Batch` and `LLM`; raises what `LLM` raises."""
        self.prompt_tokens = self.new_tokens = 0
        """Of finished requests."""
        self._settings, self._limit = settings, 2 * options.max_batch_requests
        self._workers: list[_Worker] = []
        self._returned: deque[Line] = deque()
        """Lines of workers that died."""
        try:
            for each in replica_options(options):
                self._workers.append(_start((each, settings, raw, defaults, log.getEffectiveLevel())))
            self._wait_until_loaded(on_load)
        except BaseException:
            self.close()
            raise

    def run(self, lines: Iterable[Line], done: Container[int] = ()) -> Generator[tuple[int, Json]]:
        """As `Batch.run`. Raises EngineError when the last engine is gone."""
        source = triage(lines, done, self._settings)
        while True:
            yield from self._feed(source)
            if not any(worker.lines for worker in self._workers):
                return
            for worker, message in self._messages():
                match message:
                    case "record", number, record:
                        del worker.lines[number]
                        prompt_tokens, new_tokens = token_counts(record)
                        self.prompt_tokens += prompt_tokens
                        self.new_tokens += new_tokens
                        yield number, record
                    case "failed", kind, text:
                        raise _error(kind, text)
                    case None:
                        self._lose(worker)

    def close(self) -> None:
        """End the engines."""
        while self._workers:
            self._workers.pop().stop()

    def _feed(self, source: Iterator[Line | tuple[int, Json]]) -> Iterator[tuple[int, Json]]:
        """Give lines to whoever has the fewest, and pass on the records of those that nobody can answer."""
        while True:
            worker = min(self._workers, key=lambda each: len(each.lines))
            if len(worker.lines) >= self._limit:
                return
            found = self._returned.popleft() if self._returned else next(source, None)
            if isinstance(found, tuple):
                yield found
            elif found is None:
                return
            else:
                worker.lines[found.number] = found
                try:
                    worker.connection.send(found)
                except OSError:  # it is gone, which `_messages` tells as well
                    return

    def _messages(self) -> Iterator[tuple[_Worker, Any]]:
        """What workers say next; None from one that is gone."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection)):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, OSError):
                message = None
            yield by_connection[connection], message

    def _lose(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()
        reason = f"an engine's process {exit_in_words(worker.process.returncode)}"
        if not self._workers:
            raise EngineError(f"{reason}, the last one: run the same command again to go on")
        log.error("%s: its %d requests go to the %d others", reason, len(worker.lines), len(self._workers))
        self._returned.extend(worker.lines.values())

    def _wait_until_loaded(self, on_load: Callable[[int, int], None]) -> None:
        tensors: dict[int, tuple[int, int]] = {}
        loading = set(self._workers)
        while loading:
            for worker, message in self._messages():
                match message:
                    case "loading", done, total:
                        tensors[id(worker)] = done, total
                        on_load(*map(sum, zip(*tensors.values(), strict=True)))
                    case ("loaded",):
                        loading.discard(worker)
                    case "failed", kind, text:
                        raise _error(kind, text)
                    case None:
                        code = worker.process.wait()
                        raise EngineError(f"an engine's process left with exit code {code} while it loaded")


def _start(load: tuple[Any, ...]) -> _Worker:
    """A process that runs `main`; it imports no __main__, so that any script can start it."""
    boot = f"import sys; sys.path[:] = {sys.path!r}; from glm4.cluster.local_batch import main; main(int(sys.argv[1]))"
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", boot, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),), start_new_session=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    connection = Connection(ours.detach())
    connection.send(load)
    return _Worker(process, connection)


def _error(kind: str, text: str) -> Glm4Error:
    error: Glm4Error = getattr(errors, kind)(text)
    return error


def main(file_descriptor: int) -> None:
    """The inside of a worker's process: it answers the lines that come, and leaves when the other end hangs up."""
    connection, sending = Connection(file_descriptor), threading.Lock()

    def send(*message: Any) -> None:
        with sending:
            try:
                connection.send(message)
            except OSError:
                os._exit(0)

    def fail(error: BaseException) -> None:
        known = error if isinstance(error, Glm4Error) else EngineError(f"{type(error).__name__}: {error}")
        send("failed", type(known).__name__, str(known))

    def answered(line: Line, record: Future[Json]) -> None:
        error = record.exception()
        if error is None:
            send("record", line.number, record.result())
        else:
            fail(error)

    options, settings, raw, defaults, log_level = connection.recv()
    logging.basicConfig(format="%(message)s", level=log_level)
    try:
        llm = LLM(options, on_load=lambda done, total: send("loading", done, total))
    except Glm4Error as error:
        fail(error)
        return
    worker = LineWorker(Batch(llm, settings, raw, defaults, triaged=True))
    send("loaded")
    while True:
        try:
            line: Line = connection.recv()
        except (EOFError, OSError):
            llm.close()
            os._exit(0)  # whatever the engine is at
        worker.submit(line).add_done_callback(partial(answered, line))
