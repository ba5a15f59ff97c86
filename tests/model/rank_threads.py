"""The ranks of a model as threads of one process, for tests: what they exchange goes through a list."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.model.sharding import Shard
from glm4.ops.attention import KVCache, make_batch

CPU = torch.device("cpu")
T = TypeVar("T")


def opened(path: Path) -> tuple[Checkpoint, Glm4Config]:
    folder = ModelFolder.open(path)
    return Checkpoint.open(folder), Glm4Config.from_dict(folder.read_json("config.json"))


class Member:
    """The collectives of one thread."""

    def __init__(self, rank: int, given: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(given)
        self._given, self._barrier = given, barrier

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._given[self.rank] = x.clone()
        self._barrier.wait()
        everyone = [each for each in self._given if each is not None]
        assert len({(each.shape, each.dtype) for each in everyone}) == 1
        self._barrier.wait()
        return everyone

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack([each.float() for each in self._exchange(x)]).sum(0).to(x.dtype)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        assert x.dtype is torch.float32
        return torch.stack(self._exchange(x)).amax(0)

    def gather(self, x: Tensor) -> Tensor | None:
        everyone = self._exchange(x)
        return torch.cat(everyone, 1) if self.rank == 0 else None

    def close(self) -> None:
        pass


class Group:
    """Threads that share each matrix."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        given: list[Tensor | None] = [None] * size
        self.members = [Member(rank, given, self._barrier) for rank in range(size)]

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What work(rank) gives on each; when one fails, the others do not wait for it."""

        @torch.inference_mode()
        def on_thread(rank: int) -> T:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.members)) as threads:
            futures = [threads.submit(on_thread, rank) for rank in range(len(self.members))]
            errors = [error for future in futures if (error := future.exception())]
            for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
                raise error
            return [future.result() for future in futures]


class SharedModel:
    """A folder's model over tensor · pipeline ranks, which reads one sequence."""

    def __init__(
        self,
        path: Path,
        tensor: int,
        pipeline: int = 1,
        dtype: torch.dtype = torch.float32,
        quantization: str = "none",
    ) -> None:
        self.tensor, self.groups = tensor, [Group(tensor) for _ in range(pipeline)]
        self.models = [
            [
                load_model(
                    *opened(path), CPU, dtype, quantization=quantization,
                    shard=Shard(member.rank, tensor, stage, pipeline), collectives=member,
                )
                for member in group.members
            ]
            for stage, group in enumerate(self.groups)
        ]  # fmt: skip
        self._slots = 0
        self._caches: list[list[KVCache]] = []
        self._done = 0

    def start(self, slots: int) -> None:
        """A new sequence of at most `slots` tokens."""
        dtype = self.models[0][0].dtype
        self._caches = [[model.new_kv_cache(slots, dtype) for model in stage] for stage in self.models]
        self._slots, self._done = slots, 0

    def read(self, ids: list[int]) -> Tensor:
        """Logits [tokens, vocabulary] of the sequence's next tokens."""
        batch = make_batch([(0, len(ids))], [self._done], [list(range(self._slots))], 1, CPU)
        positions = torch.arange(self._done, self._done + len(ids))
        self._done += len(ids)
        stream: Tensor | None = None
        for stage, group in enumerate(self.groups):

            def forward(rank: int, stage: int = stage, before: Tensor | None = stream) -> Tensor:
                model, cache = self.models[stage][rank], self._caches[stage][rank]
                return model.forward(torch.tensor(ids), positions, batch, cache, before)

            streams = group.run(forward)
            assert all(torch.equal(each, streams[0]) for each in streams)
            stream = streams[0]
        hidden = stream
        assert hidden is not None
        logits, *others = self.groups[-1].run(lambda rank: self.models[-1][rank].logits(hidden))
        assert logits is not None
        assert others == [None] * (self.tensor - 1)
        return logits

    def logits(self, ids: list[int], chunks: list[int]) -> Tensor:
        """Those of a whole sequence, read in chunks of the given sizes."""
        self.start(len(ids))
        ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
        return torch.cat([self.read(ids[end - size : end]) for end, size in zip(ends, chunks, strict=True)])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The next ids."""
        self.start(len(prompt) + count)
        logits, found = self.read(prompt)[-1], []
        for _ in range(count):
            found.append(int(logits.argmax()))
            logits = self.read(found[-1:])[-1]
        return found
