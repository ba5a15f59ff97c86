"""Where copies of a model run: what each takes of one machine, and how many there are in a cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from glm4.errors import OptionError
from glm4.options import EngineOptions


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas there may be in a cluster; more than the least only while there is work for them."""

    min_replicas: int
    max_replicas: int

    @classmethod
    def of(cls, options: EngineOptions, min_replicas: int | None, max_replicas: int | None) -> Scale:
        """What is not said is as many as data_parallel says. Raises OptionError."""
        least = min_replicas if min_replicas is not None else min(options.data_parallel, max_replicas or 1 << 30)
        most = max_replicas if max_replicas is not None else max(options.data_parallel, least)
        if not 1 <= least <= most:
            raise OptionError(f"min_replicas {least} and max_replicas {most}: give 1 or more, in this order")
        return cls(least, most)


def num_cards(options: EngineOptions) -> int:
    """Cards, or processes, that one copy of the model takes."""
    return options.tensor_parallel * options.pipeline_parallel


def replica_options(options: EngineOptions) -> list[EngineOptions]:
    """The options of each of `data_parallel` copies on this machine.

    Each has cards of its own, from `device_id` on. On a CPU they share the cores and the memory: all threads and all
    of max_device_memory are divided, where nothing else is said for the threads of each.
    """
    copies = options.data_parallel
    one = replace(options, data_parallel=1)
    if copies == 1:
        return [one]
    if not _on_cpu(options):
        return [replace(one, device_id=options.device_id + i * num_cards(options)) for i in range(copies)]
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // (copies * num_cards(options)))
    allowed = 1.0 if options.max_device_memory is None else options.max_device_memory
    share = allowed // copies if isinstance(allowed, int) else allowed / copies
    return [replace(one, threads=threads, max_device_memory=share)] * copies


def _on_cpu(options: EngineOptions) -> bool:
    if options.device != "auto" or options.backend != "torch":
        return options.device == "cpu"
    from glm4.device import available_devices

    return available_devices()[0] == "cpu"
