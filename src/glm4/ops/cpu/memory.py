"""Tensors on huge pages, which spare a streaming read the cost of translating addresses."""

from __future__ import annotations

import ctypes
import math
import weakref

import torch
from torch import Tensor

from glm4.ops.cpu.library import load


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
    buffer = (ctypes.c_char * size).from_address(address)
    # The tensor's storage keeps `buffer` alive. Not at exit: a thread that still computes would lose its numbers.
    weakref.finalize(buffer, library.glm4_free, address, size).atexit = False
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
