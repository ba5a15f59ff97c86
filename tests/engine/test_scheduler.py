"""The scheduler against a runner that keeps a KV memory of its own and checks every plan against it."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4.engine.kv_cache import BlockPool
from glm4.engine.request import Request
from glm4.engine.scheduler import Scheduler
from glm4.engine.step import PLAN_VERSION, RequestResult, RequestStep, StepPlan, StepResult
from glm4.errors import MemoryPlanError
from glm4.options import GREEDY, SamplingParams

STOP = 0


def next_token(context: list[int]) -> int:
    """A language model: the next token is a function of all tokens so far."""
    return random.Random(str(context)).randrange(12)  # STOP is one of them


def answer_alone(prompt: list[int], max_len: int) -> list[int]:
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] == STOP or len(tokens) == max_len:
            return tokens[len(prompt) :]


class CheckingRunner:
    """Writes tokens where a plan says and reads the whole context back, so that a wrong block shows."""

    def __init__(self, num_blocks: int, block_size: int, max_tokens: int) -> None:
        self.num_blocks, self.block_size, self.max_tokens = num_blocks, block_size, max_tokens
        self.memory: dict[int, tuple[int, ...]] = {}
        """What a token's keys and values depend on: itself and all tokens before it."""
        self.introduced: dict[int, list[int]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.version == PLAN_VERSION
        assert 0 < sum(len(step.token_ids) for step in plan.requests) <= self.max_tokens
        written = [self.slot(step, step.start + i) for step in plan.requests for i in range(len(step.token_ids))]
        assert len(written) == len(set(written)), "two requests write to one place"
        for source, target in plan.block_copies:
            for offset in range(self.block_size):
                self.memory[target * self.block_size + offset] = self.memory.get(source * self.block_size + offset, ())
        for request_id in plan.finished_ids:
            self.introduced.pop(request_id, None)
        results = {}
        for step in plan.requests:
            if step.sampling is not None:
                assert len(step.earlier_token_ids) == step.start
                self.introduced[step.request_id] = list(step.earlier_token_ids)
            history = self.introduced[step.request_id]
            assert len(history) >= step.start
            context = history[: step.start] + step.token_ids
            self.introduced[step.request_id] = context
            for position in range(step.start, len(context)):
                self.memory[self.slot(step, position)] = tuple(context[: position + 1])
            for position in range(len(context)):
                assert self.memory[self.slot(step, position)] == tuple(context[: position + 1]), "not its own past"
            if step.logits_at:
                assert step.token_ids[len(step.token_ids) - len(step.draft_token_ids) :] == step.draft_token_ids
                assert len(step.logits_at) == len(step.draft_token_ids) + 1
                assert step.logits_at[-1] == len(step.token_ids) - 1
                picked: list[int] = []
                for index, draft in zip(step.logits_at, [*step.draft_token_ids, None], strict=True):
                    picked.append(next_token(context[: step.start + index + 1]))
                    if picked[-1] != draft:
                        break
                results[step.request_id] = RequestResult(picked)
        return StepResult(results)

    def slot(self, step: RequestStep, position: int) -> int:
        block = step.block_ids[position // self.block_size]
        assert 0 <= block < self.num_blocks
        return block * self.block_size + position % self.block_size


def guess(request: Request, step: int) -> list[int]:
    """Up to 4 tokens of what comes next, some of them wrong, never beyond the request's end."""
    draw = random.Random(step * 100 + request.request_id)
    right = answer_alone(request.token_ids, request.max_len)[: draw.randrange(5)]
    drafts = [token if draw.random() < 0.8 else draw.randrange(12) for token in right]
    return drafts[: request.max_len - len(request.token_ids) - 1]


def request(number: int, prompt: list[int], new_tokens: int) -> Request:
    sampling = SamplingParams(stop_token_ids=(STOP,)).over(GREEDY)
    return Request(number, list(prompt), len(prompt), sampling, len(prompt) + new_tokens)


arrivals = st.lists(
    st.tuples(
        st.integers(0, 20),  # the step at which it comes
        st.lists(st.integers(1, 2), min_size=1, max_size=30),  # few tokens, so that many prompts begin alike
        st.integers(1, 30),
        st.one_of(st.none(), st.integers(0, 15)),  # steps until its caller goes away
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300)
@given(
    arrivals=arrivals,
    block_size=st.integers(1, 8),
    spare_blocks=st.integers(0, 20),
    max_tokens=st.integers(1, 40),
    max_requests=st.integers(1, 6),
    prefix_caching=st.booleans(),
    speculate=st.booleans(),
)
def test_every_request_gets_its_own_answer(
    arrivals: list[tuple[int, list[int], int, int | None]],
    block_size: int,
    spare_blocks: int,
    max_tokens: int,
    max_requests: int,
    prefix_caching: bool,
    speculate: bool,
) -> None:
    """Whatever arrives, leaves, and however little memory there is: the same tokens as alone, and no block is lost."""
    largest = max(len(prompt) + new for _, prompt, new, _ in arrivals)
    pool = BlockPool(-(-largest // block_size) + spare_blocks, block_size)
    scheduler = Scheduler(pool, max_tokens, max_requests, prefix_caching)
    runner = CheckingRunner(pool.num_blocks, block_size, max_tokens)
    requests = {number: request(number, prompt, new) for number, (_, prompt, new, _) in enumerate(arrivals)}
    added: set[int] = set()
    for step in range(10_000):
        for number, (arrives, _, _, patience) in enumerate(arrivals):
            if arrives == step:
                scheduler.add(requests[number])
                added.add(number)
            if patience is not None and arrives + patience == step and requests[number].finish_reason is None:
                if number not in added:
                    continue
                scheduler.finish(requests[number], "abort")
        if scheduler.has_work:
            for running in scheduler.running:
                running.draft_token_ids = guess(running, step) if speculate else []
            plan = scheduler.plan()
            scheduler.update(plan, runner.execute(plan))
        elif len(added) == len(arrivals):
            break
        held = {block for r in requests.values() for block in r.block_ids}
        assert pool.num_free + len(held) == pool.num_blocks
        assert len(scheduler.running) <= max_requests
    assert not scheduler.has_work, "a request starved"
    assert pool.num_free == pool.num_blocks
    for number, (_, prompt, new, _) in enumerate(arrivals):
        done, alone = requests[number], answer_alone(prompt, len(prompt) + new)
        answer = done.token_ids[done.prompt_len :]
        if done.finish_reason == "abort":
            assert answer == alone[: len(answer)]
        else:
            assert answer == alone
            assert done.finish_reason == ("stop" if answer[-1] == STOP else "length")


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(BlockPool(4, 4), 8, 2)
    with pytest.raises(MemoryPlanError, match="10 tokens plus 7 new ones needs room for 17, and the KV cache holds 16"):
        scheduler.add(request(0, [1] * 10, 7))
    assert not scheduler.has_work


def test_a_long_prompt_does_not_stop_those_that_answer() -> None:
    """A token of every running answer is in each step, beside a chunk of the long prompt."""
    scheduler = Scheduler(BlockPool(100, 4), max_batch_tokens=8, max_batch_requests=4)
    scheduler.add(request(0, [1], 40))
    runner = CheckingRunner(100, 4, 8)
    plan = scheduler.plan()
    scheduler.update(plan, runner.execute(plan))
    scheduler.add(request(1, [2] * 100, 5))
    plan = scheduler.plan()
    assert [(step.request_id, len(step.token_ids)) for step in plan.requests] == [(0, 1), (1, 7)]
    assert plan.requests[1].logits_at == []


def test_the_youngest_gives_way_and_the_oldest_never_does() -> None:
    scheduler = Scheduler(BlockPool(6, 2), max_batch_tokens=20, max_batch_requests=3)
    requests = [request(number, [5, 5, 5], 9) for number in range(2)]
    for each in requests:
        scheduler.add(each)
    runner, order = CheckingRunner(6, 2, 20), []
    while scheduler.has_work:
        plan = scheduler.plan()
        assert 0 in {step.request_id for step in plan.requests} or requests[0].finish_reason
        order += [r.request_id for r in scheduler.update(plan, runner.execute(plan)) if r.finish_reason]
    assert order == [0, 1]
    assert [r.token_ids[3:] for r in requests] == [answer_alone([5, 5, 5], 12)] * 2


def test_prompts_that_begin_alike_share_blocks() -> None:
    """The second computes only what differs, and the last token at least; the oldest unused blocks go first."""
    pool = BlockPool(8, 2)
    scheduler, runner = Scheduler(pool, 50, 4), CheckingRunner(8, 2, 50)

    def computed(number: int, prompt: list[int]) -> int:
        scheduler.add(request(number, prompt, 1))
        plan = scheduler.plan()
        scheduler.update(plan, runner.execute(plan))
        return len(plan.requests[0].token_ids)

    assert computed(0, [1, 2, 3, 4, 5]) == 5
    assert computed(1, [1, 2, 3, 4, 6]) == 1
    assert computed(2, [1, 2, 3, 4]) == 2
    assert computed(3, [9, 2, 3, 4]) == 4  # the same tokens after another beginning are not the same
    assert (scheduler.stats.queried_tokens, scheduler.stats.hit_tokens) == (18, 6)
    assert computed(4, [7] * 15) == 15  # takes every block
    assert computed(5, [1, 2, 3, 4, 5]) == 5
    assert pool.num_free == 8


def test_lower_priorities_wait_and_give_way() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_batch_tokens=20, max_batch_requests=1)
    order = []
    for number, priority in enumerate([5, 1, 5, 0]):
        each = request(number, [3, 3, 3], 4)
        each.priority = priority
        scheduler.add(each)
    runner = CheckingRunner(4, 4, 20)
    while scheduler.has_work:
        plan = scheduler.plan()
        order += [r.request_id for r in scheduler.update(plan, runner.execute(plan)) if r.finish_reason]
    assert order == [3, 1, 0, 2]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_choices_of_one_prompt_compute_it_once(block_size: int, prefix_caching: bool) -> None:
    """But for its last token: full blocks are shared, and the one in which they part is copied."""
    scheduler = Scheduler(BlockPool(20, block_size), 50, 4, prefix_caching)
    runner = CheckingRunner(20, block_size, 50)
    first, second = request(0, [1, 2, 3, 4, 5], 3), request(1, [1, 2, 3, 4, 5], 3)
    second.after = first
    scheduler.add(first)
    scheduler.add(second)
    computed = 0
    while scheduler.has_work:
        plan = scheduler.plan()
        computed += sum(min(len(step.token_ids), max(0, 5 - step.start)) for step in plan.requests)
        scheduler.update(plan, runner.execute(plan))
    assert computed == 5 + 1
    assert first.token_ids == second.token_ids


def test_a_plan_survives_a_process_border() -> None:
    scheduler = Scheduler(BlockPool(10, 4), 64, 4)
    scheduler.add(request(3, [1, 2, 3], 5))
    plan = scheduler.plan()
    sent = json.loads(json.dumps(asdict(plan)))
    for step in sent["requests"]:
        step["sampling"] |= {name: tuple(step["sampling"][name]) for name in ("stop", "choice")}
    back = [RequestStep(**step | {"sampling": SamplingParams(**step["sampling"])}) for step in sent.pop("requests")]
    assert StepPlan(back, **sent) == plan
