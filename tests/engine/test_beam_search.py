"""Beam search against transformers' own, and what it leaves in the block pool."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from tiny import TinyCheckpoint, write_tiny_chat

from glm4 import LLM, SamplingParams
from glm4.engine.request import RequestOutput
from glm4.engine.step import StepPlan, StepResult
from glm4.errors import EngineError, MemoryPlanError, OptionError

STOP_IDS = (10, 20, 30, 40, 50, 60)
"""Beside the folder's three: with random weights, some of so many come early."""
PROMPTS = ["hello", "a longer prompt, of more than one block of tokens", "x"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_chat(tmp_path_factory.mktemp("beams"), vocab_size=263)


@pytest.fixture(scope="module")
def theirs(tiny: TinyCheckpoint) -> transformers.Glm4ForCausalLM:
    return transformers.Glm4ForCausalLM.from_pretrained(tiny.path)


@pytest.fixture(scope="module")
def llm(tiny: TinyCheckpoint) -> LLM:
    return LLM(tiny.path)


def reference(
    model: transformers.Glm4ForCausalLM, ids: list[int], num_beams: int, max_new_tokens: int, **how: Any
) -> list[tuple[list[int], float]]:
    """All beams' answers, best first, without what ended or padded them, and their scores."""
    ends = [*model.generation_config.eos_token_id, *STOP_IDS]
    found = model.generate(
        torch.tensor([ids]),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **how,
    )
    answers = []
    for row, score in zip(found.sequences[:, len(ids) :].tolist(), found.sequences_scores.tolist(), strict=True):
        end = next((i for i, token_id in enumerate(row) if token_id in ends), len(row))
        answers.append((row[:end], score))
    return answers


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_the_answers_are_those_of_transformers(
    llm: LLM, theirs: transformers.Glm4ForCausalLM, num_beams: int, length_penalty: float, early_stopping: bool
) -> None:
    how = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    params = SamplingParams(
        num_beams=num_beams, n=num_beams, max_new_tokens=24, stop_token_ids=STOP_IDS, logprobs=0, **how
    )
    outputs = llm.generate(PROMPTS, params)
    reasons = set()
    for number, prompt in enumerate(PROMPTS):
        own = outputs[number * num_beams : (number + 1) * num_beams]
        expected = reference(theirs, llm.tokenizer.encode(prompt), num_beams, 24, **how)
        assert [output.token_ids for output in own] == [token_ids for token_ids, _ in expected]
        reasons |= {output.finish_reason for output in own}
        for output, (_, score) in zip(own, expected, strict=True):
            assert len(output.logprobs) == len(output.token_ids)
            if output.finish_reason == "length":
                total = sum(entry.logprob for entry in output.logprobs)
                assert total / 24**length_penalty == pytest.approx(score, rel=1e-4)
    assert reasons <= {"stop", "length"}
    assert all_free(llm)


def all_free(llm: LLM) -> bool:
    pool = llm.engine.scheduler.pool
    return pool.num_free == pool.num_blocks and not llm.engine.has_work and not llm.engine._searches


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_little_memory_changes_nothing(tiny: TinyCheckpoint, llm: LLM, block_size: int) -> None:
    """Forks that find no block wait; searches that wait for each other give way; the words stay."""
    params = SamplingParams(num_beams=4, n=2, max_new_tokens=12, ignore_eos=True)
    prompts = [[70 + i, 80, 90] for i in range(12)]
    expected = [output.token_ids for output in llm.generate(prompts, params)]
    small = LLM(tiny.path, block_size=block_size, max_batch_tokens=5)
    engine = small.engine
    pool = type(engine.scheduler.pool)(4 * -(-16 // block_size), block_size)  # just enough for one search
    engine.scheduler.pool = pool
    outputs = small.generate(prompts, params)
    assert [output.token_ids for output in outputs] == expected
    assert pool.num_free == pool.num_blocks
    assert engine.scheduler.stats.preemptions > 0


def test_beside_ordinary_requests(llm: LLM) -> None:
    free = SamplingParams(max_new_tokens=30, ignore_eos=True)
    search = SamplingParams(num_beams=3, max_new_tokens=20)
    alone, found = llm.generate("hello", free)[0].token_ids, llm.generate("bye", search)[0].token_ids
    stream = llm.stream("hello", free)
    next(stream)
    assert llm.generate("bye", search)[0].token_ids == found
    assert list(stream)[-1].token_ids == alone


def test_one_beam_is_greedy(llm: LLM) -> None:
    greedy = SamplingParams(max_new_tokens=20)
    [expected] = llm.generate("hello", greedy)
    [output] = llm.generate("hello", SamplingParams(max_new_tokens=20, num_beams=1))
    assert output.token_ids == expected.token_ids


def test_the_caller_sees_one_request_and_can_leave(llm: LLM) -> None:
    search = SamplingParams(num_beams=3, max_new_tokens=20)
    outputs = list(llm.stream("hello", search))
    assert len(outputs) == 1
    assert outputs[0].delta == outputs[0].text
    engine = llm.engine
    ids = [engine.add([70, 80], search)]
    ids.append(engine.add([70, 80], search, choice=1, after=ids[0]))
    for _ in range(3):
        assert engine.step() == []
    engine.abort(ids[0])
    assert engine.has_work
    engine.abort(ids[1])
    assert all_free(llm)


def test_a_failing_step_ends_the_search_with_its_reason(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = llm.engine.runner.execute
    steps: list[StepPlan] = []

    def fail(plan: StepPlan) -> StepResult:
        steps.append(plan)
        if len(steps) == 4:
            raise RuntimeError("the card fell out")
        return execute(plan)

    monkeypatch.setattr(llm.engine.runner, "execute", fail)
    with pytest.raises(EngineError, match="the card fell out"):
        llm.generate("hello", SamplingParams(num_beams=3, n=3, max_new_tokens=20))
    assert all_free(llm)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"temperature": 0.7}, "num_beams: beam search draws nothing at random"),
        ({"stop": ("x",)}, "num_beams: stop does not go together"),
        ({"regex": "a"}, "num_beams: regex does not go together"),
        ({"repetition_penalty": 1.1}, "num_beams: repetition_penalty does not go"),
        ({"n": 5}, "n 5 is above num_beams 4"),
        ({"stop_token_ids": tuple(range(40))}, "num_beams 4 and the 43 ids that end an answer are 47"),
    ],
)
def test_what_does_not_go_together_is_refused(llm: LLM, how: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        llm.generate("hello", SamplingParams(num_beams=4, **how))
    assert all_free(llm)


def test_beams_that_can_never_fit_are_refused_with_the_numbers(tiny: TinyCheckpoint) -> None:
    llm = LLM(tiny.path)
    pool = llm.engine.scheduler.pool
    llm.engine.scheduler.pool = type(pool)(8, pool.block_size)
    with pytest.raises(MemoryPlanError, match="the KV cache holds 32 for each of 4 beams"):
        llm.generate("hello", SamplingParams(num_beams=4, max_new_tokens=100))
    answers: list[RequestOutput] = llm.generate("hello", SamplingParams(num_beams=4, max_new_tokens=20))
    assert len(answers) == 1
