"""Times requests on the engine: first token, token to token, end to end, and how near the machine's ceilings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glm4.bench.ceilings import Ceilings, Work
from glm4.bench.load import Job
from glm4.engine.engine import Engine
from glm4.engine.request import RequestOutput
from glm4.engine.stats import EngineStats
from glm4.errors import EngineError
from glm4.options import SamplingParams

Json = dict[str, Any]


@dataclass(slots=True)
class RequestTimes:
    """When the tokens of one request came, in seconds on the run's clock."""

    arrival: float
    prompt_tokens: int
    new_tokens: int = 0
    first: float = math.nan
    last: float = math.nan
    gaps: list[float] = field(default_factory=list)
    """From one token to the next; several that come in one step share its time."""

    @property
    def time_to_first_token(self) -> float:
        """Waiting in the queue included."""
        return self.first - self.arrival

    @property
    def end_to_end(self) -> float:
        """From arrival to the last token."""
        return self.last - self.arrival

    def take(self, output: RequestOutput, now: float) -> None:
        """Count the tokens that `output` has beyond the last one."""
        count = len(output.token_ids) - self.new_tokens
        if count == 0:
            return
        if self.new_tokens == 0:
            self.first = now
        else:
            self.gaps += [(now - self.last) / count] * count
        self.last, self.new_tokens = now, self.new_tokens + count


@dataclass(slots=True)
class Run:
    """What driving the engine showed."""

    requests: list[RequestTimes]
    """In the order of the jobs."""
    stats: EngineStats
    seconds: float = 0.0
    decode_steps: int = 0
    """Steps that computed no prompt token."""


def drive(
    engine: Engine,
    jobs: Sequence[Job],
    prompts: Sequence[list[int]],
    on_finish: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Run:
    """Serve every job, each not before it arrives, until its last token; `on_finish` is called for each.

    jobs: in the order of their arrival; clock, sleep: seconds. Raises what Engine.add raises, and EngineError for a
    request that fails.
    """
    run = Run([RequestTimes(job.arrival, job.prompt_tokens) for job in jobs], EngineStats())
    engine.stats, waiting, times = run.stats, list(range(len(jobs)))[::-1], {}
    started = clock()
    try:
        while waiting or engine.has_work:
            while waiting and jobs[waiting[-1]].arrival <= clock() - started:
                index = waiting.pop()
                sampling = SamplingParams(do_sample=False, max_new_tokens=jobs[index].new_tokens, ignore_eos=True)
                times[engine.add(prompts[index], sampling)] = run.requests[index]
            if not engine.has_work:
                sleep(max(0.0, jobs[waiting[-1]].arrival - (clock() - started)))
                continue
            decoded = run.stats.decode_tokens
            outputs, now = engine.step(), clock() - started
            run.decode_steps += run.stats.decode_tokens > decoded
            for output in outputs:
                if output.error is not None:
                    raise EngineError(output.error)
                times[output.request_id].take(output, now)
                if output.finish_reason is not None:
                    del times[output.request_id]
                    on_finish()
    finally:
        engine.abort(*times)
    run.seconds = clock() - started
    return run


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, between two of them in proportion (as numpy's default)."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(samples: Sequence[float]) -> Json | None:
    """Mean, median, percentiles and the largest of `samples`; None where there are none."""
    if not samples:
        return None
    return {
        "mean": sum(samples) / len(samples),
        "p50": percentile(samples, 50),
        "p90": percentile(samples, 90),
        "p99": percentile(samples, 99),
        "max": max(samples),
    }


def report(run: Run) -> Json:
    """Counts, rates and times of a run; times are in seconds."""
    prompt_tokens = sum(times.prompt_tokens for times in run.requests)
    new_tokens = sum(times.new_tokens for times in run.requests)
    return {
        "requests": len(run.requests),
        "seconds": run.seconds,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "requests_per_s": len(run.requests) / run.seconds,
        "prompt_tokens_per_s": prompt_tokens / run.seconds,
        "new_tokens_per_s": new_tokens / run.seconds,
        "ttft_s": summary([times.time_to_first_token for times in run.requests]),
        "inter_token_s": summary([gap for times in run.requests for gap in times.gaps]),
        "end_to_end_s": summary([times.end_to_end for times in run.requests]),
        "prefill_tokens_per_s": _rate(run.stats.prefill_tokens, run.stats.prefill_seconds),
        "decode_tokens_per_s": _rate(run.stats.decode_tokens, run.stats.decode_seconds),
    }


def shares(run: Run, work: Work, ceilings: Ceilings) -> Json:
    """How much of the machine's ceilings the run used: reading weights at decode, multiplying at prefill.

    Prompt tokens that were found in the cache are not computed and do not count.
    """
    read = _rate(work.bytes_per_step * run.decode_steps, run.stats.decode_seconds)
    computed = _rate(work.flop_per_token * run.stats.prefill_tokens, run.stats.prefill_seconds)
    return {
        "memory_bytes_per_s": ceilings.bytes_per_s,
        "decode_bytes_per_s": read,
        "decode_share_of_memory": None if read is None else read / ceilings.bytes_per_s,
        "matmul_flop_per_s": ceilings.flop_per_s,
        "prefill_flop_per_s": computed,
        "prefill_share_of_matmul": None if computed is None else computed / ceilings.flop_per_s,
    }


def joined(runs: Sequence[Run]) -> Run:
    """Several runs, one after the other, as one."""
    return Run(
        requests=[times for run in runs for times in run.requests],
        stats=sum((run.stats for run in runs), EngineStats()),
        seconds=sum(run.seconds for run in runs),
        decode_steps=sum(run.decode_steps for run in runs),
    )


def _rate(amount: int, seconds: float) -> float | None:
    return amount / seconds if amount and seconds else None
