"""One model over 1, 2, 4 … ranks of this machine: memory of each rank, start to first token, time of a step.

    python benchmarks/parallel.py MODEL --degrees 1 2 4 --rounds 3 [--cold]

Each round starts every degree in turn, in a process of its own, with the machine's cores shared out among its ranks;
with --cold after the system has forgotten what it had read of files (Linux, as root).
Private memory is what no file backs (RssAnon), at its highest while the ranks load and answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

PROMPT_TOKENS, STEPS = 64, 24
_SAMPLE_SECONDS = 0.02


def children(pid: int) -> list[int]:
    """This process's children that run."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


class PeakMemory:
    """The most private memory of this process and of each rank that it started, in bytes."""

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            for pid in (os.getpid(), *children(os.getpid())):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                if "RssAnon:" in status:
                    kilobytes = int(status.split("RssAnon:")[1].split()[0])
                    self.peaks[pid] = max(self.peaks.get(pid, 0), kilobytes * 1024)

    def stop(self) -> list[int]:
        self._stopped.set()
        self._thread.join()
        return sorted(self.peaks.values(), reverse=True)


def measure(model: str, degree: int, quantization: str) -> dict[str, Any]:
    """One start at one degree, in this process."""
    memory, started = PeakMemory(), time.perf_counter()
    from glm4 import LLM, SamplingParams

    llm = LLM(model, tensor_parallel=degree, quantization=quantization, max_model_len=1024, max_batch_requests=4)
    prompt = [100 + i for i in range(PROMPT_TOKENS)]
    times = [time.perf_counter() - started]
    answer = llm.stream(prompt, SamplingParams(max_new_tokens=STEPS + 1, ignore_eos=True))
    times.extend(time.perf_counter() - started for _ in answer)
    first, steps = times[1], [after - before for before, after in itertools.pairwise(times)]
    llm.close()
    return {"load": times[0], "first_token": first, "step": median(steps), "private": memory.stop()[:degree]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure(args.model, args.once, args.quantization)))
        return
    found: dict[int, list[dict[str, Any]]] = {degree: [] for degree in args.degrees}
    for _ in range(args.rounds):
        for degree in args.degrees:
            command = [sys.executable, __file__, args.model, "--once", str(degree), "--quantization", args.quantization]
            if args.cold:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("3")
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[degree].append(json.loads(ran.stdout.splitlines()[-1]))
    print("| ranks | load | start to first token | step | private memory of each rank, most |")
    print("| --- | --- | --- | --- | --- |")
    for degree, rounds in found.items():
        load, first, step = (median(each[name] for each in rounds) for name in ("load", "first_token", "step"))
        private = " ".join(f"{size / 2**30:.2f}" for size in rounds[-1]["private"])
        print(f"| {degree} | {load:.1f} s | {first:.1f} s | {1000 * step:.0f} ms | {private} GiB |")


if __name__ == "__main__":
    main()
