"""Answers held to a form, judged by other implementations of the form: jsonschema, re, lark's own rules by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from tiny import write_tiny_chat

from glm4 import LLM, SamplingParams
from glm4.engine.request import RequestOutput
from glm4.engine.step import RequestResult, StepPlan, StepResult
from glm4.errors import OptionError

DEMO = Path(__file__).parents[2] / "demo"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kinds": {"type": "array", "items": {"enum": ["猫", "dog", None]}, "minItems": 1, "maxItems": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 199},
    },
    "required": ["name", "kinds"],
    "additionalProperties": False,
}
WILD = SamplingParams(temperature=1.5, max_new_tokens=200)


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("constraints")).path


@pytest.fixture(scope="module")
def llm(tiny_chat: Path) -> LLM:
    """Random weights: without the form, every answer is noise."""
    return LLM(tiny_chat)


@pytest.fixture(scope="module")
def thinker() -> LLM:
    return LLM(DEMO / "glm4-z1-demo")


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(DEMO / "glm4-demo")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def finished(outputs: list[RequestOutput]) -> Iterator[str]:
    """The texts of answers that ended by themselves; most do."""
    ended = [output.text for output in outputs if output.finish_reason == "stop"]
    assert len(ended) > len(outputs) // 2
    yield from ended


@pytest.mark.parametrize("chat", [True, False])
def test_answers_satisfy_their_json_schema(llm: LLM, chat: bool) -> None:
    params = replace(WILD, json_schema=json.dumps(SCHEMA), n=12, seed=5)
    outputs = llm.chat(ask("hello"), params) if chat else llm.generate("hello", params)
    for text in finished(outputs):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len({output.text for output in outputs}) > 6


def test_a_schema_may_be_an_object(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    params = SamplingParams(json_schema=schema | {"additionalProperties": False}, max_new_tokens=60)  # type: ignore[arg-type]
    [output] = llm.generate("hello", params)
    assert isinstance(json.loads(output.text)["a"], bool)


@pytest.mark.parametrize("regex", [r"\d{4}-(0\d|1[0-2])", "北+京?", r"[a-f]{3,5}(,[a-f]{3,5})*"])
def test_answers_match_their_regex(llm: LLM, regex: str) -> None:
    for text in finished(llm.chat([ask("hello"), ask("bye")], replace(WILD, regex=regex, seed=1, n=4))):
        assert re.fullmatch(regex, text)


def test_answers_are_one_of_the_choices(llm: LLM, demo: LLM) -> None:
    choices = ("上海", "北京", "北京市", "x\n{}")
    texts = list(finished(llm.generate("a", replace(WILD, choice=choices, seed=2, n=24))))
    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1
    [output] = demo.chat(ask("请介绍一下北京"), SamplingParams(choice=("上海", "北京", "广州")))
    assert (output.text, output.finish_reason) == ("北京", "stop")


def test_answers_follow_their_grammar(llm: LLM) -> None:
    grammar = 'start: "(" start ")" | LETTER start | \nLETTER: /[a-d]/'
    for output in llm.generate(["a", "b"] * 6, replace(WILD, grammar=grammar, seed=3, max_new_tokens=40)):
        depths = [output.text[:end].count("(") - output.text[:end].count(")") for end in range(len(output.text) + 1)]
        assert re.fullmatch(r"[a-d()]*", output.text)
        assert min(depths) >= 0
        if output.finish_reason == "stop":
            assert depths[-1] == 0


def test_a_cut_answer_is_a_beginning_and_says_so(llm: LLM) -> None:
    params = replace(WILD, regex="(abc)+d", max_new_tokens=7, seed=4, n=8)
    outputs = llm.generate("hello", params)
    cut = [output for output in outputs if output.finish_reason == "length"]
    assert cut
    assert all(("abc" * 9).startswith(output.text) for output in cut)


def test_an_answer_complete_with_its_last_allowed_token_has_not_been_cut(llm: LLM) -> None:
    params = SamplingParams(regex="z{3}", ignore_eos=True)
    [whole] = llm.generate("hello", params)
    [just] = llm.generate("hello", replace(params, max_new_tokens=len(whole.token_ids)))
    assert whole.text == just.text == "zzz"
    assert whole.finish_reason == just.finish_reason == "stop"


def test_neighbours_without_a_form_say_the_same_as_alone(llm: LLM) -> None:
    free = SamplingParams(max_new_tokens=30)
    prompts = ["hello", "goodbye"]
    alone = [llm.generate(prompt, free)[0].token_ids for prompt in prompts]
    held = llm.stream("hello", replace(WILD, regex="[xy]{50}"))
    next(held)
    assert [output.token_ids for output in llm.generate(prompts, free)] == alone
    assert re.fullmatch("[xy]{50}", list(held)[-1].text)


def test_the_form_begins_after_the_thought(thinker: LLM) -> None:
    question = ask("1+1=?")
    [free] = thinker.chat(question, SamplingParams(do_sample=False, max_new_tokens=200))
    [held] = thinker.chat(question, SamplingParams(do_sample=False, max_new_tokens=200, regex="(yes|no)!"))
    thought, end, answer = held.text.partition("</think>")
    assert end and free.text.startswith(thought)
    assert re.fullmatch("(yes|no)!", answer.lstrip("\n"))
    assert held.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_speculation_changes_no_word_of_a_form(llm: LLM, tiny_chat: Path, temperature: float) -> None:
    drafting = LLM(tiny_chat, speculative_tokens=4)
    assert drafting.engine.speculator is not None
    drafting.engine.speculator.clock = lambda: 0.0  # drafts cost nothing, so none is held back
    params = SamplingParams(
        temperature=temperature,
        seed=9,
        max_new_tokens=120,
        regex='("abcabc",? )+\\[(12, )*\\]',
        skip_special_tokens=False,
    )
    prompts = ['"abcabc", "abcabc", [12, 12, 12]', "hello"]
    expected = llm.generate(prompts, params)
    outputs = drafting.generate(prompts, params)
    assert [(o.text, o.finish_reason) for o in outputs] == [(o.text, o.finish_reason) for o in expected]
    assert drafting.engine.speculator.confirmed > 0


def test_the_minimum_length_yields_to_the_form(llm: LLM) -> None:
    [output] = llm.generate("hello", SamplingParams(regex="ab", min_new_tokens=10))
    assert output.text == "ab"


def test_a_form_that_cannot_be_held_is_refused_before_anything_runs(llm: LLM) -> None:
    for params, reason in (
        (SamplingParams(regex="a(b"), "regex: unclosed group"),
        (SamplingParams(json_schema="{"), "json_schema: not JSON"),
        (SamplingParams(json_schema='{"not": {}}'), "json_schema: unsupported keyword"),
        (SamplingParams(grammar="start: nothing"), "grammar: "),
    ):
        with pytest.raises(OptionError, match=re.escape(reason)):
            llm.generate("hello", params)
    assert not llm.engine.has_work
    with pytest.raises(OptionError, match="give one of json_schema and regex"):
        SamplingParams(json_schema="{}", regex="a")


def test_a_form_that_fails_on_its_way_ends_that_answer_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SamplingParams(max_new_tokens=20)
    [expected] = llm.generate("hello", free)
    engine = llm.engine
    held = engine.add(llm.tokenizer.encode("hello"), SamplingParams(regex="[ab]{40}"))
    other = engine.add(llm.tokenizer.encode("hello"), free)
    outputs = engine.step()
    matcher = engine.constraints._open[held].matcher
    monkeypatch.setattr(type(matcher), "failure", property(lambda self: "too complex" if self is matcher else None))
    last: dict[int, RequestOutput] = {}
    while engine.has_work:
        outputs = engine.step()
        last |= {output.request_id: output for output in outputs}
    assert (last[held].finish_reason, last[held].error) == ("error", "too complex")
    assert last[other].token_ids == expected.token_ids
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert not engine.constraints._open


def test_a_damaged_request_ends_alone_and_the_lists_other_answers_come(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner reports one request of several; LLM says which, and loses none of the others."""
    free = SamplingParams(max_new_tokens=20)
    expected = [output.token_ids for output in llm.generate(["one", "two", "three"], free)]
    execute = llm.engine.runner.execute

    def damage(plan: StepPlan) -> StepResult:
        result = execute(plan)
        guilty = sorted(step.request_id for step in plan.requests)[1:2]
        if len(plan.requests) == 3:
            result.results[guilty[0]] = RequestResult([], error="a row was lost")
        return result

    monkeypatch.setattr(llm.engine.runner, "execute", damage)
    outputs = llm.generate(["one", "two", "three"], free)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[1].error == "a row was lost"
    assert [outputs[0].token_ids, outputs[2].token_ids] == [expected[0], expected[2]]


def test_masks_cover_the_models_padded_vocabulary(llm: LLM) -> None:
    """Rows beyond the tokenizer's ids are allowed by no form."""
    vocab_size = llm.config.vocab_size
    llm.engine.constraints.check(SamplingParams(regex=".*"))
    mask = llm.engine.constraints._compiler.compile(regex=".*").mask()
    assert len(mask) == -(-vocab_size // 8)
    bits = torch.tensor([mask[i >> 3] >> (i & 7) & 1 for i in range(vocab_size)])
    assert not bits[llm.tokenizer.unknown_ids(vocab_size)].any()
