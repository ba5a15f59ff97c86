"""One answer on its way from the engine's process to its reader."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from glm4.engine.request import RequestOutput
from glm4.engine.step import TokenLogprobs
from glm4.errors import EngineError
from glm4.parallel.control import Failure


class AnswerStream:
    """What the reader has not taken yet is merged, never queued: it takes no more room than the answer itself."""

    def __init__(self, number: int, request_id: str | None) -> None:
        self.number, self.request_id = number, request_id
        self.prompt_token_ids: list[int] = []
        self.frame: bytes | None = None
        """The request, while it waits to be sent."""
        self.is_sent = False
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._text = self._delta = ""
        self._latest: RequestOutput | None = None
        """What the reader has not taken yet: the newest step's output, for the values that are not sums."""
        self._failure: Failure | None = None
        self._embedding: list[float] | None = None
        self._news = asyncio.Event()

    def push(self, output: RequestOutput) -> None:
        """Add what one step gave."""
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        self._prompt_logprobs += output.prompt_logprobs
        self._text += output.delta
        self._delta += output.delta
        self._latest = output
        self._news.set()

    def abort(self) -> None:
        """End the answer where it is."""
        self.push(RequestOutput(self.number, [], [], "", "", "abort"))

    def give(self, embedding: list[float]) -> None:
        """End a request that only reads its prompt."""
        self._embedding = embedding
        self._news.set()

    async def embedding(self) -> list[float]:
        """What was given. Raises the error that ended the request instead."""
        await self._news.wait()
        if self._embedding is None:
            raise self._failure.error() if self._failure else EngineError("the request has been aborted")
        return self._embedding

    def fail(self, failure: Failure) -> None:
        """End the answer with an error."""
        self._failure = failure
        self._news.set()

    async def next(self) -> RequestOutput:
        """The answer so far, once there is more of it than before. Raises the error that ended it."""
        await self._news.wait()
        if self._latest is None:
            assert self._failure is not None
            raise self._failure.error()
        output = replace(
            self._latest,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=list(self._token_ids),
            text=self._text,
            delta=self._delta,
            logprobs=list(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )
        self._latest, self._delta = None, ""
        if self._failure is None:
            self._news.clear()
        return output
