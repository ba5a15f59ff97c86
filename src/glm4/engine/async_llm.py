"""`AsyncLLM`: the engine in a process of its own, for asyncio. A crash of the engine is an error of its requests here.

Prompts become token ids in this process, in threads, so that neither the event loop nor the engine waits for a long
one; no tensor library is loaded here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from glm4.engine.answer_stream import AnswerStream
from glm4.engine.engine_process import EngineProcess
from glm4.engine.messages import (
    HEADER_BYTES,
    Abort,
    Add,
    Embedding,
    GetStats,
    LoadFailed,
    Loading,
    Progress,
    Ready,
    Stats,
    decode_from_caller,
    to_frame,
)
from glm4.engine.request import RequestOutput
from glm4.engine.served_model import Health, ServedModel, started
from glm4.errors import EngineError, OptionError
from glm4.options import EngineOptions, SamplingParams, options_from
from glm4.parallel.control import Failure
from glm4.text.messages import Message

log = logging.getLogger("glm4")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """What happens when the engine's process dies."""

    max_restarts: int = 3
    """It is started again this many times within `window`; then the engine is dead."""
    window: float = 600.0
    """Seconds."""
    backoff: float = 1.0
    """Seconds to wait before the second restart within `window`, doubled for each further one; the first is at once."""
    wait: bool = True
    """Requests that come while it restarts wait for it; else they fail at once."""


class AsyncLLM(ServedModel):
    """GLM-4 from a Hugging Face folder, for asyncio, in a process of its own.

    async with AsyncLLM("/path/hf_dir") as llm:
        async for output in llm.generate([{"role": "user", "content": "请介绍一下北京"}]):
            print(output.delta, end="", flush=True)
    """

    def __init__(
        self,
        options: EngineOptions | str | Path,
        *,
        restarts: RestartPolicy = RestartPolicy(),
        on_load: Callable[[int, int], None] = lambda done, total: None,
        **overrides: Any,
    ) -> None:
        """Take the options of `LLM`; nothing is started before `start`, or `async with`.

        on_load(tensors done, tensors in all) is called while the weights load, also after a crash.
        Raises OptionError.
        """
        options_from(EngineOptions, overrides)
        if not isinstance(options, EngineOptions):
            options = EngineOptions(model=str(options))
        super().__init__(replace(options, **overrides))
        self._num_restarts = 0
        self._restarts, self._on_load = restarts, on_load
        self._ids = itertools.count()
        self._streams: dict[int, AnswerStream] = {}
        """Requests that have not ended, by the number that they have in messages."""
        self._no_streams = asyncio.Event()
        self._stats_asked: deque[asyncio.Future[Stats]] = deque()
        self._process: EngineProcess | None = None
        """Set while its model is loaded."""
        self._state: Literal["starting", "ready", "restarting", "dead"] = "starting"
        self._draining = False
        self._end: Failure | None = None
        """Why the engine is dead."""
        self._stop_seconds = 10.0
        self._loaded = asyncio.Event()
        """Set with the first model, or when there will be none."""
        self._supervisor: asyncio.Task[None] | None = None
        self._facts: Ready | None = None

    async def start(self) -> Self:
        """Load the model, and return when requests are served.

        Raises the Glm4Error that `LLM` would, and EngineError when the process dies while it loads.
        """
        if self._supervisor is not None:
            raise EngineError("the engine was started before: make another AsyncLLM")
        self._supervisor = asyncio.create_task(self._supervise(), name="glm4 engine")
        try:
            await self._loaded.wait()
            self._raise_if_dead()
            await self._load_text()
        except BaseException:
            await self.shutdown()
            raise
        return self

    @property
    def health(self) -> Health:
        """What the engine does now: "draining" finishes the requests it has, "dead" never serves one again."""
        return "draining" if self._draining and self._state != "dead" else self._state

    @property
    def num_restarts(self) -> int:
        """How often its process was started again after a crash."""
        return self._num_restarts

    @property
    def pid(self) -> int | None:
        """The id of the engine's process, while its model is loaded."""
        return self._process.pid if self._process else None

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return started(self._facts).max_model_len

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What holds for a request that says nothing of its own."""
        return started(self._facts).sampling_defaults

    async def generate(
        self,
        prompt: str | list[int] | Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat: bool = False,
        request_id: str | None = None,
        priority: int = 0,
        choice: int = 0,
        after: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answer to one raw prompt (text or ids) or one conversation, as it grows; `chat`: the ids are one's.

        Steps that a slow reader misses are merged: `delta` is always what was added since the output before.
        Leaving the loop early, closing the generator or cancelling its task ends the request and frees its blocks;
        so does `abort`, by `request_id` or by the number in the outputs, after which one last output has the
        finish_reason "abort". Several answers to one prompt are several requests with `choice` 0, 1, …, those from 1
        on `after` the request_id of the first, which computes the prompt for all; lower priorities are served first.
        Raises PromptError, MemoryPlanError and OptionError for what cannot be served, and
        EngineError when the engine fails or takes no requests.
        """
        self._refuse_if_closed()
        if not isinstance(sampling, SamplingParams | None):
            raise OptionError(f"sampling: {type(sampling).__name__} is no SamplingParams")
        if sampling is not None and max(sampling.n or 1, sampling.best_of or 1) > 1:
            raise OptionError("n and best_of: a stream is one answer; start one for each, with `choice`")
        number = next(self._ids)
        stream = self._streams[number] = AnswerStream(number, request_id)
        try:
            stream.prompt_token_ids, through_template = await self.encode(prompt, tools)
            first = next((each.number for each in self._streams.values() if after and each.request_id == after), None)
            stream.frame = _add_frame(
                Add(number, stream.prompt_token_ids, sampling, chat or through_template, priority, choice, after=first)
            )
            self._send(stream)
            while True:
                output = await stream.next()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._drop(stream)

    async def embed(self, prompt: str | list[int], *, priority: int = 0) -> list[float]:
        """The mean of the prompt's last hidden states (after the final norm), as `LLM.embed`."""
        self._refuse_if_closed()
        number = next(self._ids)
        stream = self._streams[number] = AnswerStream(number, None)
        try:
            token_ids, _ = await self.encode(prompt, None)
            stream.frame = _add_frame(Add(number, token_ids, None, False, priority, 0, None, embed=True))
            self._send(stream)
            return await stream.embedding()
        finally:
            self._drop(stream)

    async def abort(self, request_id: str | int) -> None:
        """End the requests called so, or that have this number in their outputs; none is no error."""
        for stream in list(self._streams.values()):
            if request_id in (stream.request_id, stream.number):
                self._drop(stream)
                stream.abort()

    async def stats(self) -> Stats:
        """What the engine holds and has counted; it answers between two steps.

        The counters begin anew when its process does. Raises EngineError while there is no engine.
        """
        self._raise_if_dead()
        if self._process is None:
            raise EngineError(f"the engine is {self._state}: ask again when it is ready")
        asked: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        self._stats_asked.append(asked)
        self._process.send(to_frame(GetStats()))
        return await asked

    async def drain(self) -> None:
        """Take no more requests, and return when those that are there have ended."""
        self._draining = True
        while self._streams:
            self._no_streams.clear()
            await self._no_streams.wait()

    async def shutdown(self, timeout: float = 10.0) -> None:
        """End every request with EngineError and the engine's process with them, by force after `timeout` seconds."""
        self._die(Failure.of(EngineError("the engine has been shut down")))
        self._stop_seconds = timeout
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})

    def _send(self, stream: AnswerStream) -> None:
        """Send a request that waits to be sent, if there is an engine to send it to."""
        if self._process is not None and stream.frame is not None and stream.number in self._streams:
            self._process.send(stream.frame)
            stream.frame, stream.is_sent = None, True

    def _drop(self, stream: AnswerStream) -> None:
        """Forget a request; the engine does so too if it still has it."""
        if stream.number in self._streams and stream.is_sent and self._process is not None:
            self._process.send(to_frame(Abort(stream.number)))
        self._ended(stream)

    def _ended(self, stream: AnswerStream) -> None:
        self._streams.pop(stream.number, None)
        if not self._streams:
            self._no_streams.set()

    def _fail(self, stream: AnswerStream, failure: Failure) -> None:
        self._ended(stream)
        stream.fail(failure)

    def _refuse_if_closed(self) -> None:
        self._raise_if_dead()
        if self._draining:
            raise EngineError("the engine takes no more requests: it finishes those it has")
        if self._state == "restarting" and not self._restarts.wait:
            raise EngineError("the engine is starting again after a crash: send the request again later")

    def _raise_if_dead(self) -> None:
        if self._end is not None:
            raise self._end.error()

    async def _supervise(self) -> None:
        """Keep a process running until there are too many crashes, or `shutdown`."""
        crashes: deque[float] = deque()
        end = Failure.of(EngineError("the event loop of the engine's program has ended"))
        try:
            while True:
                failure = await self._run_process()
                if self._facts is None:
                    end = failure
                    return
                log.error("%s", failure.text)
                delay = self._delay(crashes)
                if delay is None:
                    many = f"after {len(crashes)} restarts within {self._restarts.window:g} s it is left alone"
                    end = Failure(failure.kind, f"{failure.text}; {many}: start the program again")
                    return
                self._fail_sent(Failure(failure.kind, f"{failure.text}; it starts again: repeat the request"))
                await asyncio.sleep(delay)
                self._num_restarts += 1
        except Exception as error:
            end = Failure.of(EngineError(f"the engine cannot go on: {type(error).__name__}: {error}"))
            log.exception("%s", end.text)
        finally:
            self._die(end)

    async def _run_process(self) -> Failure:
        """The whole life of one process; why it ended."""
        try:
            process = await EngineProcess.start(self.options)
        except EngineError as error:
            return Failure.of(error)
        try:
            while (message := await process.receive()) is not None:
                if isinstance(message, LoadFailed):
                    return message.failure
                self._take(message, process)
            self._process = None
            self._state = "restarting" if self._facts else "starting"
            return Failure.of(EngineError(await process.reason_of_death()))
        except EngineError as error:
            return Failure.of(error)
        finally:
            self._process = None
            await process.stop(self._stop_seconds)

    def _delay(self, crashes: deque[float]) -> float | None:
        """Seconds to wait before the next restart; None when there have been too many."""
        now, policy = asyncio.get_running_loop().time(), self._restarts
        while crashes and crashes[0] < now - policy.window:
            crashes.popleft()
        if len(crashes) >= policy.max_restarts:
            return None
        crashes.append(now)
        return policy.backoff * 2.0 ** (len(crashes) - 2) if len(crashes) > 1 else 0.0

    def _fail_sent(self, failure: Failure) -> None:
        """Requests that were in the process that died end; those that were not sent yet wait for the next one."""
        for stream in list(self._streams.values()):
            if stream.is_sent:
                self._fail(stream, failure)
        self._fail_stats(failure)

    def _fail_stats(self, failure: Failure) -> None:
        for asked in self._stats_asked:
            if not asked.done():
                asked.set_exception(failure.error())
        self._stats_asked.clear()

    def _die(self, end: Failure) -> None:
        self._state, self._end = "dead", self._end or end
        for stream in list(self._streams.values()):
            self._fail(stream, end)
        self._fail_stats(end)
        self._loaded.set()

    def _take(self, message: Loading | Ready | Progress | Embedding | Stats, process: EngineProcess) -> None:
        match message:
            case Progress():
                self._take_progress(message)
            case Embedding(number, values):
                if number in self._streams:
                    self._ended(stream := self._streams[number])
                    stream.give(values)
            case Stats():
                asked = self._stats_asked.popleft()
                if not asked.done():
                    asked.set_result(message)
            case Loading(done, total):
                self._on_load(done, total)
            case Ready():
                self._facts, self._process, self._state = message, process, "ready"
                self._loaded.set()
                for stream in list(self._streams.values()):
                    self._send(stream)

    def _take_progress(self, progress: Progress) -> None:
        for output in progress.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # aborted while the step ran
                continue
            if output.finish_reason is not None:
                self._ended(stream)
            stream.push(output)
        for number, failure in progress.failures:
            if number in self._streams:
                self._fail(self._streams[number], failure)


def _add_frame(message: Add) -> bytes:
    """The frame of a request that the engine can read: what it cannot must fail here, not there."""
    try:
        frame = to_frame(message)
        decode_from_caller(frame[HEADER_BYTES:])
    except UnicodeEncodeError as error:
        raise OptionError("a text of the request is not valid Unicode (a lone surrogate)") from error
    except (OverflowError, TypeError, msgspec.ValidationError) as error:
        raise OptionError(
            f"a value of the request is too large or of another type than it should be: {error}"
        ) from error
    return frame
