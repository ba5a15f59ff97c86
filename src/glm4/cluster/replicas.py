"""Several copies of a model on one machine, served as if they were one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec

from glm4.cluster.affinity import Affinity
from glm4.cluster.placement import replica_options
from glm4.engine.async_llm import AsyncLLM, RestartPolicy
from glm4.engine.messages import Stats
from glm4.engine.request import RequestOutput
from glm4.engine.served_model import Health, ServedModel
from glm4.errors import EngineError, Glm4Error
from glm4.options import EngineOptions, SamplingParams, options_from
from glm4.text.messages import Message

_RESTARTS = RestartPolicy()


class Replicas(ServedModel):
    """`data_parallel` engines, each in a process of its own; see `Affinity` for who gets what.

    async with Replicas("/path/hf_dir", data_parallel=2) as llm:
        async for output in llm.generate("Once upon a time"):
            print(output.delta, end="", flush=True)

    One that dies is started again, as its RestartPolicy says, and the others get the new requests meanwhile.
    """

    def __init__(
        self,
        options: EngineOptions | str | Path,
        *,
        restarts: RestartPolicy = _RESTARTS,
        on_load: Callable[[int, int], None] = lambda done, total: None,
        **overrides: Any,
    ) -> None:
        """Take the options of `AsyncLLM`; on_load(tensors done, tensors in all) counts those of all engines.

        Raises OptionError.
        """
        options_from(EngineOptions, overrides)
        if not isinstance(options, EngineOptions):
            options = EngineOptions(model=str(options))
        super().__init__(replace(options, **overrides))
        self._restarts, self._on_load = restarts, on_load
        self._loaded: dict[int, tuple[int, int]] = {}
        """Tensors done and in all, by the number of the engine."""
        self.engines: list[AsyncLLM] = []
        self._affinity: Affinity[int] = Affinity(self.options.block_size)
        self._seen_restarts: list[int] = []
        self._tickets = itertools.count()
        self._numbers: dict[int, tuple[int, int]] = {}
        """Number of a request in its outputs to its engine, and its number there."""
        self._named: dict[str, int] = {}
        """request_id of an open request to its engine."""
        self._draining = False

    async def start(self) -> Self:
        """Load all copies side by side. Raises the Glm4Error of the first that fails, once the others have stopped."""
        if self.engines:
            raise EngineError("the engines were started before: make other Replicas")
        each = await asyncio.to_thread(replica_options, self.options)
        self.engines = [
            AsyncLLM(options, restarts=self._restarts, on_load=partial(self._count, i))
            for i, options in enumerate(each)
        ]
        self._seen_restarts = [0] * len(each)
        try:
            async with asyncio.TaskGroup() as tasks:
                for engine in self.engines:
                    tasks.create_task(engine.start())
            await self._load_text()
        except BaseException as error:
            await self.shutdown()
            if isinstance(error, BaseExceptionGroup) and isinstance(error.exceptions[0], Glm4Error):
                raise error.exceptions[0] from error
            raise
        return self

    @property
    def health(self) -> Health:
        """As good as the best engine's."""
        states = {engine.health for engine in self.engines}
        if self._draining and states != {"dead"}:
            return "draining"
        best: tuple[Health, ...] = ("ready", "restarting", "starting", "dead")
        return next((state for state in best if state in states), "starting")

    @property
    def num_restarts(self) -> int:
        """Of all engines."""
        return sum(engine.num_restarts for engine in self.engines)

    @property
    def max_model_len(self) -> int:
        """The least of all engines: where memory is shared, one may have got less of it."""
        self._refuse_if_closed()
        return min(engine.max_model_len for engine in self.engines)

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What holds for a request that says nothing of its own."""
        self._refuse_if_closed()
        return self.engines[0].sampling_defaults

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
        """As `AsyncLLM.generate`; requests `after` another go where that is."""
        self._refuse_if_closed()
        ids, through_template = await self.encode(prompt, tools)
        ticket, number = next(self._tickets), self._choose(ids, self._named.get(after or ""))
        self._affinity.begin(ticket, ids, number, sampling.max_new_tokens if sampling else None)
        if request_id is not None:
            self._named[request_id] = number
        answer = self.engines[number].generate(
            ids, sampling, chat=chat or through_template, request_id=request_id, priority=priority, choice=choice,
            after=after,
        )  # fmt: skip
        try:
            async with aclosing(answer) as outputs:
                async for output in outputs:
                    self._numbers[ticket] = number, output.request_id
                    yield replace(output, request_id=ticket)
        finally:
            self._affinity.end(ticket)
            self._numbers.pop(ticket, None)
            self._named.pop(request_id or "", None)

    async def embed(self, prompt: str | list[int], *, priority: int = 0) -> list[float]:
        """The mean of the prompt's last hidden states (after the final norm), as `LLM.embed`."""
        self._refuse_if_closed()
        ids, _ = await self.encode(prompt)
        ticket, number = next(self._tickets), self._choose(ids, None)
        self._affinity.begin(ticket, ids, number, 1)
        try:
            return await self.engines[number].embed(ids, priority=priority)
        finally:
            self._affinity.end(ticket)

    async def abort(self, request_id: str | int) -> None:
        """End the requests called so, or that have this number in their outputs; none is no error."""
        if isinstance(request_id, int):
            number, inner = self._numbers.get(request_id, (0, -1))
            await self.engines[number].abort(inner)
        else:
            for engine in self.engines:
                await engine.abort(request_id)

    async def stats(self) -> Stats:
        """The sum over the engines that are there. Raises EngineError while there is none."""
        answers = await asyncio.gather(*(engine.stats() for engine in self.engines), return_exceptions=True)
        return summed(answer for answer in answers if isinstance(answer, Stats))

    async def drain(self) -> None:
        """Take no more requests, and return when those that are there have ended."""
        self._draining = True
        await asyncio.gather(*(engine.drain() for engine in self.engines))

    async def shutdown(self, timeout: float = 10.0) -> None:
        """End every request with EngineError and the engines' processes with them, by force after `timeout` seconds."""
        await asyncio.gather(*(engine.shutdown(timeout) for engine in self.engines))

    def _count(self, number: int, done: int, total: int) -> None:
        self._loaded[number] = done, total
        done, total = map(sum, zip(*self._loaded.values(), strict=True))
        self._on_load(done, total)

    def _choose(self, ids: list[int], wanted: int | None) -> int:
        """The number of the engine for a prompt; `wanted` where that is ready."""
        for number, engine in enumerate(self.engines):
            if engine.num_restarts != self._seen_restarts[number]:  # its cache is empty
                self._affinity.forget(number)
                self._seen_restarts[number] = engine.num_restarts
        of_best_health = [i for i, engine in enumerate(self.engines) if engine.health == self.health]
        return wanted if wanted in of_best_health else self._affinity.rank(ids, of_best_health)[0]

    def _refuse_if_closed(self) -> None:
        if not self.engines:
            raise EngineError("the engines have not been started: `await llm.start()`, or use `async with`")
        if self._draining:
            raise EngineError("the engine takes no more requests: it finishes those it has")


def summed(all_stats: Iterable[Stats]) -> Stats:
    """The Stats of several engines as those of one. Raises EngineError where there is none."""
    rows = [msgspec.structs.astuple(stats) for stats in all_stats]
    if not rows:
        raise EngineError("there is no engine now: ask again when one is ready")
    return Stats(*map(sum, zip(*rows, strict=True)))
