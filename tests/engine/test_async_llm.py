"""`AsyncLLM`: the words of `LLM`, from another process, whatever happens to that process or to its readers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tiny import write_tiny_chat

from glm4 import LLM, RequestOutput, SamplingParams
from glm4.engine.async_llm import AsyncLLM, RestartPolicy
from glm4.engine.messages import (
    Stats,
)
from glm4.errors import CheckpointError, EngineError, OptionError, PromptError

T = TypeVar("T")
FREE = SamplingParams(max_new_tokens=40, ignore_eos=True)
LONG = replace(FREE, max_new_tokens=450)


@dataclass
class Running:
    """An engine in its process, and the event loop that it lives in."""

    llm: AsyncLLM
    runner: asyncio.Runner

    def run(self, test: Callable[[AsyncLLM], Awaitable[T]]) -> T:
        async def main() -> T:
            return await asyncio.wait_for(_awaited(test(self.llm)), 60)

        return self.runner.run(main())


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("chat")).path


@pytest.fixture(scope="module")
def sync(folder: Path) -> LLM:
    return LLM(folder)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with asyncio.Runner() as runner:
        llm = runner.run(AsyncLLM(folder).start())
        yield Running(llm, runner)
        runner.run(llm.shutdown())


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def read(llm: AsyncLLM, prompt: Any, sampling: SamplingParams | None = FREE, **more: Any) -> RequestOutput:
    """The whole answer, once its pieces have been checked against it."""
    said = ""
    async for output in llm.generate(prompt, sampling, **more):
        said += output.delta
        assert output.text == said
    return output


async def until_idle(llm: AsyncLLM) -> Stats:
    while (stats := await llm.stats()).running or stats.waiting:
        await asyncio.sleep(0.01)
    return stats


def kill(llm: AsyncLLM, number: signal.Signals) -> int:
    assert llm.pid is not None
    pid = llm.pid
    os.kill(pid, number)
    return pid


def is_alive(pid: int) -> bool:
    """The process is there, and not only as an entry that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < until, f"process {pid} is still there"
        time.sleep(0.02)


def test_many_at_once_get_the_words_of_llm(running: Running, sync: LLM) -> None:
    prompts: list[Any] = [ask(f"{i} + {i} = ?") for i in range(12)] + [f"raw {i}" for i in range(6)]
    prompts += [[40 + i, 50, 60] for i in range(6)]
    params = [
        FREE,
        replace(FREE, temperature=0.9, top_k=50, seed=5, repetition_penalty=1.2),
        replace(FREE, logprobs=3, prompt_logprobs=2),
        replace(FREE, stop_token_ids=(70, 80, 90), max_new_tokens=100),
    ]
    requests = [(prompt, params[i % len(params)]) for i, prompt in enumerate(prompts)]

    async def all_at_once(llm: AsyncLLM) -> list[RequestOutput]:
        return await asyncio.gather(*(read(llm, prompt, sampling) for prompt, sampling in requests))

    for (prompt, sampling), output in zip(requests, running.run(all_at_once), strict=True):
        *_, expected = sync.stream(prompt, sampling)
        for exact in ("prompt_token_ids", "token_ids", "text", "finish_reason", "stop_reason"):
            assert getattr(output, exact) == getattr(expected, exact)
        for logprobs in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(output, logprobs), getattr(expected, logprobs)
            assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
            assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)


def test_choices_draw_different_words_and_share_the_prompt(running: Running, sync: LLM) -> None:
    drawn = replace(FREE, temperature=1.0, seed=11)

    async def two(llm: AsyncLLM) -> list[RequestOutput]:
        first = read(llm, ask("x" * 60), drawn, request_id="first")
        second = read(llm, ask("x" * 60), drawn, choice=1, after="first")
        return list(await asyncio.gather(first, second))

    expected = sync.chat(ask("x" * 60), replace(drawn, n=2))
    assert [output.text for output in running.run(two)] == [output.text for output in expected]


def test_answers_keep_their_form_and_wait_for_their_turn(running: Running, sync: LLM) -> None:
    params = SamplingParams(regex="[a-c]{30}", temperature=1.0, seed=3)

    async def together(llm: AsyncLLM) -> list[RequestOutput]:
        return await asyncio.gather(*(read(llm, ask("hi"), params, choice=choice) for choice in range(3)))

    expected = sync.chat(ask("hi"), replace(params, n=3))
    assert [output.text for output in running.run(together)] == [output.text for output in expected]


def test_what_is_known_of_the_model(running: Running, sync: LLM) -> None:
    llm = running.llm
    assert llm.health == "ready"
    for fact in ("max_model_len", "sampling_defaults", "has_chat_template", "thinks"):
        assert getattr(llm, fact) == getattr(sync, fact)


def test_leaving_an_answer_frees_its_blocks(running: Running) -> None:
    async def leave_in_every_way(llm: AsyncLLM) -> None:
        async def first_word(**more: Any) -> RequestOutput:
            async with aclosing(llm.generate(ask("hi"), LONG, **more)) as outputs:
                return await anext(outputs)

        async for _ in llm.generate(ask("hi"), LONG):
            break
        await first_word()
        task = asyncio.create_task(read(llm, ask("hi"), LONG))
        while (await llm.stats()).running == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stats = await llm.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)

    running.run(leave_in_every_way)


def test_abort_ends_the_answers_of_that_name(running: Running, sync: LLM) -> None:
    async def abort(llm: AsyncLLM) -> None:
        named, other = llm.generate(ask("hi"), LONG, request_id="mine"), llm.generate(ask("hello"), LONG)
        first, second = await anext(named), await anext(other)
        await llm.abort("nobody's")
        await llm.abort("mine")
        await llm.abort(second.request_id)
        last = [output async for output in named][-1]
        assert last.finish_reason == "abort"
        assert last.text.startswith(first.text)
        assert [output async for output in other][-1].finish_reason == "abort"
        assert (await llm.stats()).kv_blocks_used == 0
        [whole] = sync.chat(ask("hi"), LONG)
        assert whole.token_ids[: len(last.token_ids)] == last.token_ids

    running.run(abort)


@pytest.mark.parametrize(
    ("prompt", "more", "kind", "words"),
    [
        ("", {}, PromptError, "empty"),
        ("x" * 2**20, {}, PromptError, "tokens and prompt plus answer may have"),
        ([1, 99999], {}, PromptError, "token id outside"),
        ([1, 2.5], {}, PromptError, "no token ids"),
        ([1, 2**70], {}, OptionError, "too large"),
        ("\ud800", {}, PromptError, "lone surrogate"),
        ([{"role": "nobody", "content": "x"}], {}, PromptError, "nobody"),
        ("raw", {"tools": [{"name": "f"}]}, OptionError, "conversation"),
        ("raw", {"sampling": SamplingParams(n=2)}, OptionError, "one answer"),
        ("raw", {"priority": 1.5}, OptionError, "another type"),
        ("raw", {"sampling": SamplingParams(regex="a(")}, OptionError, "regex: unclosed group"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(
    running: Running, prompt: Any, more: dict[str, Any], kind: type[Exception], words: str
) -> None:
    async def beside_a_good_one(llm: AsyncLLM) -> None:
        good = asyncio.create_task(read(llm, "good"))
        with pytest.raises(kind, match=words) as raised:
            await read(llm, prompt, **({"sampling": None} | more))
        assert type(raised.value) is kind
        assert "\n" not in str(raised.value)
        assert len((await good).token_ids) == 40

    running.run(beside_a_good_one)
    assert running.llm.num_restarts == 0


def test_a_slow_reader_gets_all_words_in_fewer_pieces(running: Running, sync: LLM) -> None:
    async def read_slowly(llm: AsyncLLM) -> list[RequestOutput]:
        slow = llm.generate(ask("hi"), LONG)
        first = await anext(slow)
        assert (await read(llm, ask("quick"))).finish_reason == "length"
        await until_idle(llm)
        return [first, *[output async for output in slow]]

    first, rest = running.run(read_slowly)
    [whole] = sync.chat(ask("hi"), LONG)
    assert first.delta + rest.delta == whole.text
    assert (rest.token_ids, rest.finish_reason) == (whole.token_ids, "length")


def test_a_killed_engine_says_so_to_everybody_and_comes_back(
    running: Running, sync: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    async def kill_under_load(llm: AsyncLLM) -> RequestOutput:
        tasks = [asyncio.create_task(read(llm, ask(f"{i}"), LONG)) for i in range(70)]
        while (stats := await llm.stats()).running < 20 or stats.waiting == 0:
            await asyncio.sleep(0.001)
        killed = kill(llm, signal.SIGKILL)
        for failure in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(failure, EngineError)
            assert "SIGKILL" in str(failure)
        assert llm.health == "restarting"
        with pytest.raises(EngineError, match="restarting"):
            await llm.stats()
        answer = await read(llm, ask("hi"))
        assert (llm.health, llm.num_restarts) == ("ready", 1)
        assert not is_alive(killed)
        return answer

    assert running.run(kill_under_load).token_ids == sync.chat(ask("hi"), FREE)[0].token_ids
    assert "SIGKILL" in caplog.text


def test_drain_finishes_what_is_there_and_shutdown_leaves_no_process(folder: Path) -> None:
    async def main() -> None:
        loaded: list[tuple[int, int]] = []
        llm = AsyncLLM(folder, on_load=lambda *counts: loaded.append(counts))
        with pytest.raises(EngineError, match="not been started"):
            await read(llm, "early")
        async with llm:
            assert loaded[-1] == (len(loaded), len(loaded))
            pid = llm.pid
            assert pid is not None
            assert os.getpgid(pid) == pid, "Ctrl-C in a terminal would reach it"
            task = asyncio.create_task(read(llm, ask("hi"), LONG))
            while (await llm.stats()).running == 0:
                await asyncio.sleep(0.001)
            draining = asyncio.create_task(llm.drain())
            await asyncio.sleep(0)
            assert llm.health == "draining"
            with pytest.raises(EngineError, match="no more requests"):
                await read(llm, ask("late"))
            await draining
            assert len((await task).token_ids) == 450
        assert not is_alive(pid)
        assert llm.health == "dead"
        with pytest.raises(EngineError, match="shut down"):
            await read(llm, ask("late"))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_too_many_crashes_end_it(folder: Path) -> None:
    async def main() -> None:
        policy = RestartPolicy(max_restarts=1, backoff=0.0, wait=False)
        async with AsyncLLM(folder, restarts=policy) as llm:
            task = asyncio.create_task(read(llm, ask("hi"), LONG))
            while (await llm.stats()).running == 0:
                await asyncio.sleep(0.001)
            kill(llm, signal.SIGSEGV)
            with pytest.raises(EngineError, match=r"signal 11.*Fatal Python error: Segmentation fault"):
                await task
            with pytest.raises(EngineError, match="send the request again later"):
                await read(llm, ask("hi"))
            while llm.health != "ready":
                await asyncio.sleep(0.01)
            task = asyncio.create_task(read(llm, ask("hi"), LONG))
            while (await llm.stats()).running == 0:
                await asyncio.sleep(0.001)
            kill(llm, signal.SIGTERM)
            with pytest.raises(EngineError, match=r"signal 15.*after 1 restarts within 600 s"):
                await task
            assert (llm.health, llm.pid) == ("dead", None)
            with pytest.raises(EngineError, match="after 1 restarts"):
                await read(llm, ask("hi"))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_shutdown_ends_what_runs_and_kills_an_engine_that_hangs(folder: Path) -> None:
    async def main() -> None:
        llm = await AsyncLLM(folder).start()
        task = asyncio.create_task(read(llm, ask("hi"), LONG))
        while (await llm.stats()).running == 0:
            await asyncio.sleep(0.001)
        pid = kill(llm, signal.SIGSTOP)
        stats = asyncio.create_task(llm.stats())
        await asyncio.sleep(0)
        await llm.shutdown(timeout=0.1)
        for waiting in (task, stats):
            with pytest.raises(EngineError, match="shut down"):
                await waiting
        assert not is_alive(pid)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_folder_that_cannot_be_loaded_is_the_error_of_llm(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "model.safetensors.index.json" and not file.name.endswith("00001.safetensors"):
            (tmp_path / file.name).symlink_to(file)
    shard = next(tmp_path.glob("*.safetensors"))
    shard.unlink()
    shard.write_bytes(b"short")
    with pytest.raises(CheckpointError) as expected:
        LLM(tmp_path)
    llm = AsyncLLM(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        asyncio.run(asyncio.wait_for(llm.start(), 60))
    assert (type(raised.value), str(raised.value)) == (type(expected.value), str(expected.value))
    assert llm.health == "dead"


SCRIPT = """
import asyncio, sys
from glm4.engine.async_llm import AsyncLLM
from glm4.options import SamplingParams

async def main():
    async with AsyncLLM(sys.argv[1]) as llm:
        async for output in llm.generate("abc", SamplingParams(max_new_tokens=20, ignore_eos=True)):
            pass
        print(llm.pid, output.token_ids, "torch" in sys.modules, sys.stdin.readline().strip(), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_engine_goes_with_the_program_that_started_it(folder: Path, sync: LLM, tmp_path: Path) -> None:
    """A script without a guard, killed; and all it has on its standard streams is its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('imported from the current folder')", encoding="utf-8")
    script = script.rename(tmp_path.with_name("script.py"))  # so that only the current folder has the trap
    command = [sys.executable, str(script), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("my own line\n")
        program.stdin.flush()
        pid, _, rest = program.stdout.readline().partition(" ")
        [expected] = sync.generate("abc", replace(FREE, max_new_tokens=20))
        assert rest == f"{expected.token_ids} False my own line\n"
        assert is_alive(int(pid))
        program.kill()
        wait_until_gone(int(pid))
        assert program.stdout.read() == ""
