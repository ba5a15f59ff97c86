"""The inside of the engine's own process: messages in, steps, messages out. `EngineProcess` starts it.

It takes what has come in between two steps, and sleeps in the kernel while there is nothing to do. When the other end
of its socket is closed, because it is to stop or because the program that started it is gone, it leaves.
"""

from __future__ import annotations

import faulthandler
import logging
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NoReturn

from glm4.engine.engine import Engine
from glm4.engine.llm import LLM, mean_hidden_state
from glm4.engine.messages import (
    HEADER_BYTES,
    Abort,
    Add,
    Embedding,
    FromCaller,
    FromEngine,
    GetStats,
    LoadFailed,
    Loading,
    Progress,
    Ready,
    Stats,
    decode_from_caller,
    decode_load,
    payload_length,
    to_frame,
)
from glm4.engine.request import Reading, RequestOutput
from glm4.errors import EngineError, Glm4Error, LostRankError
from glm4.options import SamplingParams
from glm4.parallel.control import Failure

MAX_FAILED_STEPS = 3
"""After this many failed steps in a row the device itself is taken to be broken, as after a CUDA error: start anew."""
_READ_BYTES = 1 << 18
_POLL_SECONDS = 0.01

log = logging.getLogger("glm4")


def main(file_descriptor: int) -> None:
    """Serve the program at the other end of the socket until it closes it."""
    faulthandler.enable()
    logging.basicConfig(format="%(levelname)s %(message)s")
    with socket.socket(fileno=file_descriptor) as sock, suppress(CallerGone):
        sock.set_inheritable(False)  # a process started from here must not keep the socket open
        connection = Connection(sock)
        load = decode_load(connection.receive_frame())
        log.setLevel(load.log_level)
        try:
            llm = LLM(load.options, on_load=lambda done, total: connection.send(Loading(done, total)))
        except Glm4Error as error:
            connection.send(LoadFailed(Failure.of(error)))
            return
        connection.send(Ready(llm.max_model_len, llm.sampling_defaults))
        try:
            Worker(llm.engine, connection).run()
        except LostRankError as error:  # it says all: a stack behind it would hide it
            log.error("%s", error)
            sys.exit(error.exit_code)


class CallerGone(Exception):
    """The other end of the socket is closed."""


class Connection:
    """Frames over a blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = bytearray()

    def send(self, message: FromEngine) -> None:
        """Send one message; waits while the caller is behind. Raises CallerGone."""
        try:
            self._sock.sendall(to_frame(message))
        except OSError as error:
            raise CallerGone from error

    def receive(self, *, wait: bool) -> FromCaller | None:
        """The next message; None if none has come in whole and it is not to `wait`. Raises CallerGone."""
        while (size := self._frame_bytes()) is None:
            if not self._read(wait):
                return None
        message: FromCaller = decode_from_caller(self._pop(size))
        return message

    def receive_frame(self) -> bytes:
        """The inside of the next frame, once it is there. Raises CallerGone."""
        while (size := self._frame_bytes()) is None:
            self._read(wait=True)
        return self._pop(size)

    def _frame_bytes(self) -> int | None:
        """Length of the first frame, header included, if it is there as a whole."""
        if len(self._received) < HEADER_BYTES:
            return None
        size = HEADER_BYTES + payload_length(self._received)
        return size if len(self._received) >= size else None

    def _pop(self, size: int) -> bytes:
        payload = bytes(memoryview(self._received)[HEADER_BYTES:size])
        del self._received[:size]
        return payload

    def _read(self, wait: bool) -> bool:
        try:
            data = self._sock.recv(_READ_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise CallerGone from error
        if not data:
            raise CallerGone
        self._received += data
        return True


@dataclass(slots=True)
class _Live:
    """A request that has not ended."""

    id: int
    """The caller's."""
    num_tokens: int = 0
    """Tokens of the answer that the caller has, and …"""
    num_prompt_logprobs: int = 0
    """… log-probabilities of the prompt."""


class Worker:
    """Runs the engine for one caller."""

    def __init__(self, engine: Engine, connection: Connection) -> None:
        self._engine, self._connection = engine, connection
        self._live: dict[int, _Live] = {}
        """By the engine's id."""
        self._engine_ids: dict[int, int] = {}
        """By the caller's id."""
        self._checking: dict[int, tuple[Add, Future[None]]] = {}
        """Requests whose forms are being looked at, by the caller's id, in order."""
        self._checker = ThreadPoolExecutor(1, "forms")

    def run(self) -> NoReturn:
        """Serve until the caller is gone: raises CallerGone then, and whatever the engine cannot go on after."""
        while True:
            while (
                message := self._connection.receive(wait=not self._engine.has_work and not self._checking)
            ) is not None:
                self._take(message)
            self._add_checked()
            if self._engine.has_work:
                self._step()
            elif self._checking:
                wait([next(iter(self._checking.values()))[1]], _POLL_SECONDS)

    def _take(self, message: FromCaller) -> None:
        match message:
            case Add(sampling=SamplingParams() as params) if params.constraints:
                # A schema can take seconds to be refused, and no other answer is to wait for that.
                check = self._checker.submit(self._engine.constraints.check, params)
                self._checking[message.id] = message, check
            case Add():
                self._add(message)
            case Abort():
                self._checking.pop(message.id, None)
                engine_id = self._engine_ids.pop(message.id, None)
                if engine_id is not None:
                    del self._live[engine_id]
                    self._engine.abort(engine_id)
            case GetStats():
                self._connection.send(self._stats())

    def _add_checked(self) -> None:
        while self._checking and (first := next(iter(self._checking.values())))[1].done():
            message, check = first
            del self._checking[message.id]
            self._add(message, check)

    def _add(self, message: Add, check: Future[None] | None = None) -> None:
        try:
            if check is not None:
                check.result()
            engine_id = self._engine.add(
                message.prompt_token_ids,
                message.sampling,
                chat=message.chat,
                priority=message.priority,
                choice=message.choice,
                after=None if message.after is None else self._engine_ids.get(message.after),
                reading=Reading("sum") if message.embed else None,
            )
        except Glm4Error as error:
            self._connection.send(Progress(failures=[(message.id, Failure.of(error))]))
            return
        self._live[engine_id] = _Live(message.id)
        self._engine_ids[message.id] = engine_id

    def _step(self) -> None:
        """One step. An error that the engine does not expect leaves it in an unknown state, and ends the process."""
        outputs = self._engine.step()
        failures = self._engine.failures
        if len(failures) >= MAX_FAILED_STEPS or any(isinstance(failure, LostRankError) for failure in failures):
            raise failures[-1]
        if failures:
            log.error("a step failed", exc_info=failures[-1])
        progress = Progress()
        for output in outputs:
            news = self._news(output)
            if output.hidden_states:
                self._connection.send(Embedding(news.request_id, mean_hidden_state(output)))
            elif news.error is None:
                progress.outputs.append(news)
            else:
                log.error("request %d: %s", news.request_id, news.error)
                progress.failures.append((news.request_id, Failure.of(EngineError(news.error))))
        if progress.outputs or progress.failures:
            self._connection.send(progress)

    def _news(self, output: RequestOutput) -> RequestOutput:
        """`output` without what the caller has already."""
        live = self._live[output.request_id]
        if output.finish_reason is not None:
            del self._live[output.request_id], self._engine_ids[live.id]
        news = replace(
            output,
            request_id=live.id,
            prompt_token_ids=[],
            token_ids=output.token_ids[live.num_tokens :],
            text="",
            hidden_states=[],
            logprobs=output.logprobs[live.num_tokens :],
            prompt_logprobs=output.prompt_logprobs[live.num_prompt_logprobs :],
        )
        live.num_tokens, live.num_prompt_logprobs = len(output.token_ids), len(output.prompt_logprobs)
        return news

    def _stats(self) -> Stats:
        scheduler, counted = self._engine.scheduler, self._engine.stats
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks=scheduler.pool.num_blocks,
            kv_blocks_used=scheduler.pool.num_blocks - scheduler.pool.num_free,
            prefix_queried_tokens=scheduler.stats.queried_tokens,
            prefix_hit_tokens=scheduler.stats.hit_tokens,
            prefill_tokens=counted.prefill_tokens,
            prefill_seconds=counted.prefill_seconds,
            decode_tokens=counted.decode_tokens,
            decode_seconds=counted.decode_seconds,
        )
