"""The engine's own process from the inside: a worker in a thread, whose engine a test can break."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import write_tiny_chat

from glm4 import LLM, SamplingParams
from glm4.engine.messages import (
    HEADER_BYTES,
    MESSAGE_VERSION,
    Abort,
    Add,
    FromCaller,
    FromEngine,
    GetStats,
    Progress,
    Stats,
    decode_from_engine,
    payload_length,
    to_frame,
)
from glm4.engine.step import StepPlan, StepResult
from glm4.engine.worker import MAX_FAILED_STEPS, CallerGone, Connection, Worker
from glm4.errors import EngineError, OptionError

FREE = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("chat")).path


@pytest.fixture(scope="module")
def sync(folder: Path) -> LLM:
    return LLM(folder)


class Caller:
    """The other end of a worker that runs in a thread here, so that a test can break its engine."""

    def __init__(self, llm: LLM) -> None:
        self.sock, theirs = socket.socketpair()
        self.ended_by: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, args=(llm, theirs))

    def _serve(self, llm: LLM, sock: socket.socket) -> None:
        with sock:
            try:
                Worker(llm.engine, Connection(sock)).run()
            except BaseException as error:
                self.ended_by = error

    def send(self, *messages: FromCaller) -> None:
        if self.thread.ident is None:  # from here on the engine is the worker's alone
            self.thread.start()
        self.sock.sendall(b"".join(map(to_frame, messages)))

    def receive(self) -> FromEngine:
        length = payload_length(self.sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
        message: FromEngine = decode_from_engine(self.sock.recv(length, socket.MSG_WAITALL))
        return message

    def close(self) -> None:
        self.sock.close()
        self.thread.join(30)


@pytest.fixture
def caller(sync: LLM) -> Iterator[Caller]:
    execute = sync.engine.runner.execute
    caller = Caller(sync)
    yield caller
    caller.close()
    sync.engine.runner.execute = execute  # type: ignore[method-assign]
    assert not caller.thread.is_alive()
    assert not sync.engine.has_work


def add(number: int, sampling: SamplingParams = FREE) -> Add:
    return Add(number, [40, 50, number], sampling, False, 0, 0, None)


def break_steps(llm: LLM, times: int) -> None:
    execute, broken = llm.engine.runner.execute, iter(range(times))

    def execute_or_fail(plan: StepPlan) -> StepResult:
        if next(broken, None) is not None:
            raise RuntimeError("a bit fell over")
        return execute(plan)

    llm.engine.runner.execute = execute_or_fail  # type: ignore[method-assign]


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(caller: Caller, sync: LLM) -> None:
    [expected] = sync.generate([40, 50, 9], FREE)  # before the worker's thread has the engine
    [expected] = sync.generate([40, 50, 9], FREE)
    break_steps(sync, 1)
    caller.send(add(7), add(8))
    failed = caller.receive()
    assert isinstance(failed, Progress)
    assert [number for number, _ in failed.failures] == [7, 8]
    for _, failure in failed.failures:
        assert isinstance(failure.error(), EngineError)
        assert "a bit fell over" in str(failure.error())
    caller.send(add(9))
    tokens: list[int] = []
    while len(tokens) < 40:
        progress = caller.receive()
        assert isinstance(progress, Progress)
        [output] = progress.outputs
        assert output.request_id == 9
        tokens += output.token_ids
    assert output.finish_reason == "length"
    assert tokens == expected.token_ids


def test_a_device_that_fails_every_step_ends_the_process(caller: Caller, sync: LLM) -> None:
    break_steps(sync, MAX_FAILED_STEPS)
    for number in range(MAX_FAILED_STEPS):
        caller.send(add(number))
        if number < MAX_FAILED_STEPS - 1:
            assert isinstance(caller.receive(), Progress)
    assert caller.sock.recv(1) == b""
    caller.close()
    assert isinstance(caller.ended_by, RuntimeError)


def test_a_worker_leaves_when_its_caller_does_though_it_has_work(caller: Caller, sync: LLM) -> None:
    caller.send(add(1), add(2), Abort(2), Abort(2), GetStats())
    stats = caller.receive()
    while not isinstance(stats, Stats):
        stats = caller.receive()
    assert stats.running + stats.waiting <= 1
    caller.close()
    assert isinstance(caller.ended_by, CallerGone)
    sync.engine.abort(*sync.engine._answers)


def test_frames_of_another_version_are_refused() -> None:
    frame = bytearray(to_frame(GetStats()))
    assert payload_length(frame) == len(frame) - HEADER_BYTES
    frame[0] = MESSAGE_VERSION + 1
    with pytest.raises(EngineError, match="changed while it ran"):
        payload_length(frame)


def test_a_form_that_takes_long_to_be_looked_at_stalls_no_other_answer(
    caller: Caller, sync: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end: Future[None] = Future()
    check = sync.engine.constraints.check

    def slow(params: SamplingParams) -> None:
        may_end.result(30)
        check(params)

    monkeypatch.setattr(sync.engine.constraints, "check", slow)
    held = replace(FREE, regex="[ab]{9}")
    caller.send(add(1, held), add(2, replace(FREE, regex="a(")), add(3, held), add(4))
    tokens: list[int] = []
    while len(tokens) < 40:
        progress = caller.receive()
        assert isinstance(progress, Progress) and not progress.failures
        [output] = progress.outputs
        assert output.request_id == 4
        tokens += output.token_ids
    caller.send(Abort(3))
    caller.send(GetStats())
    assert isinstance(caller.receive(), Stats)
    may_end.set_result(None)
    text, failed = "", []
    while len(text) < 9 or not failed:
        progress = caller.receive()
        assert isinstance(progress, Progress)
        failed += progress.failures
        for output in progress.outputs:
            assert output.request_id == 1
            text += output.delta
    [(number, failure)] = failed
    assert number == 2
    assert isinstance(failure.error(), OptionError)
    assert len(text) == 9 and set(text) <= {"a", "b"}
