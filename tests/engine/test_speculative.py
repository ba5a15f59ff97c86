"""Drafts: they change no word, cost what they may, and leave nothing behind.

Time is counted, not measured, in these tests: a step of the model takes a second, one of a draft model 0.2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny import TinyCheckpoint, edit_json, write_tiny_chat

from glm4 import LLM, SamplingParams
from glm4.engine.draft_model import DraftModel
from glm4.engine.kv_cache import BlockPool
from glm4.engine.request import Request
from glm4.engine.scheduler import Scheduler
from glm4.engine.speculative import PromptLookup, Speculator
from glm4.engine.step import RequestResult, StepPlan, StepResult
from glm4.errors import MemoryPlanError, OptionError
from glm4.options import GREEDY, EngineOptions
from glm4.plan import MemoryPlan

FREE = SamplingParams(max_new_tokens=60, ignore_eos=True)
DRAWN = replace(FREE, temperature=0.9, top_k=40, repetition_penalty=1.1, seed=3)
PROMPTS = [[9, 8, 7, 6] * 8, [30, 31, 32], [5] * 20, list(range(40, 130)), list(range(40, 100))]


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow_down(self, runner: Any, step: float, row: float = 0.0) -> None:
        """Let each step of `runner` take `step` seconds and `row` more for each token beyond one a request."""
        execute = runner.execute

        def timed(plan: StepPlan) -> StepResult:
            self.now += step + row * sum(len(each.token_ids) - 1 for each in plan.requests)
            return execute(plan)

        runner.execute = timed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_chat(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer, which says other things."""
    return write_tiny_chat(tmp_path_factory.mktemp("stranger"), seed=5, num_hidden_layers=1).path


@pytest.fixture(scope="module")
def plain(tiny: TinyCheckpoint) -> LLM:
    return LLM(tiny.path)


def eager(path: Path, draft: Path | None = None, draft_seconds: float = 0.2, **options: Any) -> tuple[LLM, Speculator]:
    """An engine with drafts, on counted time."""
    llm = LLM(path, **{"speculative_tokens": 4} | options, speculative_model=None if draft is None else str(draft))
    speculator, clock = llm.engine.speculator, Clock()
    assert speculator is not None
    speculator.clock = clock
    clock.slow_down(llm.engine.runner, 1.0)
    if isinstance(speculator.drafter, DraftModel):
        clock.slow_down(speculator.drafter.runner, draft_seconds)
    return llm, speculator


def assert_nothing_left(llm: LLM, speculator: Speculator) -> None:
    pools = [llm.engine.scheduler.pool]
    if isinstance(speculator.drafter, DraftModel):
        pools.append(speculator.drafter.pool)
    assert all(pool.num_free == pool.num_blocks for pool in pools)
    assert not speculator._accounts
    assert not speculator._drafting


SETTINGS = [
    {},
    {"max_batch_tokens": 9, "max_batch_requests": 3},
    {"block_size": 3, "max_model_len": 200},
    {"prefix_caching": False, "speculative_tokens": 1},
]


@pytest.mark.parametrize("drafter", ["prompt lookup", "itself", "a stranger"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("params", [FREE, DRAWN], ids=["greedy", "drawn"])
def test_the_same_words_with_and_without_drafts(
    tiny: TinyCheckpoint, stranger: Path, plain: LLM, drafter: str, options: dict[str, Any], params: SamplingParams
) -> None:
    """Greedy and, with the same seed, drawn: in batches, in chunks, with shared beginnings, and a second time."""
    draft = {"prompt lookup": None, "itself": tiny.path, "a stranger": stranger}[drafter]
    llm, speculator = eager(tiny.path, draft, **options)
    expected = [output.token_ids for output in plain.generate(PROMPTS, params)]
    for _ in range(2):
        assert [output.token_ids for output in llm.generate(PROMPTS, params)] == expected
    if drafter == "itself":
        assert speculator.confirmed >= 0.9 * speculator.drafted > 0
    if drafter == "a stranger":
        assert speculator.drafted > 0
        assert speculator.confirmed <= 0.2 * speculator.drafted
    assert_nothing_left(llm, speculator)


@pytest.mark.parametrize("with_model", [False, True])
def test_the_same_words_after_preemption(tiny: TinyCheckpoint, plain: LLM, with_model: bool) -> None:
    """A KV cache too small for all: requests lose their blocks, in the draft model too, and come back."""
    llm, speculator = eager(tiny.path, tiny.path if with_model else None, block_size=4)
    small = Scheduler(BlockPool(45, 4), 2048, 8)
    llm.engine.scheduler, speculator.pool = small, small.pool
    if isinstance(speculator.drafter, DraftModel):
        speculator.drafter.pool = BlockPool(30, 4)  # shorter still: some get no drafts
    expected = [output.token_ids for output in plain.generate(PROMPTS, FREE)]
    assert [output.token_ids for output in llm.generate(PROMPTS, FREE)] == expected
    assert small.stats.preemptions > 0
    assert speculator.drafted > 0
    assert_nothing_left(llm, speculator)


def test_a_request_that_is_dropped_frees_the_draft_models_blocks(tiny: TinyCheckpoint) -> None:
    llm, speculator = eager(tiny.path, tiny.path)
    assert isinstance(speculator.drafter, DraftModel)
    stream = llm.stream([5, 6, 7], FREE)
    for _ in range(4):
        next(stream)
    assert speculator.drafter.pool.num_free < speculator.drafter.pool.num_blocks
    stream.close()
    assert_nothing_left(llm, speculator)


def test_a_perfect_draft_model_saves_steps_by_one_batch_a_position(tiny: TinyCheckpoint) -> None:
    """All requests are guessed for in one batch: as many steps of the draft model as the longest guess."""
    llm, speculator = eager(tiny.path, tiny.path)
    assert isinstance(speculator.drafter, DraftModel)
    sizes: list[list[int]] = []
    execute = speculator.drafter.runner.execute

    def record(plan: StepPlan) -> StepResult:
        sizes.append([len(step.token_ids) for step in plan.requests])
        return execute(plan)

    speculator.drafter.runner.execute = record  # type: ignore[method-assign]
    proposals = 0
    propose = speculator.drafter.propose

    def count(wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        nonlocal proposals
        proposals += 1
        return propose(wanted)

    speculator.drafter.propose = count  # type: ignore[method-assign]
    llm.generate([[n] * 5 for n in range(10, 16)], FREE)
    assert len(sizes) <= 4 * proposals
    assert sizes[0] == [7] * 6  # the prompt and two tokens, the second from a step that was measured without drafts
    assert max(max(step) for step in sizes[1:]) <= 7  # then what is new
    assert proposals < 25  # of 60 tokens


def test_a_draft_model_catches_up_in_chunks(tiny: TinyCheckpoint, plain: LLM) -> None:
    llm, speculator = eager(tiny.path, tiny.path, draft_seconds=0.01, max_batch_tokens=16)
    assert isinstance(speculator.drafter, DraftModel)
    largest = 0
    execute = speculator.drafter.runner.execute

    def record(plan: StepPlan) -> StepResult:
        nonlocal largest
        largest = max(largest, sum(len(step.token_ids) for step in plan.requests))
        return execute(plan)

    speculator.drafter.runner.execute = record  # type: ignore[method-assign]
    prompt = list(range(20, 120))
    assert llm.generate(prompt, FREE)[0].token_ids == plain.generate(prompt, FREE)[0].token_ids
    assert largest == 16
    assert speculator.confirmed > 10


def test_a_draft_model_reads_what_prompts_share_once(tiny: TinyCheckpoint) -> None:
    llm, speculator = eager(tiny.path, tiny.path)
    assert isinstance(speculator.drafter, DraftModel)
    read = 0
    execute = speculator.drafter.runner.execute

    def record(plan: StepPlan) -> StepResult:
        nonlocal read
        read += sum(len(step.token_ids) for step in plan.requests)
        return execute(plan)

    speculator.drafter.runner.execute = record  # type: ignore[method-assign]
    prompt = list(range(20, 120))
    llm.generate(prompt, replace(FREE, max_new_tokens=12))
    first, read = read, 0
    llm.generate(prompt, replace(FREE, max_new_tokens=12))
    assert 90 < first - read < 100  # whole blocks of 16, give or take a draft


def test_drawn_tokens_follow_the_models_distribution(tiny: TinyCheckpoint, stranger: Path) -> None:
    """The third token of 1,500 answers against transformers' probabilities: chi-squared, at a significance of 0.1 %."""
    [prompt], allowed = [[30, 31, 32]], list(range(100, 110))
    params = SamplingParams(
        max_new_tokens=4, ignore_eos=True, temperature=1.0, logit_bias=tuple((token, 100.0) for token in allowed)
    )
    llm, speculator = eager(tiny.path, stranger, max_batch_requests=64)
    answers: list[list[int]] = []
    for number in range(15):
        seeded = replace(params, n=100, seed=1000 * number)
        answers += [output.token_ids for output in llm.generate([prompt], seeded)]
    assert speculator.drafted > 100
    with torch.no_grad():
        pairs = [[a, b] for a in allowed for b in allowed]
        logits = tiny.theirs(torch.tensor([prompt + pair for pair in pairs])).logits[:, :, allowed]
    steps = logits[:, -3:].softmax(-1)
    index = {token: number for number, token in enumerate(allowed)}
    expected = torch.zeros(len(allowed))
    for row, (first, second) in enumerate(pairs):
        expected += steps[row, 0, index[first]] * steps[row, 1, index[second]] * steps[row, 2]
    counts = torch.tensor([sum(answer[2] == token for answer in answers) for token in allowed])
    chi_squared = float(((counts - 1500 * expected) ** 2 / (1500 * expected)).sum())
    assert chi_squared < 27.88  # 9 degrees of freedom


def test_a_failing_draft_model_ends_no_request(
    tiny: TinyCheckpoint, plain: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    llm, speculator = eager(tiny.path, tiny.path)
    assert isinstance(speculator.drafter, DraftModel)

    def fail(plan: StepPlan) -> StepResult:
        raise RuntimeError("the card fell out")

    speculator.drafter.runner.execute = fail  # type: ignore[method-assign]
    assert llm.generate(PROMPTS, FREE)[0].token_ids == plain.generate(PROMPTS, FREE)[0].token_ids
    assert caplog.messages == ["no more drafts: guessing failed (RuntimeError: the card fell out)"]
    assert_nothing_left(llm, speculator)


def test_another_vocabulary_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    other = write_tiny_chat(tmp_path / "other").path
    edit_json(other / "tokenizer.json", added_tokens=[])
    with pytest.raises(OptionError, match=r"speculative_model: .*other has another vocabulary than .*target"):
        LLM(tiny.path, speculative_tokens=3, speculative_model=str(other))
    smaller = write_tiny_chat(tmp_path / "smaller").path
    edit_json(smaller / "config.json", vocab_size=250, eos_token_id=[1], pad_token_id=1)
    with pytest.raises(OptionError, match=r"smaller has another vocabulary"):
        LLM(tiny.path, speculative_tokens=3, speculative_model=str(smaller))
    with pytest.raises(OptionError, match="say with speculative_tokens how many"):
        EngineOptions(speculative_model="somewhere")


def test_a_draft_model_is_in_the_memory_plan(tiny: TinyCheckpoint, stranger: Path) -> None:
    """The model alone just fits, with the other it does not; where both fit, both hold as many tokens."""
    small: dict[str, int] = {"max_batch_tokens": 8, "max_batch_requests": 2, "max_model_len": 64}
    config = LLM(tiny.path).config
    alone = MemoryPlan.of(config, EngineOptions(**small), "float32", 64).least
    LLM(tiny.path, max_device_memory=alone, **small)
    with pytest.raises(MemoryPlanError, match="may be used"):
        LLM(tiny.path, max_device_memory=alone, speculative_tokens=3, speculative_model=str(stranger), **small)
    llm, speculator = eager(tiny.path, stranger)
    assert isinstance(speculator.drafter, DraftModel)
    assert speculator.drafter.runner.num_blocks == llm.engine.runner.num_blocks


class Oracle:
    """Proposes the right tokens with a given probability; each call takes some time."""

    def __init__(self, clock: Clock, seconds: float, hit_rate: float) -> None:
        self.clock, self.seconds, self.hit_rate = clock, seconds, hit_rate
        self.random = random.Random(1)
        self.held: set[int] = set()

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        self.held |= {request.request_id for request, _ in wanted}
        longest = ceil(fmean(count for _, count in wanted))
        self.clock.now += self.seconds * longest
        return [[int(self.random.random() < self.hit_rate) for _ in range(min(count, longest))] for _, count in wanted]

    def forget(self, request_ids: Any) -> None:
        self.held -= set(request_ids)


class OnesRunner:
    """A model that always says 1."""

    num_blocks, block_size, vocab_size = 1000, 16, 2

    def execute(self, plan: StepPlan) -> StepResult:
        results = {}
        for step in plan.requests:
            if step.logits_at:
                right = 0
                while right < len(step.draft_token_ids) and step.draft_token_ids[right] == 1:
                    right += 1
                results[step.request_id] = RequestResult([1] * (right + 1))
        return StepResult(results)


def simulate(
    requests: int, tokens: int, seconds: float, row: float, hit_rate: float, rounds: int
) -> tuple[float, Speculator, Oracle]:
    """The share of time that drafts save for `rounds` times `requests` answers, of which so many run side by side."""
    clock, runner = Clock(), OnesRunner()
    clock.slow_down(runner, 1.0, row)
    oracle = Oracle(clock, seconds, hit_rate)
    scheduler = Scheduler(BlockPool(runner.num_blocks, runner.block_size), 2048, requests)
    speculator = Speculator(oracle, 5, scheduler.pool, 2048, clock)
    for number in range(rounds * requests):
        scheduler.add(Request(number, [1] * 4, 4, GREEDY, 4 + tokens))
    while scheduler.has_work:
        speculator.prepare(scheduler.running)
        plan = scheduler.plan()
        result = runner.execute(plan)
        speculator.learn(plan, result)
        ended = [request.request_id for request in scheduler.update(plan, result) if request.finish_reason]
        if ended:
            speculator.forget(ended)
    without = rounds * (tokens + row * 3 * requests)
    return 1 - clock.now / without, speculator, oracle


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("row", [0.0, 0.05])
@pytest.mark.parametrize("hit_rate", [0.0, 0.1, 0.5])
def test_drafts_never_cost_more_than_five_percent(requests: int, seconds: float, row: float, hit_rate: float) -> None:
    """Of throughput, at any price of guessing and of confirming, in steps' time, and however often drafts are right."""
    saved, speculator, oracle = simulate(requests, 100, seconds, row, hit_rate, rounds=10)
    assert saved > -0.05
    assert speculator.drafted > 0
    assert not oracle.held


def test_drafts_that_are_right_are_used_to_the_full() -> None:
    saved, _, _ = simulate(1, 400, 0.02, 0.02, 1.0, rounds=1)
    assert saved > 0.7  # of at most 1 - (1 + 5 · 0.04) / 6 = 0.8
    saved, _, _ = simulate(8, 100, 0.1, 0.01, 0.8, rounds=10)
    assert saved > 0.3


def test_a_request_rests_when_its_drafts_do_not_pay_and_is_tried_again() -> None:
    """When what it says becomes predictable, that is found out."""
    clock, runner = Clock(), OnesRunner()
    clock.slow_down(runner, 1.0)
    oracle = Oracle(clock, 0.3, 0.0)
    scheduler = Scheduler(BlockPool(1000, 16), 2048, 64)
    speculator = Speculator(oracle, 5, scheduler.pool, 2048, clock)
    scheduler.add(Request(0, [1] * 4, 4, GREEDY, 1000))
    drafted_at = []
    while scheduler.has_work:
        length = len(scheduler.running[0].token_ids) if scheduler.running else 0
        if length > 500:
            oracle.hit_rate = 1.0
        speculator.prepare(scheduler.running)
        plan = scheduler.plan()
        if plan.requests[0].draft_token_ids:
            drafted_at.append(length)
        result = runner.execute(plan)
        speculator.learn(plan, result)
        scheduler.update(plan, result)
    bad = [length for length in drafted_at if length <= 500]
    assert 5 < len(bad) < 100
    assert max(b - a for a, b in pairwise(bad)) > 20  # it rested
    assert len([length for length in drafted_at if length > 500]) > 60  # of at most 500 / 6
    assert speculator.confirmed > 300


def test_drafts_take_no_room_from_others() -> None:
    """Neither tokens of the step nor blocks that the running requests need."""
    clock, runner = Clock(), OnesRunner()
    clock.slow_down(runner, 1.0)
    scheduler = Scheduler(BlockPool(9, 4), 7, 3)
    speculator = Speculator(Oracle(clock, 0.0, 1.0), 5, scheduler.pool, 7, clock)
    for number in range(3):
        scheduler.add(Request(number, [1], 1, GREEDY, 12))
    while scheduler.has_work:
        speculator.prepare(scheduler.running)
        running = len(scheduler.running)
        plan = scheduler.plan()
        assert len(plan.requests) >= running
        result = runner.execute(plan)
        speculator.learn(plan, result)
        scheduler.update(plan, result)
    assert scheduler.stats.preemptions == 0
    assert speculator.confirmed > 0


def test_prompt_lookup_finds_the_longest_and_latest_match() -> None:
    """Against a search of the whole text."""
    numbers = random.Random(3)
    lookup = PromptLookup(longest=4, shortest=2)
    request = Request(0, [numbers.randrange(4) for _ in range(5)], 5, GREEDY, 10_000)
    for _ in range(300):
        tokens = request.token_ids
        expected: list[int] = []
        for size in (4, 3, 2):
            ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
            if ends:
                expected = tokens[ends[-1] : ends[-1] + 3]
                break
        assert lookup.propose([(request, 3)]) == [expected]
        tokens += [numbers.randrange(4) for _ in range(numbers.randrange(1, 3))]
