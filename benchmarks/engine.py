"""What the engine costs beside the model, how evenly answers flow, and whether memory stays flat.

    python benchmarks/engine.py overhead --model DIR      share of a decode step that is not the model's forward
    python benchmarks/engine.py stall --model DIR         time between tokens while a long prompt comes in
    python benchmarks/engine.py memory --model DIR        resident set after 200 and after 2,000 requests

Each prints a table and, last, one JSON line. A folder of random weights will do.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from glm4 import LLM, SamplingParams
from glm4.bench.run import percentile

Json = dict[str, Any]


class Stopwatch:
    """Adds up the seconds spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - started
            return result

        return timed


@contextmanager
def timing_the_model(llm: LLM) -> Iterator[Stopwatch]:
    watch = Stopwatch()
    model: Any = llm.model
    names = ("forward", "logits")
    for name in names:
        setattr(model, name, watch.around(getattr(model, name)))
    yield watch
    for name in names:
        delattr(model, name)


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 100_000), k=length)


def overhead(llm: LLM, args: argparse.Namespace) -> Json:
    """Steps in which `batch` answers grow by one token each."""
    found: Json = {}
    for batch in (1, 8):
        shares, steps = [], []
        for round in range(args.rounds):
            sampling = SamplingParams(do_sample=False, ignore_eos=True, max_new_tokens=args.steps + 4)
            for i in range(batch):
                llm.engine.add(prompt(32, 100 * round + i), sampling)
            for _ in range(3):
                llm.engine.step()
            with timing_the_model(llm) as watch:
                started = time.perf_counter()
                for _ in range(args.steps):
                    llm.engine.step()
                seconds = time.perf_counter() - started
            while llm.engine.has_work:
                llm.engine.step()
            shares.append(1 - watch.seconds / seconds)
            steps.append(seconds / args.steps)
        found[f"batch_{batch}"] = {"step_ms": 1000 * median(steps), "engine_share": median(shares)}
        print(f"batch {batch}: {1000 * median(steps):.1f} ms a step, {median(shares):.2%} of it not the model's")
    return found


def stall(llm: LLM, args: argparse.Namespace) -> Json:
    """Eight answers, then the same while a long prompt comes in."""

    def gaps(long: int) -> list[float]:
        sampling = SamplingParams(do_sample=False, ignore_eos=True, max_new_tokens=args.steps)
        ids = [llm.engine.add(prompt(32, i), sampling) for i in range(8)]
        for _ in range(4):
            llm.engine.step()
        if long:
            llm.engine.add(prompt(long, 99), SamplingParams(max_new_tokens=1, do_sample=False))
        last: dict[int, float] = {}
        found = []
        while any(i in llm.engine._answers for i in ids):
            outputs, now = llm.engine.step(), time.perf_counter()
            for output in outputs:
                if output.request_id in ids:
                    found += [now - last[output.request_id]] if output.request_id in last else []
                    last[output.request_id] = now
        llm.engine.abort(*llm.engine._answers)
        return found

    rows = []
    for _ in range(args.rounds):
        alone, beside = gaps(0), gaps(args.long)
        rows.append([percentile(alone, 50), percentile(alone, 99), percentile(beside, 50), percentile(beside, 99)])
    middle = [median(column) for column in zip(*rows, strict=True)]
    ratio = median([row[3] / row[1] for row in rows])
    print(f"without: p50 {middle[0]:.3f} s, p99 {middle[1]:.3f} s; with {args.long} tokens coming in: "
          f"p50 {middle[2]:.3f} s, p99 {middle[3]:.3f} s; p99 {ratio:.2f} times")  # fmt: skip
    return dict(zip(("p50", "p99", "p50_beside", "p99_beside"), middle, strict=True)) | {"p99_ratio": ratio}


def memory(llm: LLM, args: argparse.Namespace) -> Json:
    """Requests of all kinds, in batches; the resident set at two points."""
    rounds = {200: 0, 2000: 0}
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    kinds = [
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.9, logprobs=3),
        SamplingParams(max_new_tokens=16, json_schema=schema),
        SamplingParams(max_new_tokens=8, num_beams=3),
        SamplingParams(max_new_tokens=12, n=2, temperature=1.0),
    ]
    done = 0
    while done < max(rounds):
        batch = [prompt(random.Random(done + i).randrange(4, 200), done + i) for i in range(20)]
        batch = [[token % llm.tokenizer.vocab_size for token in each] for each in batch]
        llm.generate(batch, kinds[done // 20 % len(kinds)], progress=False)
        done += 20
        if done in rounds:
            gc.collect()
            rounds[done] = resident_bytes()
            print(f"after {done} requests: {rounds[done] / 2**20:.1f} MiB")
    growth = rounds[2000] / rounds[200] - 1
    print(f"growth {growth:.2%}")
    return {"rss_200": rounds[200], "rss_2000": rounds[2000], "growth": growth}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "stall", "memory"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="tokens of each answer")
    parser.add_argument("--long", type=int, default=30_000, help="tokens of the long prompt")
    parser.add_argument("--stretch", type=float, default=None, help="step_stretch of the engine")
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-device-memory", help="memory: little, or the KV cache itself is first written for long")
    args = parser.parse_args()
    limits = {"max_batch_tokens": args.max_batch_tokens, "max_device_memory": args.max_device_memory}
    llm = LLM(args.model, step_stretch=args.stretch, **limits)
    found = {"overhead": overhead, "stall": stall, "memory": memory}[args.what](llm, args)
    print(json.dumps({"what": args.what} | found))


if __name__ == "__main__":
    main()
