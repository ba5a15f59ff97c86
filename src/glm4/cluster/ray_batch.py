"""One batch, shared out among the machines of a Ray cluster with Ray Data."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Container, Generator, Iterable
from dataclasses import dataclass
from typing import Any

from glm4.api.bodies import Json
from glm4.batch.files import Line
from glm4.batch.run import token_counts, triage
from glm4.cluster.placement import Scale
from glm4.cluster.ray_cluster import as_ours, connect, placed
from glm4.errors import OutputError
from glm4.options import EngineOptions, SamplingParams

_LINES = 16
"""In one block, which is what is sent to a replica, and computed again where that dies."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What a replica is built from."""

    options: EngineOptions
    settings: str
    raw: bool
    defaults: SamplingParams | None


class RayBatch:
    """`Batch` over the replicas of a Ray cluster. The machines need the model's folder, but not the requests."""

    def __init__(
        self,
        options: EngineOptions,
        scale: Scale,
        settings: str,
        raw: bool = False,
        defaults: SamplingParams | None = None,
    ) -> None:
        """Connect to the cluster; the other arguments are those of `Batch`. Raises OptionError."""
        self.prompt_tokens = self.new_tokens = 0
        """Of finished requests."""
        self._ray = connect()
        options, self._place = placed(self._ray, options)
        self._scale, self._work = scale, _Work(options, settings, raw, defaults)

    def run(self, lines: Iterable[Line], done: Container[int] = ()) -> Generator[tuple[int, Json]]:
        """As `Batch.run`, but that all of `lines` is read first, and kept in Ray's object store.

        Raises what `LLM` raises, and EngineError.
        """
        blocks: list[Any] = []
        waiting: list[Line] = []
        for found in triage(lines, done, self._work.settings):
            if isinstance(found, tuple):
                yield found
                continue
            waiting.append(found)
            if len(waiting) == _LINES:
                blocks.append(self._stored(waiting))
                waiting = []
        if waiting:
            blocks.append(self._stored(waiting))
        if blocks:
            yield from self._answered(blocks)

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()

    def _stored(self, lines: list[Line]) -> Any:
        import pyarrow

        table = {"number": [line.number for line in lines], "data": [line.data for line in lines]}
        return self._ray.put(pyarrow.table(table, pyarrow.schema({"number": "int64", "data": "binary"})))

    def _answered(self, blocks: list[Any]) -> Generator[tuple[int, Json]]:
        """Records as their blocks are done, each once, though Ray may compute a block again."""
        from ray import data

        logging.getLogger("ray.data").setLevel(logging.ERROR)  # what matters is told as an error of ours
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False
        at_a_time = max(2, 2 * self._work.options.max_batch_requests // _LINES)
        answers = data.from_arrow_refs(blocks).map_batches(
            _Replica,
            fn_constructor_args=(self._work,),
            batch_size=None,
            compute=data.ActorPoolStrategy(
                min_size=self._scale.min_replicas,
                max_size=self._scale.max_replicas,
                max_tasks_in_flight_per_actor=at_a_time,
                max_concurrent_calls_per_actor=at_a_time,
            ),
            **self._place,
        )
        written: set[int] = set()
        try:
            for block in answers.iter_batches(batch_size=None, prefetch_batches=0):
                for number, text in zip(block["number"].tolist(), block["record"].tolist(), strict=True):
                    if number not in written:
                        written.add(number)
                        record: Json = json.loads(text)
                        prompt_tokens, new_tokens = token_counts(record)
                        self.prompt_tokens += prompt_tokens
                        self.new_tokens += new_tokens
                        yield number, record
        except (GeneratorExit, OutputError, BrokenPipeError):
            raise
        except Exception as error:
            raise as_ours(error) from error


class _Replica:
    """An engine inside a Ray actor; it answers several blocks at a time, so that none waits for the end of another."""

    def __init__(self, work: _Work) -> None:
        from glm4.batch.run import Batch
        from glm4.cluster.line_worker import LineWorker
        from glm4.engine.llm import LLM

        self._worker = LineWorker(Batch(LLM(work.options), work.settings, work.raw, work.defaults, triaged=True))

    async def __call__(self, block: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        numbers = block["number"].tolist()
        records = [
            asyncio.wrap_future(self._worker.submit(Line(number, data)))
            for number, data in zip(numbers, block["data"].tolist(), strict=True)
        ]
        yield {"number": numbers, "record": [json.dumps(record) for record in await asyncio.gather(*records)]}
