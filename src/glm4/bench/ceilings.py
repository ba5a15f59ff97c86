"""What the machine could do at best, measured, and what a step of the model needs of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from glm4 import device as devices
from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.utils import tensor_specs
from glm4.ops.cpu import library
from glm4.ops.cpu.memory import huge_page_tensor
from glm4.options import EngineOptions
from glm4.quantization.layout import Layout

_BUFFER_BYTES = 512 * 2**20
"""More than the last-level caches of most machines hold."""
_ROUNDS = 5
_ENOUGH_SECONDS = 0.05
"""A matrix product that takes this long is large enough to reach the top speed."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The fastest that this machine was seen to read memory and to multiply matrices, with all its threads."""

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What the model's weights ask for."""

    bytes_per_step: int
    """Weights that a step reads at least once; of an untied embedding it reads a few rows only."""
    flop_per_token: int
    """Two for each weight of the layers' matrices; the output head works on a prompt's last token alone."""

    @classmethod
    def of(cls, config: Glm4Config, dtype: torch.dtype, layouts: Mapping[str, Layout] | None = None) -> Work:
        """The work of a model of this shape with weights in `dtype`, but for those that are held as `layouts` says."""
        held = layouts or {}
        specs = list(tensor_specs(config))
        read = [s for s in specs if config.tie_word_embeddings or s.name != "model.embed_tokens.weight"]
        matrices = [s for s in specs if s.name.startswith("model.layers.") and len(s.shape) == 2]
        sizes = (held[s.name].nbytes(s.shape) if s.name in held else s.numel * dtype.itemsize for s in read)
        return cls(sum(sizes), 2 * sum(s.numel for s in matrices))


def measure_ceilings(options: EngineOptions) -> Ceilings:
    """Measure where `options` would run, before the model takes the memory. Raises what `LLM` raises for them."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    library.set_threads(torch.get_num_threads())
    checkpoint = Checkpoint.open(ModelFolder.open(options.model))
    device = devices.select_device(options.device, options.device_id)
    dtype = devices.select_dtype(options.dtype, checkpoint.info("model.embed_tokens.weight").dtype, device)
    return Ceilings(read_speed(device), multiply_speed(device, dtype))


def read_speed(device: torch.device) -> float:
    """Bytes a second of a plain read of a large buffer: by the native kernels where a CPU has them, else a sum."""
    if device.type == "cpu" and (kernels := library.load()):
        memory = huge_page_tensor((_BUFFER_BYTES,), torch.uint8).fill_(1)
        return _BUFFER_BYTES / _fastest(lambda: kernels.glm4_read_stream(memory.data_ptr(), _BUFFER_BYTES), device)
    buffer = torch.ones(_BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    return _BUFFER_BYTES / _fastest(buffer.sum, device)


def multiply_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of two square matrices, doubled in size until it takes long."""
    size, seconds = 512, 0.0
    while seconds < _ENOUGH_SECONDS:
        size *= 2
        seconds = _fastest(partial(torch.mm, *torch.ones(2, size, size, dtype=dtype, device=device)), device)
    return 2 * size**3 / seconds


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several rounds; slower ones were disturbed."""
    work()
    times = []
    for _ in range(_ROUNDS):
        devices.synchronize(device)
        started = time.perf_counter()
        work()
        devices.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
