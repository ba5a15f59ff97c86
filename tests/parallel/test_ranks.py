"""A model over several ranks: real processes on tiny random weights, compared with one process."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyCheckpoint, edit_json, write_tiny_chat

from glm4 import LLM, AsyncLLM, SamplingParams
from glm4.engine.parallel_runner import ParallelRunner
from glm4.engine.request import RequestOutput
from glm4.engine.step import StepPlan, StepResult
from glm4.errors import CheckpointError, EngineError, Glm4Error, LostRankError, OptionError
from glm4.model.modeling_glm4_infer import RowParallel
from glm4.ops.cpu import library
from glm4.ops.cpu.linear import make_quantized_linear
from glm4.options import EngineOptions
from glm4.parallel import followers, ranks
from glm4.parallel.control import Kind, Leader
from glm4.parallel.ranks import Ranks
from glm4.quantization.layout import Cut, chosen_layout
from glm4.quantization.quantize import quantize
from glm4.quantization.slices import quantized_part

QUESTIONS = ["请介绍一下北京", "What is the capital of France?", "你好", "三加五等于几？" * 9]
FREE = SamplingParams(max_new_tokens=24, ignore_eos=True)
SHAPE: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_chat(tmp_path_factory.mktemp("ranks"), **SHAPE)


@pytest.fixture(scope="module")
def alone(tiny: TinyCheckpoint) -> LLM:
    return LLM(tiny.path, threads=1)


@contextmanager
def over_ranks(path: Path, **options: Any) -> Iterator[LLM]:
    llm = LLM(path, **{"threads": 1, "rank_timeout": 20.0} | options)
    try:
        yield llm
    finally:
        llm.close()


def ask(llm: LLM, sampling: SamplingParams = FREE) -> list[RequestOutput]:
    return llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], sampling)


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def follower_pids(leader: int | None = None) -> list[int]:
    """Ranks that this process, or another leader, started, and that are not gone."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text(encoding="utf-8")
            line = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if f"PPid:\t{leader or os.getpid()}\n" in text and b"follower_process" in line and "State:\tZ" not in text:
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor_parallel": 2},
        {"tensor_parallel": 4},
        {"tensor_parallel": 8},
        {"pipeline_parallel": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 2},
    ],
    ids=lambda degrees: "-".join(f"{name.split('_')[0]}{degree}" for name, degree in degrees.items()),
)
def test_answers_and_logits_equal_those_of_one_process(
    tiny: TinyCheckpoint, alone: LLM, degrees: dict[str, int]
) -> None:
    before = set(Path("/dev/shm").iterdir())
    sampled = SamplingParams(max_new_tokens=12, do_sample=True, temperature=1.0, seed=3, n=2, ignore_eos=True)
    schema = SamplingParams(
        max_new_tokens=60,
        json_schema={
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    )
    with over_ranks(tiny.path, **degrees) as llm:
        for ours, theirs in zip(ask(llm), ask(alone), strict=True):
            assert ours.token_ids == theirs.token_ids
        for ours, theirs in zip(ask(llm, sampled), ask(alone, sampled), strict=True):
            assert ours.token_ids == theirs.token_ids
        assert [each.text for each in ask(llm, schema)] == [each.text for each in ask(alone, schema)]
        ids = llm.tokenizer.encode("东边日出西边雨，道是无晴却有晴。")
        torch.testing.assert_close(llm.logits([ids])[0], alone.logits([ids])[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(llm.hidden_states([ids])[0], alone.hidden_states([ids])[0], rtol=0, atol=1e-5)
    assert follower_pids() == []
    assert set(Path("/dev/shm").iterdir()) <= before


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's arithmetic, which rounds no activations, and gloo's collectives, in every rank."""
    monkeypatch.setenv(library.LIBRARY_VARIABLE, "/nowhere.so")
    library._open.cache_clear()
    yield
    library._open.cache_clear()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.usefixtures("no_kernels")
def test_quantised_weights_shard(tmp_path: Path, quantization: str, degree: int) -> None:
    """The intermediate size of three groups of 128 is cut unevenly in two, and through groups in four."""
    tiny = write_tiny_chat(tmp_path, **SHAPE | {"intermediate_size": 384, "hidden_size": 256, "head_dim": 32})
    one = LLM(tiny.path, quantization=quantization, threads=1)
    ids = one.tokenizer.encode("东边日出西边雨，道是无晴却有晴。")
    with over_ranks(tiny.path, tensor_parallel=degree, quantization=quantization) as several:
        torch.testing.assert_close(several.logits([ids])[0], one.logits([ids])[0], rtol=0, atol=2e-5)
        assert [each.token_ids for each in ask(several)] == [each.token_ids for each in ask(one)]


class InTurn:
    """The collectives of ranks that are computed one after the other: what each gave is kept."""

    rank, size = 0, 2

    def __init__(self, largest: torch.Tensor) -> None:
        self.largest, self.sums = largest, []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.sums.append(x)
        return sum(self.sums)

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        assert bool((x <= self.largest).all())
        return self.largest


def test_activations_are_rounded_as_those_of_the_whole() -> None:
    """Each rank sees a part of a token's values, and rounds it by the largest of all."""
    if library.load() is None:
        pytest.skip("there are no native kernels here, so activations are not rounded")
    torch.manual_seed(0)
    x, w = torch.randn(5, 512) * torch.logspace(-2, 1, 512), torch.randn(96, 512)
    whole = quantize(w, chosen_layout("model.layers.0.mlp.down_proj.weight", (96, 512), "int4", 128))
    shared = InTurn(x.abs().amax(-1))
    for ends in ((0, 128), (128, 512)):
        part = make_quantized_linear(quantized_part(whole, Cut(1, (ends,))))
        got = RowParallel(part, shared)(x[:, slice(*ends)])
    torch.testing.assert_close(got, make_quantized_linear(whole)(x), rtol=1e-5, atol=1e-4)


def test_speculation_and_prefix_reuse_over_ranks(tiny: TinyCheckpoint, alone: LLM) -> None:
    with over_ranks(tiny.path, tensor_parallel=2, speculative_tokens=4, block_size=4) as llm:
        for _ in range(2):  # the second time prompts are found in the cache
            assert [each.token_ids for each in ask(llm)] == [each.token_ids for each in ask(alone)]
        assert llm.engine.scheduler.stats.hit_tokens > 0


@pytest.mark.parametrize("degrees", [{"pipeline_parallel": 2}, {"tensor_parallel": 2, "pipeline_parallel": 2}])
def test_stages_work_on_steps_of_their_own(
    tiny: TinyCheckpoint, alone: LLM, degrees: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than one step takes, sampled ones and aborted ones among them: the words of one process."""
    prompts = [f"{i} 加五等于几？" * (1 + i % 5) for i in range(40)]
    sampled = SamplingParams(max_new_tokens=8, do_sample=True, temperature=1.0, seed=3, ignore_eos=True)
    with over_ranks(tiny.path, max_batch_tokens=128, max_batch_requests=40, **degrees) as llm:
        engine, most, start = llm.engine, 0, ParallelRunner.start

        def counted(self: ParallelRunner, plan: StepPlan) -> Callable[[], StepResult]:
            nonlocal most
            most = max(most, 1 + len(engine._underway))
            return start(self, plan)

        monkeypatch.setattr(ParallelRunner, "start", counted)
        for sampling in (FREE, sampled):
            ours, theirs = (each.generate(prompts, sampling) for each in (llm, alone))
            assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]
        ids = [engine.add(llm.tokenizer.encode(prompt), FREE) for prompt in prompts]
        for _ in range(4):
            engine.step()
        engine.abort(*ids)
        while engine.has_work:
            assert engine.step() == []
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
        assert ask(llm)[0].token_ids == ask(alone)[0].token_ids
    assert most == 2


def test_an_aborted_stream_leaves_the_ranks_in_step(tiny: TinyCheckpoint, alone: LLM) -> None:
    with over_ranks(tiny.path, tensor_parallel=2) as llm:
        for _ in range(3):
            stream = llm.stream("abc", FREE)
            next(stream)
            stream.close()
        assert [each.token_ids for each in ask(llm)] == [each.token_ids for each in ask(alone)]


def test_a_degree_that_does_not_divide_is_refused_before_anything_loads(tiny: TinyCheckpoint) -> None:
    with pytest.raises(OptionError, match="tensor_parallel 3"):
        LLM(tiny.path, tensor_parallel=3)
    assert follower_pids() == []


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_while_it_answers_is_one_error(tiny: TinyCheckpoint, sign: int) -> None:
    long = replace(FREE, max_new_tokens=400)
    llm = LLM(tiny.path, tensor_parallel=2, threads=1, rank_timeout=3.0)
    [pid] = follower_pids()
    threading.Timer(0.5, os.kill, (pid, sign)).start()
    with pytest.raises(EngineError, match=rf"rank 1 .*pid {pid}"):
        while True:
            llm.generate("abc", long)
    with pytest.raises(LostRankError, match="rank 1"):
        llm.engine.runner.execute(StepPlan([]))
    llm.close()
    deadline = time.monotonic() + 10
    while follower_pids() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert follower_pids() == []


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("degrees", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=["tensor", "pipeline"])
def test_a_rank_that_is_lost_with_a_prompt_in_hand(
    tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, degrees: dict[str, int], sign: int
) -> None:
    tell = Leader.tell

    def tell_and_kill(leader: Leader, kind: Kind, payload: bytes = b"") -> None:
        tell(leader, kind, payload)
        if kind is Kind.PLAN:
            os.kill(pid, sign)

    with over_ranks(tiny.path, rank_timeout=3.0, **degrees) as llm:
        [pid] = follower_pids()
        monkeypatch.setattr(Leader, "tell", tell_and_kill)
        with pytest.raises(EngineError, match=rf"rank 1 .*pid {pid}"):
            llm.generate("天涯何处无芳草" * 20, FREE)
    assert follower_pids() == []


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_while_it_loads(tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, sign: int) -> None:
    loading = Ranks.loading

    def load_and_kill(self: Ranks) -> None:
        loading(self)
        with suppress(ProcessLookupError):
            for pid in follower_pids():
                os.kill(pid, sign)

    monkeypatch.setattr(Ranks, "loading", load_and_kill)
    with pytest.raises(EngineError, match=r"rank 1 .*pid"):
        LLM(tiny.path, tensor_parallel=2, threads=1, rank_timeout=3.0).generate("abc", FREE)
    assert follower_pids() == []


def test_a_rank_with_another_folder_is_refused(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tiny_chat(tmp_path, **SHAPE).path
    edit_json(other / "config.json", rms_norm_eps=0.01)
    start = followers._start_follower

    def start_elsewhere(size: int, rank: int, options: EngineOptions, port: int) -> subprocess.Popen[bytes]:
        return start(size, rank, replace(options, model=str(other)), port)

    monkeypatch.setattr(followers, "_start_follower", start_elsewhere)
    with pytest.raises(CheckpointError, match="rank 1 has another model than rank 0"):
        LLM(tiny.path, tensor_parallel=2, threads=1)
    assert follower_pids() == []


def test_an_error_on_another_rank_is_the_leaders(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = write_tiny_chat(tmp_path, **SHAPE).path
    weights = sorted(broken.glob("*.safetensors"))[-1]
    os.truncate(weights, weights.stat().st_size - 100)
    start = followers._start_follower
    monkeypatch.setattr(
        followers, "_start_follower",
        lambda size, rank, options, port: start(size, rank, replace(options, model=str(broken)), port),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"rank 1 .*safetensors"):
        LLM(tiny.path, tensor_parallel=2, threads=1)
    assert follower_pids() == []


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors.index.json", "model-00001-of-00005.safetensors"])
def test_what_all_ranks_meet_is_said_once(tmp_path: Path, file: str) -> None:
    tiny = write_tiny_chat(tmp_path, **SHAPE)
    broken = tiny.path / file
    broken.write_bytes(broken.read_bytes()[:100])
    command = [sys.executable, "-m", "glm4", "generate", "Hi", "-m", str(tiny.path), "--tensor-parallel", "2"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 3
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and file in line


@pytest.mark.parametrize("seconds", [0.0, 0.8, 1.6, 2.4])
def test_a_rank_that_is_killed_while_it_starts_or_loads(
    tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Wherever it is by then: before it says hello, meeting the others, loading, or ready."""
    start = followers._start_follower

    def start_and_kill(*said: Any) -> subprocess.Popen[bytes]:
        process = start(*said)
        threading.Timer(seconds, process.kill).start()
        return process

    monkeypatch.setattr(followers, "_start_follower", start_and_kill)
    with pytest.raises(Glm4Error, match="rank 1"):
        llm = LLM(tiny.path, tensor_parallel=2, threads=1, rank_timeout=5.0)
        while True:
            llm.generate("abc", FREE)
    deadline = time.monotonic() + 10
    while follower_pids() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert follower_pids() == []


def test_a_rank_that_is_stopped_while_it_starts(tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    start = followers._start_follower

    def start_and_stop(*said: Any) -> subprocess.Popen[bytes]:
        process = start(*said)
        process.send_signal(signal.SIGSTOP)
        return process

    monkeypatch.setattr(followers, "_start_follower", start_and_stop)
    monkeypatch.setattr(ranks, "_OWN_START_SECONDS", 2.0)
    with pytest.raises(EngineError, match="rank 1 has not come within 2 s"):
        LLM(tiny.path, tensor_parallel=2, threads=1, rank_timeout=1.0)
    assert follower_pids() == []


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_the_ranks_of_a_leader_that_is_lost_leave(tiny: TinyCheckpoint, sign: int) -> None:
    script = (
        "import sys; from glm4 import LLM, AsyncLLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], tensor_parallel=2, threads=1, rank_timeout=2.0)\n"
        "while True:\n"
        "    llm.generate('abc', SamplingParams(max_new_tokens=50, ignore_eos=True))\n"
        "    print('.', flush=True)\n"
    )
    leader = subprocess.Popen([sys.executable, "-c", script, str(tiny.path)], stdout=subprocess.PIPE)
    assert leader.stdout is not None
    leader.stdout.readline()
    [follower] = follower_pids(leader.pid)
    os.kill(leader.pid, sign)
    deadline = time.monotonic() + 15
    while is_running(follower) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(follower)
    leader.kill()
    leader.wait()
    leader.stdout.close()


@pytest.mark.parametrize("seconds", [0.0, 0.8, 1.6, 2.4])
def test_the_ranks_of_a_leader_that_is_killed_while_they_start_leave(tiny: TinyCheckpoint, seconds: float) -> None:
    """Wherever they are by then, even where they wait inside torch for its store."""
    script = "import sys; from glm4 import LLM; LLM(sys.argv[1], tensor_parallel=2, threads=1)"
    leader = subprocess.Popen([sys.executable, "-c", script, str(tiny.path)])
    while not (followers := follower_pids(leader.pid)):
        time.sleep(0.02)
    time.sleep(seconds)
    leader.kill()
    leader.wait()
    deadline = time.monotonic() + 10
    while any(map(is_running, followers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, followers))


def test_a_rank_that_is_killed_while_the_others_wait_for_it_inside_torch(tiny: TinyCheckpoint) -> None:
    """It is named, where torch itself would say after rank_timeout that nobody came."""
    script = (
        "import os, signal, sys; from glm4 import LLM; from glm4.parallel import followers, ranks\n"
        "start, open_group, started = followers._start_follower, ranks.dist.init_process_group, []\n"
        "def remember(*said):\n"
        "    started.append(start(*said))\n"
        "    return started[0]\n"
        "def kill_and_open(*said, **more):\n"
        "    started[0].kill()\n"
        "    open_group(*said, **more)\n"
        "followers._start_follower, ranks.dist.init_process_group = remember, kill_and_open\n"
        "LLM(sys.argv[1], pipeline_parallel=2, threads=1, rank_timeout=20.0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tiny.path)], capture_output=True, text=True, timeout=60)
    assert "glm4.errors.EngineError: rank 1 (pid" in done.stderr
    assert "is gone" in done.stderr


def test_an_unused_model_ends_its_ranks(tiny: TinyCheckpoint) -> None:
    llm = LLM(tiny.path, tensor_parallel=2, threads=1)
    assert len(follower_pids()) == 1
    del llm
    gc.collect()
    assert follower_pids() == []


def test_models_of_one_program_leave_each_other_alone(tiny: TinyCheckpoint, alone: LLM) -> None:
    hook = sys.excepthook
    with over_ranks(tiny.path, tensor_parallel=2) as first, over_ranks(tiny.path, pipeline_parallel=2) as second:
        with pytest.raises(EngineError, match="has a model over several ranks already"):
            LLM(tiny.path, pipeline_parallel=2, threads=1)
        assert ask(first)[0].token_ids == ask(alone)[0].token_ids
        first.close()
        assert ask(second)[0].token_ids == ask(alone)[0].token_ids
    assert sys.excepthook is hook
    assert follower_pids() == []


def test_several_rounds_leave_nothing(tiny: TinyCheckpoint) -> None:
    files = []
    for _ in range(4):
        with over_ranks(tiny.path, tensor_parallel=2) as llm:
            llm.generate("abc", SamplingParams(max_new_tokens=2))
        files.append(len(list(Path("/proc/self/fd").iterdir())))
        assert follower_pids() == []
    assert files[-1] <= files[1]  # the first round opens what is kept for good


def test_the_engine_in_its_own_process_has_ranks_too(tiny: TinyCheckpoint, alone: LLM) -> None:
    """One of them is killed: the engine is started again, with all of them, and serves."""
    ids = alone.tokenizer.encode("abc")
    expected = alone.generate([ids], FREE)[0].token_ids

    async def answer(llm: AsyncLLM) -> list[int]:
        outputs = [output async for output in llm.generate(ids, FREE)]
        return outputs[-1].token_ids

    async def serve() -> int:
        async with AsyncLLM(tiny.path, tensor_parallel=2, threads=1, rank_timeout=5.0) as llm:
            assert await answer(llm) == expected
            assert llm.pid is not None
            [follower] = follower_pids(llm.pid)
            os.kill(follower, signal.SIGKILL)
            with pytest.raises(
                EngineError, match=rf"exit code 9; its last words: rank 1 \(pid {follower} on .*repeat"
            ) as lost:
                await answer(llm)
            assert "Traceback" not in str(lost.value) and ".py" not in str(lost.value)
            assert await answer(llm) == expected
            [other] = follower_pids(llm.pid)
            return other

    other = asyncio.run(serve())
    deadline = time.monotonic() + 10
    while is_running(other) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(other)
