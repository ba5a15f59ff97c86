"""An hour of real conversations on a runner that only counts: everything is served, in order, and nothing leaks."""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path

from glm4.engine.kv_cache import BlockPool
from glm4.engine.request import Request
from glm4.engine.scheduler import Scheduler
from glm4.engine.step import RequestResult, StepPlan, StepResult
from glm4.options import GREEDY

STEP_SECONDS, TOKEN_SECONDS = 0.02, 0.0002
"""What a step, and each token in it, takes on the imagined card."""


def read_trace(file: Path) -> list[tuple[float, int, int]]:
    """(seconds since the first, prompt tokens, answer tokens) of each request."""
    with file.open() as lines:
        rows = [
            (datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(), row["ContextTokens"], row["GeneratedTokens"])
            for row in csv.DictReader(lines)
        ]
    return [(time - rows[0][0], max(1, int(prompt)), max(1, int(answer))) for time, prompt, answer in rows]


def count_only(plan: StepPlan) -> StepResult:
    return StepResult({step.request_id: RequestResult([7]) for step in plan.requests if step.logits_at})


def test_an_hour_of_conversations_under_overload(shared: Path) -> None:
    """About one and a half times what the card can do, and a cache for a few dozen requests."""
    trace = read_trace(shared / "data" / "AzureLLMInferenceTrace_conv.csv")
    pool = BlockPool(4000, 16)
    scheduler = Scheduler(pool, max_batch_tokens=2048, max_batch_requests=128)
    requests = [
        Request(number, [number % 1000 + 8] * prompt, prompt, GREEDY, prompt + answer)
        for number, (_, prompt, answer) in enumerate(trace)
    ]
    clock, arrived, first_token = 0.0, 0, {}
    longest_queue = 0
    while arrived < len(trace) or scheduler.has_work:
        if not scheduler.has_work:
            clock = max(clock, trace[arrived][0])
        while arrived < len(trace) and trace[arrived][0] <= clock:
            scheduler.add(requests[arrived])
            arrived += 1
        plan = scheduler.plan()
        tokens = sum(len(step.token_ids) for step in plan.requests)
        assert 0 < tokens <= 2048
        clock += STEP_SECONDS + TOKEN_SECONDS * tokens
        for request in scheduler.update(plan, count_only(plan)):
            first_token.setdefault(request.request_id, clock)
        longest_queue = max(longest_queue, len(scheduler.waiting))
    assert all(request.finish_reason == "length" for request in requests)
    assert longest_queue > 500, "the card kept up: nothing was tested"
    assert scheduler.stats.preemptions > 0
    assert pool.num_free == pool.num_blocks
    times = [first_token[number] for number in range(len(trace))]
    assert times == sorted(times), "somebody was overtaken"
