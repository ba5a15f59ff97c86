"""The pace of prompts beside answers, on machines whose speed is known exactly."""

from __future__ import annotations

import random

import pytest

from glm4.engine.kv_cache import BlockPool
from glm4.engine.pace import Pace
from glm4.engine.request import Request
from glm4.engine.scheduler import Scheduler
from glm4.engine.step import RequestResult, StepPlan, StepResult
from glm4.options import GREEDY


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("per_token", [0.0001, 0.001, 0.004])
@pytest.mark.parametrize("stretch", [1.5, 2.0, 4.0])
def test_it_finds_the_chunk_that_the_machine_can_take(stretch: float, per_token: float, noise: float) -> None:
    base, draw = 0.1, random.Random(0)
    pace = Pace(stretch)
    for _ in range(20):
        pace.learn(0, base * draw.uniform(1 - noise, 1 + noise))
    taken = []
    for _ in range(200):
        taken.append(pace.chunk)
        pace.learn(pace.chunk, (base + per_token * pace.chunk) * draw.uniform(1 - noise, 1 + noise))
    best = max(16, (stretch - 1) * base / per_token)
    late = sorted(taken[50:])
    assert all(chunk <= 1.5 * best for chunk in late)
    assert late[len(late) // 2] >= 0.4 * best


def test_it_follows_a_machine_that_becomes_slower() -> None:
    pace = Pace(2.0)
    chunks = []
    for step in range(400):
        slope = 0.001 if step < 200 else 0.004
        pace.learn(pace.chunk if step % 4 else 0, 0.1 + slope * (pace.chunk if step % 4 else 0))
        chunks.append(pace.chunk)
    assert 80 <= chunks[190] <= 110
    assert 16 <= chunks[390] <= 30


def test_a_plan_keeps_prompts_within_the_pace_and_answers_in_every_step() -> None:
    scheduler = Scheduler(BlockPool(200, 4), max_batch_tokens=64, max_batch_requests=8)
    prompts = {0: [1], 1: [1, 2], 2: [2] * 100, 3: [3] * 50}
    for number, prompt in prompts.items():
        scheduler.add(Request(number, prompt, len(prompt), GREEDY, len(prompt) + 40))
    for step in range(20):
        plan = scheduler.plan(10 if step else None)
        by_id = {each.request_id: len(each.token_ids) for each in plan.requests}
        if step:
            assert by_id[0] == by_id[1] == 1
            assert sum(count for count in by_id.values() if count > 1) <= 10
        scheduler.update(plan, _one_token_each(plan))
    assert len(scheduler.running) == 4, "the long prompts have got their turn"


def _one_token_each(plan: StepPlan) -> StepResult:
    return StepResult({step.request_id: RequestResult([7]) for step in plan.requests if step.logits_at})
