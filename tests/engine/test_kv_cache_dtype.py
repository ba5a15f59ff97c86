"""Engines whose KV cache has a number format of its own, against transformers with keys and values rounded the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rounded_kv import rounded_reference
from tiny import TinyCheckpoint, write_tiny_chat

from glm4 import LLM, SamplingParams
from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.engine.step import RequestStep, StepPlan, StepResult
from glm4.engine.torch_runner import TorchRunner
from glm4.errors import MemoryPlanError
from glm4.model.loading import load_model
from glm4.options import GREEDY, EngineOptions

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "demo" / "glm4-demo"
sys.path.insert(0, str(REPOSITORY / "tools"))
from demo_corpus import load_tasks  # noqa: E402  # the corpus as the training saw it

FREE = SamplingParams(max_new_tokens=40, ignore_eos=True)
PROMPTS = [[20, 30, 40], [21, 7] * 9, list(range(50, 90)), [9] * 17 + [5]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def expected(tiny: TinyCheckpoint) -> list[list[int]]:
    """The rounded reference's greedy tokens, up to where its two best are too near to tell."""
    reference = rounded_reference(tiny.path)
    unknown = LLM(tiny.path).tokenizer.unknown_ids(reference.config.vocab_size)
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 40:
            with torch.no_grad():
                logits = reference(torch.tensor([tokens])).logits[0, -1]
            logits[unknown] = -torch.inf
            best, second = logits.topk(2).values
            if best - second < 1e-6:
                break
            tokens.append(int(logits.argmax()))
        answers.append(tokens[len(prompt) :])
    assert min(map(len, answers)) >= 30, "the reference cannot tell the first two apart: choose other prompts"
    return answers


def int8_llm(path: Path, **options: Any) -> LLM:
    """An LLM with an int8 KV cache that computes in double precision, as the reference does (it says why)."""
    llm = LLM(path, kv_cache_dtype="int8", **options)
    runner = llm.engine.runner
    model = load_model(Checkpoint.open(ModelFolder.open(path)), llm.config, torch.device("cpu"), torch.float64)
    unknown = llm.tokenizer.unknown_ids(llm.config.vocab_size)
    llm.engine.runner = TorchRunner(model, runner.num_blocks, runner.block_size, unknown, torch.int8)
    return llm


def answers(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> list[list[int]]:
    """What `llm` says, as far as `expected` goes."""
    outputs = llm.generate(prompts, FREE)
    return [output.token_ids[: len(tokens)] for output, tokens in zip(outputs, expected, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 3},
        {"max_batch_tokens": 17, "block_size": 5},
        {"max_batch_requests": 1},
        {"block_size": 1, "prefix_caching": False},
        {"speculative_tokens": 4, "block_size": 7},
    ],
    ids=str,
)
def test_int8_says_the_same_whatever_the_engine_is_set_to(
    tiny: TinyCheckpoint, expected: list[list[int]], options: dict[str, Any]
) -> None:
    assert answers(int8_llm(tiny.path, **options), PROMPTS, expected) == expected


def test_int8_says_the_same_over_blocks_that_another_request_filled(
    tiny: TinyCheckpoint, expected: list[list[int]]
) -> None:
    llm = int8_llm(tiny.path, block_size=4, max_batch_tokens=11)
    plans = _watch(llm)
    for _ in range(2):
        assert answers(llm, PROMPTS, expected) == expected
    first_steps = [step for plan in plans for step in plan.requests if step.sampling is not None]
    assert [bool(step.earlier_token_ids) for step in first_steps[-4:]] == [False, True, True, True]


def test_int8_says_the_same_after_preemption(tiny: TinyCheckpoint, expected: list[list[int]]) -> None:
    llm = int8_llm(tiny.path)
    pool = llm.engine.scheduler.pool
    pool.take(pool.num_free - 9)
    plans = _watch(llm)
    assert answers(llm, PROMPTS, expected) == expected
    begun = [step.request_id for plan in plans for step in plan.requests if step.sampling is not None]
    assert len(begun) > len(PROMPTS), "nothing was preempted"


def _watch(llm: LLM) -> list[StepPlan]:
    plans: list[StepPlan] = []
    execute = llm.engine.runner.execute

    def watch(plan: StepPlan) -> StepResult:
        plans.append(plan)
        return execute(plan)

    llm.engine.runner.execute = watch  # type: ignore[method-assign]
    return plans


def test_copied_blocks_bring_their_scales(tiny: TinyCheckpoint) -> None:
    """A request goes on in copies of its blocks; what is then written over the originals does not matter."""
    prompt = PROMPTS[2][:6]
    runner = int8_llm(tiny.path, block_size=4).engine.runner
    runner.execute(StepPlan([RequestStep(0, prompt[:5], 0, [0, 1], sampling=GREEDY, prompt_len=6)]))
    runner.execute(StepPlan([], block_copies=[(0, 6), (1, 7)]))
    overwrite = RequestStep(1, [100] * 6, 0, [0, 1], sampling=GREEDY, prompt_len=6)
    step = RequestStep(0, prompt[5:], 5, [6, 7], [0], hidden_states="all")
    found = runner.execute(StepPlan([overwrite, step])).results[0].hidden_states
    with torch.no_grad():
        hidden = rounded_reference(tiny.path).model(torch.tensor([prompt])).last_hidden_state[0, -1:]
    assert torch.allclose(found, hidden, atol=1e-6)


def test_the_option_reaches_the_cache(tiny: TinyCheckpoint) -> None:
    """The prompt's log-probabilities are the rounded reference's and not the exact one's."""
    prompt = PROMPTS[2]
    llm = LLM(tiny.path, kv_cache_dtype="int8")
    [output] = llm.generate(prompt, SamplingParams(max_new_tokens=1, prompt_logprobs=0))
    found = torch.tensor([entry.logprob for entry in output.prompt_logprobs])
    unknown = llm.tokenizer.unknown_ids(llm.config.vocab_size)
    away = []
    for model in (rounded_reference(tiny.path), tiny.theirs):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, :-1].float()
        logits[:, unknown] = -torch.inf
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        away.append((found - logprobs).abs().max())
    rounded, exact = away
    assert 10 * rounded < exact <= 0.1


def test_a_share_of_the_free_memory_is_resolved_where_it_is_known(
    tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of 12 MiB is 6 MiB. A token takes 3 layers · 2 · 2 heads · 16 · 4 bytes in float32, · (16 + 4) in int8."""
    monkeypatch.setattr("glm4.device.free_memory", lambda device: 12 * 2**20)
    options: dict[str, Any] = {"max_batch_tokens": 64, "max_model_len": 512}

    def blocks(max_device_memory: str | int, kv_cache_dtype: str) -> int:
        llm = LLM(tiny.path, max_device_memory=max_device_memory, kv_cache_dtype=kv_cache_dtype, **options)
        return llm.engine.runner.num_blocks

    assert blocks("50%", "auto") == blocks(6 * 2**20, "auto")
    assert blocks("50%", "int8") * 240 == pytest.approx(blocks("50%", "auto") * 768, abs=768)
    with pytest.raises(MemoryPlanError, match=r"12\.0 MiB are free, so raise max_device_memory"):
        LLM(tiny.path, max_device_memory=0.01, **options)


@pytest.mark.parametrize("asked", ["80%", 0.8, 1.0, "1GB"])
def test_options_cross_the_border_to_the_engines_process(asked: str | float) -> None:
    options = EngineOptions(max_device_memory=asked, kv_cache_dtype="int8")
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(options), type=EngineOptions)
    assert back == options
    assert type(back.max_device_memory) is type(options.max_device_memory)


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"),
    [("float32", "int8"), ("float32", "bfloat16"), ("bfloat16", "int8"), ("bfloat16", "float32")],
)
def test_the_demo_answers_the_same(dtype: str, kv_cache_dtype: str) -> None:
    """Its corpus word for word, every fortieth answer."""
    llm = LLM(DEMO, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    tasks = [task for task in load_tasks(REPOSITORY / "demo" / "corpus") if not task.thinks and not task.tools][::40]
    params = SamplingParams(do_sample=False, max_new_tokens=300, skip_special_tokens=False)
    outputs = llm.chat([task.messages for task in tasks], params)
    assert len(tasks) >= 20
    for task, output in zip(tasks, outputs, strict=True):
        end = llm.tokenizer.decode([output.stop_reason], skip_special_tokens=False)
        assert output.text + end == task.answer.removeprefix("\n")
