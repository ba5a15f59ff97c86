"""Prompts that are only read: embeddings, hidden states and logits, against transformers."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
import transformers
from tiny import write_tiny_chat

from glm4 import LLM, SamplingParams
from glm4.engine.async_llm import AsyncLLM
from glm4.engine.request import Reading
from glm4.errors import EngineError, PromptError

PROMPTS = [random.Random(i).choices(range(256), k=length) for i, length in enumerate([1, 7, 40, 41, 100])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("reading")).path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each prompt the hidden states after the final norm, and the logits."""
    model = transformers.Glm4ForCausalLM.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            hidden = model.model(torch.tensor([prompt])).last_hidden_state[0]
            found.append((hidden, model.lm_head(hidden)))
    return found


@pytest.fixture(scope="module", params=[2048, 16, 3], ids=lambda budget: f"chunks of {budget}")
def llm(folder: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(folder, max_batch_tokens=request.param)


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return ours.shape == expected.shape and torch.allclose(ours, expected, atol=1e-5, rtol=1e-4)


def test_hidden_states_and_their_means(llm: LLM, theirs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for _ in range(2):  # the second time, the cache knows the prompts
        for ours, mean, (hidden, _logits) in zip(llm.hidden_states(PROMPTS), llm.embed(PROMPTS), theirs, strict=True):
            assert close(ours, hidden)
            assert close(torch.tensor(mean), hidden.mean(0))
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks


def test_logits_everywhere_or_where_they_are_wanted(llm: LLM, theirs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for ours, (_, expected) in zip(llm.logits(PROMPTS), theirs, strict=True):
        assert close(ours, expected)
    [ours] = llm.logits(PROMPTS[2], [-1, 0, 17, 17])
    assert close(ours, theirs[2][1][[39, 0, 17, 17]])
    with pytest.raises(PromptError, match="position 40 is not in a prompt of 40 tokens"):
        llm.logits(PROMPTS[2], [40])


def test_reading_beside_answering(llm: LLM) -> None:
    free = SamplingParams(max_new_tokens=30, ignore_eos=True)
    [expected] = llm.generate(PROMPTS[3], free)
    stream = llm.stream(PROMPTS[3], free)
    next(stream)
    alone = llm.embed(PROMPTS[4])
    assert list(stream)[-1].token_ids == expected.token_ids
    assert torch.allclose(torch.tensor(llm.embed(PROMPTS[4])), torch.tensor(alone), atol=1e-6)


def test_the_engines_own_process_reads_too(folder: Path) -> None:
    expected = LLM(folder).embed(PROMPTS)

    async def embed() -> list[list[float]]:
        async with AsyncLLM(folder) as llm:
            found = await asyncio.gather(*(llm.embed(prompt) for prompt in PROMPTS))
            with pytest.raises(PromptError, match="the prompt is empty"):
                await llm.embed("")
            assert (await llm.stats()).kv_blocks_used == 0
            await llm.shutdown()
            with pytest.raises(EngineError):
                await llm.embed("late")
            return found

    assert torch.allclose(torch.tensor(asyncio.run(embed())), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_what_was_read_before_a_preemption_counts_once(
    folder: Path, theirs: list[tuple[torch.Tensor, torch.Tensor]], steps: int
) -> None:
    """Chunks of 8 of 40 tokens; the request gives up its blocks after some of them, and begins again."""
    llm = LLM(folder, max_batch_tokens=8)
    engine, (hidden, logits) = llm.engine, theirs[2]
    readings = [Reading("all"), Reading(logits_at=(0, 39)), None]
    sampling = SamplingParams(max_new_tokens=2, prompt_logprobs=0, ignore_eos=True)
    outputs = []
    for reading in readings:
        engine.add(PROMPTS[2], sampling if reading is None else None, reading=reading)
        for _ in range(steps):
            outputs += engine.step()
        for request in list(engine.scheduler.running):
            engine.scheduler._preempt(request)
        while engine.has_work:
            outputs += engine.step()
    read, at, continued = [output for output in outputs if output.finish_reason is not None]
    assert close(torch.cat(read.hidden_states), hidden)
    assert close(torch.cat(at.logits), logits[[0, 39]])
    possible = logits.index_fill(1, torch.tensor(llm.tokenizer.unknown_ids(logits.shape[1])), -torch.inf)
    expected = possible.log_softmax(-1)[range(39), PROMPTS[2][1:]]
    assert close(torch.tensor([entry.logprob for entry in continued.prompt_logprobs]), expected)
