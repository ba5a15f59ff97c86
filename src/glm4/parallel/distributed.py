"""Collectives over torch.distributed: sockets (gloo), or what connects cards (nccl, hccl)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from glm4.errors import EngineError
from glm4.parallel.shared_memory import SLICE, late_message

_GRACE = 1.0
"""Seconds that `check` gets to name the rank whose loss broke a connection: it may learn of it a little later."""


class Distributed:
    """A process group of torch.distributed; see Collectives for what each function does.

    On cards the functions only queue work, as everything there: the card's stream waits for the others, and the time
    limit is the process group's own.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        names: Sequence[str],
        timeout: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`group`, with the ranks' names in errors. `check` and `timeout` are those of SharedMemory."""
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._timeout, self._check = group, timeout, check
        self._others = [name for rank, name in enumerate(names) if rank != self.rank]
        self._queued = dist.get_backend(group) != "gloo"

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.to(torch.float32).contiguous()
        self._finish(dist.all_reduce(total, group=self._group, async_op=True))
        return total.to(x.dtype)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        # Backends differ in what the largest of a NaN and a number is.
        all_x = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self._finish(dist.all_gather(all_x, x.contiguous(), group=self._group, async_op=True))
        return torch.stack(all_x).amax(0)

    def gather(self, x: Tensor) -> Tensor | None:
        x = x.contiguous()
        all_x = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        self._finish(dist.gather(x, all_x, group=self._group, group_dst=0, async_op=True))
        return None if all_x is None else torch.cat(all_x, dim=1)

    def _finish(self, work: dist.Work | None) -> None:
        assert work is not None  # this process belongs to the group
        if self._queued:
            work.wait()
            return
        deadline = time.monotonic() + self._timeout
        while not work.is_completed():
            try:
                work.wait(timedelta(seconds=min(SLICE, self._timeout)))
            except RuntimeError:  # not yet, or broken: the wait below tells
                self._check()
                if time.monotonic() >= deadline:
                    raise EngineError(late_message([" or ".join(self._others)], self._timeout)) from None
        try:
            work.wait()
        except RuntimeError as error:
            self._wait_for_reason()
            reason = str(error).splitlines()[0]
            raise EngineError(f"the connection to {' or '.join(self._others)} broke: {reason}") from error

    def _wait_for_reason(self) -> None:
        end = time.monotonic() + _GRACE
        while time.monotonic() < end:
            self._check()
            time.sleep(SLICE)

    def close(self) -> None:
        dist.destroy_process_group(self._group)
