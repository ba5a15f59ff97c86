"""`LLM` from folder to words, on a tiny random model with a real tokenizer, against transformers' own model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyCheckpoint, edit_json, write_tiny_chat

from glm4 import LLM, SamplingParams
from glm4.engine.step import StepPlan, StepResult
from glm4.errors import EngineError, MemoryPlanError, OptionError, PromptError
from glm4.options import EngineOptions

QUESTIONS = ["请介绍一下北京", "What is the capital of France?", "你好", "三加五等于几？" * 9]
FREE = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def llm(tiny: TinyCheckpoint) -> LLM:
    return LLM(tiny.path)


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def reference_greedy(tiny: TinyCheckpoint, llm: LLM, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy tokens, unknown ids masked, up to where its two best are too near to tell."""
    unknown, tokens = llm.tokenizer.unknown_ids(llm.config.vocab_size), list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = tiny.theirs(torch.tensor([tokens])).logits[0, -1]
        logits[unknown] = -torch.inf
        best, second = logits.topk(2).values
        if best - second < 1e-4:
            break
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_greedy_answers_equal_transformers(tiny: TinyCheckpoint, llm: LLM) -> None:
    for output in llm.chat([ask(question) for question in QUESTIONS], FREE):
        expected = reference_greedy(tiny, llm, output.prompt_token_ids, 40)
        assert len(expected) > 10
        assert output.token_ids[: len(expected)] == expected
        assert output.finish_reason == "length"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch_tokens": 3},
        {"max_batch_tokens": 17, "block_size": 5},
        {"max_batch_requests": 1},
        {"block_size": 1},
        {"max_model_len": 250, "max_batch_requests": 2},
    ],
    ids=str,
)
def test_same_words_whatever_the_engine_is_set_to(tiny: TinyCheckpoint, llm: LLM, changes: dict[str, int]) -> None:
    other = LLM(tiny.path, **changes)
    for params in (FREE, replace(FREE, temperature=0.9, top_k=50, seed=5, repetition_penalty=1.2)):
        alone = [llm.chat(ask(question), params)[0].token_ids for question in QUESTIONS]
        together = [output.token_ids for output in other.chat([ask(question) for question in QUESTIONS], params)]
        assert together == alone


def test_same_words_after_preemption(tiny: TinyCheckpoint, llm: LLM) -> None:
    """A pool too small for all at once; the engine must have taken blocks away and given them back."""
    starved = LLM(tiny.path)
    pool = starved.engine.scheduler.pool
    pool.take(pool.num_free - 9)
    seen_first_steps: list[int] = []
    execute = starved.engine.runner.execute

    def watch(plan: StepPlan) -> StepResult:
        seen_first_steps.extend(step.request_id for step in plan.requests if step.sampling is not None)
        return execute(plan)

    starved.engine.runner.execute = watch  # type: ignore[method-assign]
    params = replace(FREE, temperature=1.1, seed=3)
    prompts = [[20 + i, 30, 40] for i in range(4)]
    outputs = starved.generate(prompts, params)
    assert len(seen_first_steps) > len(set(seen_first_steps)), "nothing was preempted"
    assert [output.token_ids for output in outputs] == [llm.generate(p, params)[0].token_ids for p in prompts]
    assert pool.num_free == 9


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    pieces = list(llm.stream(ask("你好"), FREE))
    [whole] = llm.chat(ask("你好"), FREE)
    assert "".join(piece.delta for piece in pieces) == whole.text == pieces[-1].text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert pieces[-1].token_ids == whole.token_ids


def test_leaving_a_stream_frees_its_blocks(llm: LLM) -> None:
    pool = llm.engine.scheduler.pool
    stream = llm.stream(ask("你好"), FREE)
    next(stream)
    assert pool.num_free < pool.num_blocks
    stream.close()
    assert pool.num_free == pool.num_blocks
    assert not llm.engine.has_work


def test_stop_strings_cut_the_text_and_name_themselves(llm: LLM) -> None:
    [free] = llm.generate("abc", FREE)
    stop = free.text[5:8]
    [output] = llm.generate("abc", replace(FREE, stop=(stop, "never said")))
    assert output.text == free.text[: free.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == free.token_ids[: len(output.token_ids)]


def test_stop_ids_end_the_answer_and_are_not_part_of_it(llm: LLM) -> None:
    [free] = llm.generate("abc", FREE)
    token = free.token_ids[9]
    [output] = llm.generate("abc", replace(FREE, stop_token_ids=(token,)))
    first = free.token_ids.index(token)
    assert output.token_ids == free.token_ids[:first]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    [later] = llm.generate("abc", replace(FREE, stop_token_ids=(token,), min_new_tokens=15))
    assert len(later.token_ids) >= 15
    assert token not in later.token_ids[:15]


def test_any_of_the_models_end_tokens_ends_an_answer(tiny: TinyCheckpoint, llm: LLM, tmp_path: Path) -> None:
    [free] = llm.generate("abc", FREE)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny.path.iterdir():
        (folder / file.name).symlink_to(file)
    for position in (3, 8):
        end = free.token_ids[position]
        (folder / "config.json").unlink()
        (folder / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
        edit_json(folder / "config.json", eos_token_id=[0, end])
        [output] = LLM(folder).generate("abc", SamplingParams(max_new_tokens=40))
        assert output.token_ids == free.token_ids[: free.token_ids.index(end)]
        assert output.finish_reason == "stop"


def test_logprobs_equal_transformers(tiny: TinyCheckpoint, llm: LLM) -> None:
    [output] = llm.generate("hello", replace(FREE, max_new_tokens=6, logprobs=3, temperature=0.8, seed=1))
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    with torch.no_grad():
        logits = tiny.theirs(torch.tensor([output.prompt_token_ids + output.token_ids])).logits[0]
    logits[:, llm.tokenizer.unknown_ids(llm.config.vocab_size)] = -torch.inf
    expected = logits[len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)
    for entry, row in zip(output.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()


def test_requests_without_a_seed_differ_and_the_engines_seed_repeats_them(tiny: TinyCheckpoint) -> None:
    params = replace(FREE, temperature=2.0)
    first, second = (
        [output.token_ids for output in LLM(tiny.path, seed=4).generate(["abc", "abc"], params)] for _ in range(2)
    )
    assert first == second
    assert first[0] != first[1]


def test_an_answer_may_fill_the_context_but_not_more(tiny: TinyCheckpoint) -> None:
    llm = LLM(tiny.path, max_model_len=50)
    [output] = llm.generate([5] * 30, SamplingParams(ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (20, "length")
    with pytest.raises(PromptError, match="the prompt has 50 tokens and prompt plus answer may have 50"):
        llm.generate([5] * 50)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt is empty"), ("", "the prompt is empty"), ([-1], "outside 0"), ([10**6], "outside 0")],
)
def test_prompts_that_are_refused(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        llm.generate([prompt])
    assert not llm.engine.has_work


@pytest.mark.parametrize("params", [{"stop_token_ids": (10**6,)}, {"logit_bias": {"1000000": 1}}], ids=str)
def test_ids_that_are_no_tokens_are_refused(llm: LLM, params: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"1000000 is no token: ids end at \d+"):
        llm.generate("abc", SamplingParams(**params))


def test_one_bad_prompt_of_several_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(PromptError):
        llm.generate([[5, 6], []])
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks


def test_a_request_beyond_the_kv_cache_is_refused(tiny: TinyCheckpoint) -> None:
    llm = LLM(tiny.path)
    with pytest.raises(MemoryPlanError, match="the KV cache holds"):
        llm.engine.scheduler.pool.num_blocks = 4
        llm.generate([5] * 60, FREE)


def test_a_model_that_does_not_fit_is_refused_before_it_loads(tiny: TinyCheckpoint) -> None:
    with pytest.raises(MemoryPlanError, match="may be used"):
        LLM(EngineOptions(model=str(tiny.path), max_device_memory=100_000))


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(tiny: TinyCheckpoint) -> None:
    llm = LLM(tiny.path)
    execute = llm.engine.runner.execute
    calls = iter([False, True])

    def fail_once(plan: StepPlan) -> StepResult:
        if next(calls, False):
            raise RuntimeError("the card fell out")
        return execute(plan)

    llm.engine.runner.execute = fail_once  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="the step failed: RuntimeError: the card fell out"):
        llm.generate(["abc", "def"], FREE)
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks
    [output] = llm.generate("abc", FREE)
    assert len(output.token_ids) == 40


def test_statistics_count_every_token(llm: LLM) -> None:
    outputs = llm.generate([[5] * 7, [6] * 9], replace(FREE, max_new_tokens=4))
    assert llm.last_stats.prefill_tokens == 16
    assert llm.last_stats.decode_tokens == sum(len(output.token_ids) - 1 for output in outputs) == 6
    assert llm.last_stats.prefill_seconds > 0
    assert llm.last_stats.decode_seconds > 0


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_speculation_changes_nothing_but_the_number_of_steps(
    tiny: TinyCheckpoint, llm: LLM, temperature: float
) -> None:
    """A text that repeats itself, so that drafts are confirmed; greedy and drawn tokens alike."""
    params = replace(FREE, max_new_tokens=150, temperature=temperature, seed=2, logprobs=1)
    prompts = [[9, 8, 7, 6] * 8, [30, 31, 32], [5] * 20]
    plain = llm.generate(prompts, params)
    eager = LLM(tiny.path, speculative_tokens=5)
    assert eager.engine.speculator is not None
    eager.engine.speculator.clock = lambda: 0.0  # where no time passes, drafts cost nothing and none is held back
    steps = 0
    execute = eager.engine.runner.execute

    def count(plan: StepPlan) -> StepResult:
        nonlocal steps
        steps += 1
        return execute(plan)

    eager.engine.runner.execute = count  # type: ignore[method-assign]
    drafted = eager.generate(prompts, params)
    assert [output.token_ids for output in drafted] == [output.token_ids for output in plain]
    for ours, theirs in zip(drafted, plain, strict=True):
        assert [e.logprob for e in ours.logprobs] == pytest.approx([e.logprob for e in theirs.logprobs], abs=1e-4)
    if temperature == 0:
        assert steps < 150, "no draft was confirmed"
    assert eager.engine.scheduler.pool.num_free == eager.engine.scheduler.pool.num_blocks


def test_several_answers_to_one_prompt(llm: LLM) -> None:
    """Each is what its own seed gives; the prompt is computed once."""
    params = replace(FREE, temperature=1.5, seed=10)
    outputs = llm.generate([[7] * 50, [8] * 3], replace(params, n=3))
    assert len(outputs) == 6
    for number, output in enumerate(outputs):
        [alone] = llm.generate(output.prompt_token_ids, replace(params, seed=10 + number % 3))
        assert output.token_ids == alone.token_ids


def test_best_of_keeps_the_likeliest(llm: LLM) -> None:
    params = replace(FREE, temperature=1.5, seed=10, logprobs=0)
    drawn = llm.generate([[7] * 5], replace(params, n=6))
    means = [sum(e.logprob for e in output.logprobs) / len(output.logprobs) for output in drawn]
    best = llm.generate([[7] * 5], replace(params, n=2, best_of=6, logprobs=None))
    ranked = sorted(range(6), key=lambda i: -means[i])[:2]
    assert [output.token_ids for output in best] == [drawn[i].token_ids for i in ranked]


@pytest.mark.parametrize("max_batch_tokens", [2048, 7])
def test_prompt_logprobs_equal_transformers(tiny: TinyCheckpoint, max_batch_tokens: int) -> None:
    llm = LLM(tiny.path, max_batch_tokens=max_batch_tokens)
    prompt = [40 + i % 17 for i in range(100)]
    for _ in range(2):  # the second time, nothing may be missing because the prompt is cached
        [output] = llm.generate([prompt], replace(FREE, max_new_tokens=2, prompt_logprobs=2))
        assert [entry.token_id for entry in output.prompt_logprobs] == prompt[1:]
    with torch.no_grad():
        logits = tiny.theirs(torch.tensor([prompt])).logits[0, :-1]
    logits[:, llm.tokenizer.unknown_ids(llm.config.vocab_size)] = -torch.inf
    for entry, row in zip(output.prompt_logprobs, logits.log_softmax(-1), strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_a_prompt_seen_before_is_not_computed_again(tiny: TinyCheckpoint, llm: LLM) -> None:
    prompt = [11 + i % 50 for i in range(200)]
    fresh = LLM(tiny.path)
    first = fresh.generate([prompt], FREE)
    assert fresh.last_stats.prefill_tokens == 200
    again = fresh.generate([prompt], replace(FREE, temperature=0.5, repetition_penalty=1.3, seed=4))
    assert fresh.last_stats.prefill_tokens == 200 - 192
    assert first[0].token_ids == llm.generate([prompt], FREE)[0].token_ids
    uncached = LLM(tiny.path, prefix_caching=False)
    for _ in range(2):
        same = uncached.generate([prompt], replace(FREE, temperature=0.5, repetition_penalty=1.3, seed=4))
        assert uncached.last_stats.prefill_tokens == 200
    assert again[0].token_ids == same[0].token_ids


def test_a_stream_of_several_answers_is_refused(llm: LLM) -> None:
    with pytest.raises(OptionError, match="n: a stream is one answer"):
        llm.stream("abc", replace(FREE, n=2))


def test_streams_side_by_side_keep_their_words_apart(llm: LLM) -> None:
    alone = [llm.chat(ask(question), FREE)[0].text for question in QUESTIONS[:2]]
    first, second = (llm.stream(ask(question), FREE) for question in QUESTIONS[:2])
    words = [next(first).delta, next(second).delta]
    [between] = llm.chat(ask(QUESTIONS[0]), FREE)
    words[1] += "".join(output.delta for output in second)
    words[0] += "".join(output.delta for output in first)
    assert words == alone
    assert between.text == alone[0]
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks


def test_several_threads_may_share_a_model(llm: LLM) -> None:
    alone = {question: llm.chat(ask(question), FREE)[0].token_ids for question in QUESTIONS}
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda question: llm.chat(ask(question), FREE)[0].token_ids, QUESTIONS * 4)
        assert list(answers) == [alone[question] for question in QUESTIONS * 4]


def test_a_failing_step_is_told_to_every_open_stream(tiny: TinyCheckpoint) -> None:
    llm = LLM(tiny.path)
    first, second = (llm.stream("abc", FREE) for _ in range(2))
    next(first)
    next(second)

    def fail(plan: StepPlan) -> StepResult:
        raise RuntimeError("the card fell out")

    llm.engine.runner.execute = fail  # type: ignore[method-assign]
    for stream in (first, second):
        with pytest.raises(EngineError, match="the card fell out"):
            list(stream)


def test_damaged_weights_are_an_error_and_no_answer(tiny: TinyCheckpoint) -> None:
    llm = LLM(tiny.path)
    llm.model.norm = torch.full_like(llm.model.norm, float("nan"))
    with pytest.raises(EngineError, match=r"not finite.*a weight is damaged"):
        llm.generate("abc", FREE)
    assert not llm.engine.has_work


def test_messages_are_not_prompts(llm: LLM) -> None:
    with pytest.raises(PromptError, match="messages go to chat"):
        llm.generate([ask("hi")[0]])  # type: ignore[list-item]
