"""What the ranks that share each matrix compute together: sums, largest numbers, and rows put side by side."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from glm4.errors import EngineError
from glm4.ops.cpu import library
from glm4.parallel.distributed import Distributed
from glm4.parallel.shared_memory import SharedMemory, create_segment, late_message
from glm4.parallel.world import Place

__all__ = ["Alone", "Collectives", "Distributed", "SharedMemory", "make_collectives"]

_POLL = 0.005  # seconds


class Collectives(Protocol):
    """Over the ranks that share each matrix. Every rank calls the same functions in the same order with like shapes.

    Each function raises EngineError, naming the ranks, when others do not come within the time limit or are lost. From
    then on the group is of no use.
    """

    @property
    def rank(self) -> int:
        """This process's place in the group, from 0."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of x, float32 or bfloat16: same shape and dtype, and the same bits on every rank.

        Added up in float32 and rounded once. May write into x.
        """

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The largest over ranks of each number of x, float32; NaN where any rank has NaN. May write into x."""

    def gather(self, x: Tensor) -> Tensor | None:
        """The x [rows, n] of all ranks side by side in rank order: [rows, size * n] on rank 0, None elsewhere."""

    def close(self) -> None:
        """Give back what the group holds; nothing else may be called afterwards."""


class Alone:
    """A group of one rank: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        return x

    def close(self) -> None:
        pass


ALONE = Alone()


def make_collectives(
    place: Place,
    device: torch.device,
    store: Store,
    timeout: float,
    check: Callable[[], None] = lambda: None,
    open_group: Callable[[], None] = lambda: None,
) -> Collectives:
    """The collectives of this process's tensor group; every rank of it calls this.

    Through shared memory where all of them run on one machine's CPU and have the native kernels, through
    torch.distributed elsewhere: then `open_group` is called first, after which the default process group is there, and
    `device` is this rank's own. `store` reaches all ranks. `check` is called every 0.1 s of waiting and raises
    EngineError for a rank that it knows is lost.

    Raises EngineError when a rank does not come within `timeout` seconds, or is lost.
    """
    ranks = place.tensor_ranks
    if len(ranks) == 1:
        return ALONE
    meeting = _Meeting(PrefixStore(f"glm4/collectives/{ranks[0]}", store), place, timeout, check)
    near = sys.platform == "linux" and device.type == "cpu" and set(ranks) <= set(place.machine_ranks)
    if shared := _share_memory(meeting, near and library.load() is not None):
        return shared
    open_group()
    group = dist.new_group(
        ranks,
        timeout=timedelta(seconds=timeout),
        backend=dist.get_default_backend_for_device(device),
        use_local_synchronization=True,  # the other tensor groups make their own choice
    )
    return Distributed(group, meeting.names(), timeout, check)


class _Meeting:
    """What the ranks of a tensor group tell each other before there are collectives."""

    def __init__(self, store: Store, place: Place, timeout: float, check: Callable[[], None]) -> None:
        self.rank, self.ranks = place.tensor_rank, place.tensor_ranks
        self.timeout, self.check = timeout, check
        self._store = store
        self.tell("pid", str(os.getpid()))

    def tell(self, topic: str, word: str) -> None:
        try:
            self._store.set(f"{topic}/{self.rank}", word)
        except RuntimeError as error:
            raise self._unreachable(error) from error

    def hear(self, topic: str, rank: int) -> str:
        """What another rank told of a topic."""
        key = f"{topic}/{rank}"
        deadline = time.monotonic() + self.timeout
        try:
            while not self._store.check([key]):
                self.check()
                if time.monotonic() >= deadline:
                    raise EngineError(late_message([f"rank {self.ranks[rank]}"], self.timeout))
                time.sleep(_POLL)
            return str(self._store.get(key), "utf-8")
        except RuntimeError as error:
            self.check()
            raise self._unreachable(error) from error

    def hear_all(self, topic: str) -> list[str]:
        return [self.hear(topic, rank) for rank in range(len(self.ranks))]

    def names(self) -> list[str]:
        return [f"rank {rank} (pid {pid})" for rank, pid in zip(self.ranks, self.hear_all("pid"), strict=True)]

    def _unreachable(self, error: RuntimeError) -> EngineError:
        return EngineError(f"rank {self.ranks[self.rank]} lost the store of the ranks: {str(error).splitlines()[0]}")


def _share_memory(meeting: _Meeting, near: bool) -> SharedMemory | None:
    """A group through shared memory, or None on every rank when one of them cannot have it."""
    file, shared = _open_segment(meeting, near), None
    try:
        if file is not None:
            shared = SharedMemory(file, meeting.rank, meeting.names(), meeting.timeout, meeting.check)
        meeting.tell("attached", "yes" if shared else "no")
        everywhere = all(word == "yes" for word in meeting.hear_all("attached"))  # until then the file must be open
    finally:
        if file is not None:
            os.close(file)
    if shared is not None and not everywhere:
        shared.close()
        return None
    return shared


def _open_segment(meeting: _Meeting, near: bool) -> int | None:
    """The descriptor of the memory that the first rank makes; None when it cannot, or this rank cannot reach it."""
    if meeting.rank == 0:
        try:
            file = create_segment(len(meeting.ranks)) if near else None
        except OSError:
            file = None
        meeting.tell("segment", "" if file is None else f"/proc/{os.getpid()}/fd/{file}")
        return file
    path = meeting.hear("segment", 0)
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC) if path and near else None
    except OSError:  # in another container, for one
        return None
