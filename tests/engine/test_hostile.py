"""Values that no sane caller sends, and combinations that have hurt: refused, or answered, and nobody else notices."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny import write_tiny_chat

from glm4 import LLM, SamplingParams
from glm4.errors import OptionError, PromptError


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(write_tiny_chat(tmp_path_factory.mktemp("hostile")).path)


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 2**63},
        {"temperature": 1e300},
        {"repetition_penalty": 1e-300},
        {"seed": 2**70},
        {"max_new_tokens": 10**30},
        {"logit_bias": ((5, math.inf),)},
        {"logit_bias": ((5, 1000.0),)},
        {"logit_bias": (("a", 1.0),)},
        {"choice": []},
        {"stop_token_ids": 5},
        {"json_schema": {"const": "\ud800"}, "max_new_tokens": 5},
        {"regex": "a", "stop": "b"},
        {"choice": ("ab",), "stop_token_ids": (97,)},
    ],
)
def test_refused(llm: LLM, values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as raised:
        llm.generate("hello", SamplingParams(**values))
    assert "\n" not in str(raised.value)
    assert not llm.engine.has_work


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-6, 100.0])
def test_every_temperature_draws_a_token_that_is_there(llm: LLM, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_new_tokens=20, ignore_eos=True, seed=1, logprobs=1)
    [output] = llm.generate("hello", params)
    assert all(token_id < llm.tokenizer.vocab_size for token_id in output.token_ids)
    assert all(entry.logprob > -math.inf for entry in output.logprobs)
    if temperature < 1e-5:
        greedy = SamplingParams(do_sample=False, max_new_tokens=20, ignore_eos=True)
        assert output.token_ids == llm.generate("hello", greedy)[0].token_ids


def test_extreme_penalties_keep_to_the_form(llm: LLM) -> None:
    for penalty in (0.01, 100.0):
        params = SamplingParams(repetition_penalty=penalty, regex="[ab]{20}", temperature=100.0, seed=2)
        assert set(llm.generate("hello", params)[0].text) <= {"a", "b"}


def test_a_lone_text_is_one_of_one(llm: LLM) -> None:
    assert llm.generate("hello", SamplingParams(choice="上海"))[0].text == "上海"  # type: ignore[arg-type]
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [None, 5, b"abc", [[True]], {"role": "user", "content": "x"}, [None]])
def test_what_is_no_prompt(llm: LLM, prompt: Any) -> None:
    with pytest.raises(PromptError, match="a prompt is a text or a list of token ids"):
        llm.generate(prompt)


def test_no_positions(llm: LLM) -> None:
    with pytest.raises(PromptError, match="positions: the list is empty"):
        llm.logits("hello", [])


def test_an_answer_that_waits_for_one_behind_it_blocks_nobody(llm: LLM) -> None:
    """Its leader has a lower priority, so stands behind it in the queue."""
    engine, params = llm.engine, SamplingParams(max_new_tokens=3, ignore_eos=True)
    leader = engine.add([40] * 20, params, priority=5)
    engine.add([40] * 20, params, priority=0, choice=1, after=leader)
    engine.add([50] * 20, params, priority=0)
    for _ in range(20):
        engine.step()
    assert not engine.has_work


def test_more_answers_than_beams_are_refused(llm: LLM) -> None:
    engine, params = llm.engine, SamplingParams(num_beams=2, max_new_tokens=3)
    first = engine.add([40, 50], params)
    engine.add([40, 50], params, choice=1, after=first)
    with pytest.raises(OptionError, match="n is above num_beams 2"):
        engine.add([40, 50], params, choice=2, after=first)
    while engine.has_work:
        engine.step()
    assert not engine._searches
