"""How long an all-reduce takes between processes of this machine: shared memory and gloo in turn.

    python benchmarks/collectives.py [--ranks 2] [--rounds 50]

bfloat16. Each round does some all-reduces of each kind one after another, as the layers of a step do, and counts as
long as its slowest rank takes, divided by their number; medians of the rounds, and the tenth and ninetieth percentile.
"""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from glm4.parallel.collectives import Collectives, Distributed, make_collectives
from glm4.parallel.world import Degrees, Place

SIZES = (1 << 10, 8 << 10, 64 << 10, 1 << 20, 16 << 20)


def seconds(collectives: Collectives, x: torch.Tensor, repeats: int) -> float:
    collectives.all_reduce_max(torch.zeros(1))  # all start together
    start = time.perf_counter()
    for _ in range(repeats):
        collectives.all_reduce(x)
    return (time.perf_counter() - start) / repeats


def measure(rank: int, ranks: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    place = Place(rank, ranks, rank, ranks, Degrees(tensor=ranks))
    names = [f"rank {other}" for other in range(ranks)]
    kinds = {
        "shared memory": make_collectives(place, torch.device("cpu"), store, 60.0),
        "gloo": Distributed(dist.new_group(list(range(ranks))), names, 60.0),
    }
    if rank == 0:
        print(f"{type(kinds['shared memory']).__name__} and gloo, {ranks} ranks, {os.cpu_count()} cores\n")
        print("| bytes | kind | median µs | 10 % | 90 % |\n| --- | --- | --- | --- | --- |")
    for size in SIZES:
        x = torch.ones(size // 2, dtype=torch.bfloat16)
        repeats = max(1, min(20, (1 << 20) // size))
        times = torch.tensor([[seconds(kind, x.zero_(), repeats) for kind in kinds.values()] for _ in range(rounds)])
        slowest = kinds["shared memory"].all_reduce_max(times)
        for kind, column in zip(kinds, slowest.unbind(1), strict=True):
            low, middle, high = (column * 1e6).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            if rank == 0:
                print(f"| {size:,} | {kind} | {middle:.0f} | {low:.0f} | {high:.0f} |")
    kinds["shared memory"].close()
    dist.destroy_process_group()


@click.command(help=__doc__)
@click.option("--ranks", default=2, show_default=True)
@click.option("--rounds", default=50, show_default=True)
def main(ranks: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (ranks, rounds, str(Path(folder))), nprocs=ranks)


if __name__ == "__main__":
    main()
