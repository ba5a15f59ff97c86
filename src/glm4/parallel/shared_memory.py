"""Collectives of processes on one machine's CPU: they map the same memory, and native code adds it up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glm4.errors import EngineError
from glm4.ops.cpu import library

_DONE, _NOT_YET, _MIXED_UP = 0, 1, 2  # Glm4Progress
_SUMS = {torch.float32: 0, torch.bfloat16: 1}  # Glm4Reduction
_MAX = 2
SLICE = 0.1
"""Seconds that a wait lasts before this process looks up: for Ctrl-C, lost ranks and its time limit."""


def create_segment(size: int) -> int:
    """The descriptor of a file for `size` ranks, to be mapped by each of them.

    It has no name in any folder, so it vanishes with the last process that has it open or mapped, however that ends.
    Others of the same user open it as /proc/PID/fd/DESCRIPTOR while this process keeps it open.

    Raises OSError where the system has no such files or no memory, or for more than 64 ranks.
    """
    file = os.memfd_create("glm4-collectives")
    try:
        os.posix_fallocate(file, 0, library.need().glm4_group_bytes(size))
    except OSError:
        os.close(file)
        raise
    return file


class SharedMemory:
    """A group of processes that map one file; see Collectives for what each function does."""

    def __init__(
        self, file: int, rank: int, names: Sequence[str], timeout: float, check: Callable[[], None] = lambda: None
    ) -> None:
        """Rank `rank` of a group that maps `file`, a descriptor from create_segment, which may be closed afterwards.

        `names` are the ranks' names in errors, one each. `check` is called every 0.1 s of waiting, and raises
        EngineError when it knows that a rank is lost; after `timeout` seconds of waiting the group raises one itself,
        and this constructor where the file cannot be mapped.
        """
        self.rank, self.size = rank, len(names)
        self._names, self._timeout, self._check = names, timeout, check
        self._library = library.need()
        self._group = self._library.glm4_group_open(file, self.size, rank)
        if self._group is None:
            raise EngineError(f"{names[rank]} cannot map the memory that it shares: raise its memory limit (ulimit -v)")
        self._under_way = False

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype not in _SUMS:
            raise TypeError(f"all_reduce adds up float32 and bfloat16, not {x.dtype}")
        return self._reduce(x, _SUMS[x.dtype])

    def all_reduce_max(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError(f"all_reduce_max compares float32, not {x.dtype}")
        return self._reduce(x, _MAX)

    def _reduce(self, x: Tensor, reduction: int) -> Tensor:
        x = x.contiguous()
        pointer, count = x.data_ptr(), x.numel()
        self._finish(lambda patience: self._library.glm4_all_reduce(self._group, pointer, count, reduction, patience))
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        x = x.contiguous()
        rows, columns = x.shape
        out = x.new_empty(rows, self.size * columns) if self.rank == 0 else None
        row_bytes = columns * x.element_size()
        pointers = x.data_ptr(), rows, row_bytes, 0 if out is None else out.data_ptr()
        self._finish(lambda patience: self._library.glm4_gather(self._group, *pointers, patience))
        return out

    def _finish(self, call: Callable[[int], int]) -> None:
        """Make a call again and again until it is done."""
        if self._under_way:
            raise EngineError("an earlier step of this group was cut off: start its ranks again")
        self._under_way = True  # and so it stays where an exception leaves this function
        patience = int(min(SLICE, self._timeout) * 1e9)
        deadline = time.monotonic() + self._timeout
        while (progress := call(patience)) == _NOT_YET:
            self._check()
            if time.monotonic() >= deadline:
                missing = self._library.glm4_group_missing(self._group)
                late = [name for rank, name in enumerate(self._names) if missing >> rank & 1]
                raise EngineError(late_message(late, self._timeout))
        if progress == _MIXED_UP:
            raise EngineError(f"{', '.join(self._names)} compute different things: start them with the same options")
        self._under_way = False

    def close(self) -> None:
        if self._group is not None:
            self._library.glm4_group_close(self._group)
        self._group = None
        self._under_way = True


def late_message(names: Sequence[str], timeout: float) -> str:
    """What to tell when ranks did not come within the time limit."""
    has = "has" if len(names) == 1 else "have"
    return f"{', '.join(names)} {has} not answered for {timeout:g} s: look at the log there; rank_timeout allows more"
