"""Tensors on huge pages, which spare a streaming read the cost of translating addresses."""

from __future__ import annotations

import ctypes
import math
import weakref

import torch
from torch import Tensor

from glm4.ops.cpu.library import load, need

_CACHE_LINE = 64


class Arena:
    """Memory on huge pages, taken in pieces of any size: one page may hold the end of one weight and the next's start.

    It is reserved in large chunks, of which only what is written to takes memory. A chunk goes back with the last
    piece of it.
    """

    def __init__(self, chunk_bytes: int = 1 << 28) -> None:
        self._chunk_bytes = chunk_bytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """uint8 [size] of zeros that begins on a cache line. Raises MemoryError where there is no room."""
        rounded = -(-size // _CACHE_LINE) * _CACHE_LINE
        if rounded > self._chunk_bytes // 2:
            return huge_page_tensor((size,), torch.uint8)
        if rounded > len(self._free):
            self._free = huge_page_tensor((self._chunk_bytes,), torch.uint8)
        piece, self._free = self._free[:size], self._free[rounded:]
        return piece


def map_in(tensor: Tensor) -> None:
    """Have a contiguous tensor's memory at hand, read from the disk at once where it is a mapped file."""
    need().glm4_map_in(tensor.data_ptr(), tensor.nbytes)


def huge_page_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, on huge pages where the system grants them; an ordinary one where there are no kernels.

    Raises MemoryError where there is no room.
    """
    library, size = load(), math.prod(shape) * dtype.itemsize
    if library is None or size == 0:
        return torch.zeros(shape, dtype=dtype)
    address = library.glm4_allocate(size)
    if address is None:
        raise MemoryError(f"no {size} bytes for a tensor of {list(shape)}")
    if library.glm4_memory_nodes() > 1:
        library.glm4_spread(address, size)
    buffer = (ctypes.c_char * size).from_address(address)
    # The tensor's storage keeps `buffer` alive. Not at exit: a thread that still computes would lose its numbers.
    weakref.finalize(buffer, library.glm4_free, address, size).atexit = False
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
