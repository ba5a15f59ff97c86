"""Processes that each hold one end of a group of collectives, and do what a test tells them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glm4.errors import EngineError
from glm4.parallel.collectives import make_collectives
from glm4.parallel.world import Degrees, Place

PATIENCE = 60  # seconds until a test gives up on a process
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0, 1e-40, 3e38)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["glm4.parallel.collectives"])  # torch is imported once for all of them


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """What a rank brings: numbers of very different sizes and, under odd seeds, some that are no ordinary ones."""
    numbers = torch.Generator().manual_seed(seed * 64 + rank)
    x = torch.randn(shape, generator=numbers) * 10.0 ** torch.randint(-4, 5, shape, generator=numbers)
    if seed % 2:
        chosen = torch.rand(shape, generator=numbers) < 0.02
        x[chosen] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=numbers)][chosen]
    return x.to(dtype)


@dataclass(frozen=True)
class Setting:
    """How a group is made. `near`: all on one machine; `missing_library`: the ranks without native kernels."""

    size: int
    near: bool = True
    timeout: float = PATIENCE
    missing_library: tuple[int, ...] = ()


def _serve(rank: int, setting: Setting, folder: str, orders: Connection) -> None:
    """One rank: makes its collectives and does what (task, arguments) say."""
    torch.set_num_threads(1)
    if rank in setting.missing_library:
        os.environ["GLM4_CPU_LIBRARY"] = "/nowhere"
    lost = Path(folder) / "lost"

    def check() -> None:
        if lost.exists():
            raise EngineError(lost.read_text())

    store = dist.FileStore(f"{folder}/store", setting.size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=setting.size, timeout=timedelta(seconds=PATIENCE)
    )
    local = (rank, setting.size) if setting.near else (0, 1)
    place = Place(rank, setting.size, *local, Degrees(tensor=setting.size))
    collectives = make_collectives(place, torch.device("cpu"), store, setting.timeout, check)

    def call(method: str, *arguments: Any) -> bytes | None:
        result = getattr(collectives, method)(part(rank, *arguments))
        return None if result is None else bytes(result.contiguous().view(torch.uint8).numpy())

    def call_forever(method: str, *arguments: Any) -> None:
        while True:
            call(method, *arguments)

    def holds() -> tuple[bool, bool]:
        files = []
        for file in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that of the listing itself
                files.append(str(file.readlink()))
        name = "glm4-collectives"
        return name in Path("/proc/self/maps").read_text(), any(name in file for file in files)

    tasks = {
        "kind": lambda: type(collectives).__name__,
        "call": call,
        "call_forever": call_forever,
        "holds": holds,
        "close": collectives.close,
    }
    orders.send("ready")
    while True:
        task, *arguments = orders.recv()
        try:
            orders.send(tasks[task](*arguments))
        except EngineError as error:
            orders.send(error)


class Ranks:
    """A group of such processes, seen from the test."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting = setting
        self.processes: list[BaseProcess] = []
        self._orders: list[Connection] = []
        for rank in range(setting.size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, setting, str(folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._orders.append(ours)
        assert [self.answer(rank) for rank in range(setting.size)] == ["ready"] * setting.size

    def tell(self, rank: int, *order: Any) -> None:
        self._orders[rank].send(order)

    def answer(self, rank: int) -> Any:
        assert self._orders[rank].poll(PATIENCE), f"rank {rank} says nothing"
        return self._orders[rank].recv()

    def all_do(self, *order: Any) -> list[Any]:
        """What each rank answers to an order given to all."""
        for rank in range(self.setting.size):
            self.tell(rank, *order)
        return [self.answer(rank) for rank in range(self.setting.size)]

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
