"""Several copies on one machine: the words of one, while one of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from serving import DEMO

from glm4 import LLM, RequestOutput, SamplingParams
from glm4.cluster.replicas import Replicas
from glm4.errors import CheckpointError, EngineError, OptionError, PromptError

T = TypeVar("T")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=40)
LONG = replace(GREEDY, max_new_tokens=1500, ignore_eos=True)
PROMPTS = ["请介绍一下北京", "Tell me about Paris", "三加五等于几", "What is six times six?", "请介绍一下上海", "Hi"]


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def last(llm: Replicas, prompt: Any, sampling: SamplingParams = GREEDY, **more: Any) -> RequestOutput:
    return [output async for output in llm.generate(prompt, sampling, **more)][-1]


@pytest.fixture(scope="module")
def running() -> Iterator[Callable[[Callable[[Replicas], Awaitable[T]]], T]]:
    with asyncio.Runner() as runner:
        llm = runner.run(Replicas(DEMO, device="cpu", data_parallel=2, threads=1).start())

        def run(test: Callable[[Replicas], Awaitable[T]]) -> T:
            async def main() -> T:
                return await asyncio.wait_for(_awaited(test(llm)), 60)

            return runner.run(main())

        yield run
        runner.run(llm.shutdown())
        assert llm.health == "dead"


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


@pytest.fixture(scope="module")
def words() -> list[list[int]]:
    llm = LLM(DEMO, device="cpu")
    return [llm.chat(ask(text), GREEDY)[0].token_ids for text in PROMPTS]


Run = Callable[[Callable[[Replicas], Awaitable[T]]], T]


def test_the_words_of_one_from_both(running: Run[None], words: list[list[int]]) -> None:
    async def test(llm: Replicas) -> None:
        before = [(await engine.stats()).decode_tokens for engine in llm.engines]
        answers = await asyncio.gather(*(last(llm, ask(text)) for text in PROMPTS * 2))
        assert [answer.token_ids for answer in answers] == words * 2
        assert len({answer.request_id for answer in answers}) == len(answers)
        after = [(await engine.stats()).decode_tokens for engine in llm.engines]
        assert all(more > less for more, less in zip(after, before, strict=True)), "both have worked"
        stats = await llm.stats()
        assert stats.decode_tokens == sum(after)
        assert (stats.running, stats.kv_blocks_used, llm.health) == (0, 0, "ready")

    running(test)


def test_a_conversation_comes_back_to_where_its_beginning_is_cached(running: Run[None]) -> None:
    async def test(llm: Replicas) -> None:
        for i in range(4):
            talk = ask(f"{i}: " + "北京是中国的首都。" * 30)
            answer = await last(llm, talk)
            before = await llm.stats()
            follow_up = [*talk, {"role": "assistant", "content": answer.text}, *ask("Hi")]
            await last(llm, follow_up)
            hits = (await llm.stats()).prefix_hit_tokens - before.prefix_hit_tokens
            assert hits >= len(answer.prompt_token_ids) - llm.options.block_size

    running(test)


def test_choices_embeddings_aborts_and_errors(running: Run[None]) -> None:
    async def test(llm: Replicas) -> None:
        sampled = replace(GREEDY, temperature=1.0, seed=3)
        first, second = await asyncio.gather(
            last(llm, "Once upon", sampled, request_id="one"), last(llm, "Once upon", sampled, choice=1, after="one")
        )
        assert first.token_ids != second.token_ids
        one = LLM(DEMO, device="cpu").embed("Hi")[0]
        assert await llm.embed("Hi") == pytest.approx(one, rel=1e-2, abs=1e-2)
        async with aclosing(llm.generate("Hi", LONG)) as outputs:
            begun = await anext(outputs)
            await llm.abort(begun.request_id)
            ended = [output async for output in outputs][-1]
        assert ended.finish_reason == "abort"
        named = asyncio.create_task(last(llm, "Hi", LONG, request_id="named"))
        while not (await llm.stats()).running:
            await asyncio.sleep(0.01)
        await llm.abort("named")
        assert (await named).finish_reason == "abort"
        await llm.abort(999999)
        with pytest.raises(PromptError, match="no text, no messages"):
            await last(llm, 7)
        with pytest.raises(OptionError, match="tools belong to a conversation"):
            await last(llm, "Hi", tools=[{}])

    running(test)


def test_one_dies_and_the_others_go_on(running: Run[None], words: list[list[int]]) -> None:
    async def test(llm: Replicas) -> None:
        streams = [llm.generate(ask(text), LONG) for text in PROMPTS[:4]]
        for stream in streams:
            await anext(stream)
        assert all([(await engine.stats()).running for engine in llm.engines])
        pid = llm.engines[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while llm.engines[0].health == "ready":
            await asyncio.sleep(0.001)
        assert llm.health == "ready"
        answers = await asyncio.gather(*(last(llm, ask(text)) for text in PROMPTS))
        assert [answer.token_ids for answer in answers] == words
        ended = 0
        for stream in streams:
            try:
                async for _ in stream:
                    pass
            except EngineError as error:
                ended += 1
                assert "repeat the request" in str(error)
        assert 0 < ended < 4
        while llm.engines[0].health != "ready":
            await asyncio.sleep(0.01)
        assert llm.num_restarts == 1
        answers = await asyncio.gather(*(last(llm, ask(text)) for text in PROMPTS))
        assert [answer.token_ids for answer in answers] == words

    running(test)


def test_a_folder_that_cannot_be_loaded_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        asyncio.run(Replicas(tmp_path, data_parallel=2, device="cpu").start())


def test_draining_ends_with_the_last_answer() -> None:
    async def test() -> None:
        async with Replicas(DEMO, device="cpu", data_parallel=2, threads=1) as llm:
            answers = [asyncio.create_task(last(llm, ask(text))) for text in PROMPTS[:3]]
            while not (await llm.stats()).running:
                await asyncio.sleep(0.01)
            await llm.drain()
            assert llm.health == "draining"
            assert all(answer.finish_reason for answer in await asyncio.gather(*answers))
            with pytest.raises(EngineError, match="takes no more requests"):
                await last(llm, "Hi")

    asyncio.run(test())
