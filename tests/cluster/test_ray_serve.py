"""Replicas on two nodes of a Ray cluster: the words of `LLM`, over HTTP too, while one of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import DEMO, put_together, read_events

from glm4 import LLM, RequestOutput, SamplingParams
from glm4.cluster.placement import Scale
from glm4.cluster.ray_serve import RayReplicas
from glm4.errors import CheckpointError, EngineError, OptionError
from glm4.options import EngineOptions, ServerOptions
from glm4.server.app import create_app

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=40)
LONG = replace(GREEDY, max_new_tokens=1500, ignore_eos=True)
PROMPTS = ["请介绍一下北京", "Tell me about Paris", "三加五等于几", "What is six times six?", "请介绍一下上海", "Hi"]
OPTIONS = EngineOptions(str(DEMO), device="cpu", threads=1)


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def last(llm: RayReplicas, prompt: Any, sampling: SamplingParams = GREEDY, **more: Any) -> RequestOutput:
    said = ""
    async for output in llm.generate(prompt, sampling, **more):
        said += output.delta
        assert output.text == said
    return output


def engine_pids() -> set[int]:
    """Processes that compute for a replica: children of an actor of Ray."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            is_engine = b"glm4.engine.worker" in (entry / "cmdline").read_bytes()
            is_replicas = b"ray::" in Path("/proc", parent, "cmdline").read_bytes()
        except OSError:  # it is gone
            continue
        found |= {int(entry.name)} if is_engine and is_replicas else set()
    return found


def test_two_replicas_one_of_which_dies(ray_cluster: str) -> None:
    offline = LLM(DEMO, device="cpu")
    words = [offline.chat(ask(text), GREEDY)[0].token_ids for text in PROMPTS]

    async def test() -> None:
        async with RayReplicas(OPTIONS, Scale(2, 2)) as llm:
            answers = await asyncio.gather(*(last(llm, ask(text)) for text in PROMPTS * 2))
            assert [answer.token_ids for answer in answers] == words * 2
            assert len({answer.request_id for answer in answers}) == len(answers)
            assert (llm.max_model_len, llm.sampling_defaults) == (offline.max_model_len, offline.sampling_defaults)

            each = await llm._handle.broadcast("stats").results_async()
            assert len(each) == 2
            assert all(stats.decode_tokens for stats in each), "both have worked"
            await comes_back(llm)
            await choices_aborts_and_errors(llm)
            await over_http(llm, words)
            await one_dies(llm, words, engine_pids())
        assert llm.health == "dead"
        with pytest.raises(EngineError, match="shut down"):
            await last(llm, "Hi")

    asyncio.run(asyncio.wait_for(test(), 120))


async def comes_back(llm: RayReplicas) -> None:
    """The next turn of a conversation finds its beginning in a cache."""
    for i in range(3):
        talk = ask(f"{i}: " + "北京是中国的首都。" * 30)
        answer = await last(llm, talk)
        before = await llm.stats()
        await last(llm, [*talk, {"role": "assistant", "content": answer.text}, *ask("Hi")])
        hits = (await llm.stats()).prefix_hit_tokens - before.prefix_hit_tokens
        assert hits >= len(answer.prompt_token_ids) - llm.options.block_size


async def choices_aborts_and_errors(llm: RayReplicas) -> None:
    sampled = replace(GREEDY, temperature=1.0, seed=3, logprobs=2)
    first, second = await asyncio.gather(
        last(llm, "Once upon", sampled, request_id="one"), last(llm, "Once upon", sampled, choice=1, after="one")
    )
    assert first.token_ids != second.token_ids
    assert [entry.token_id for entry in first.logprobs] == first.token_ids
    assert len(await llm.embed("Hi")) == 256
    async with aclosing(llm.generate("Hi", LONG)) as outputs:
        begun = await anext(outputs)
        await llm.abort(begun.request_id)
        assert [output async for output in outputs][-1].finish_reason == "abort"
    while (await llm.stats()).running:
        await asyncio.sleep(0.05)
    with pytest.raises(OptionError, match="n and best_of"):
        await last(llm, "Hi", replace(GREEDY, n=2))


async def over_http(llm: RayReplicas, words: list[list[int]]) -> None:
    """The application of `glm4 serve`, which does not know where its model runs."""
    app = create_app(llm, ServerOptions())  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://glm4") as client:
        body = {"messages": ask(PROMPTS[0]), "temperature": 0, "max_tokens": 40}
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert llm.tokenizer.encode(answer["choices"][0]["message"]["content"])[:3] == words[0][1:4]
        response = await client.post("/v1/chat/completions", json=body | {"stream": True})
        streamed = put_together(read_events(response.text))
        assert streamed[0]["content"] == answer["choices"][0]["message"]["content"]
        assert (await client.get("/health")).json() == {"status": "ready"}
        assert "glm4_running 0.0" in (await client.get("/metrics")).text
        refused = await client.post("/v1/completions", json={"prompt": "x " * 5000})
        assert refused.status_code == 400
        assert "2048" in refused.json()["error"]["message"]


async def one_dies(llm: RayReplicas, words: list[list[int]], engines: set[int]) -> None:
    """Its requests end with an error, all others are answered, and there are two again soon."""
    assert len(engines) == 2
    streams = [llm.generate(ask(text), LONG) for text in PROMPTS[:4]]
    for stream in streams:
        await anext(stream)
    os.kill(engines.pop(), signal.SIGKILL)
    ended = 0
    for stream in streams:
        try:
            async for _ in stream:
                pass
        except EngineError as error:
            ended += 1
            assert "repeat" in str(error)
    assert 0 < ended < 4
    answers = await asyncio.gather(*(last(llm, ask(text)) for text in PROMPTS))
    assert [answer.token_ids for answer in answers] == words
    assert llm.health == "ready"
    while len(await llm._handle.broadcast("stats").results_async(return_exceptions=True)) < 2:
        await asyncio.sleep(0.1)
    answers = await asyncio.gather(*(last(llm, ask(text)) for text in PROMPTS))
    assert [answer.token_ids for answer in answers] == words


def test_what_cannot_be_started(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        asyncio.run(RayReplicas(EngineOptions(str(tmp_path)), Scale(1, 1)).start())
    with pytest.raises(OptionError, match=r"takes 2 CPUs of one machine, and no machine .* has more than 1"):
        asyncio.run(RayReplicas(replace(OPTIONS, tensor_parallel=2), Scale(1, 1)).start())
    with pytest.raises(OptionError, match="max_model_len 9999 is beyond the 2048"):  # told by the replica itself
        asyncio.run(RayReplicas(replace(OPTIONS, max_model_len=9999), Scale(1, 1)).start())
