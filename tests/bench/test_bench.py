"""What a benchmark reports is what a clock of our own saw; the prompts come when they should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tiny, write_tiny_chat
from torch.utils.flop_counter import FlopCounterMode

from glm4.bench.ceilings import Ceilings, Work, multiply_speed, read_speed
from glm4.bench.load import Job, random_prompts
from glm4.bench.run import RequestTimes, drive, joined, percentile, report, shares, summary
from glm4.engine.llm import LLM
from glm4.engine.request import RequestOutput
from glm4.engine.step import StepPlan, StepResult
from glm4.model.configuration_glm4 import Glm4Config

FINITE = st.floats(-1e6, 1e6)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(write_tiny_chat(tmp_path_factory.mktemp("tiny")).path)


class Clock:
    """A clock on which a step takes a second, reading it nothing, and sleeping as long as it should."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept, self.execute = 100.0, [], llm.engine.runner.execute
        self.plans: list[StepPlan] = []
        monkeypatch.setattr(llm.engine.runner, "execute", self.step)

    def step(self, plan: StepPlan) -> StepResult:
        self.now += 1
        self.plans.append(plan)
        return self.execute(plan)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_times_on_a_clock_of_our_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(llm, monkeypatch)
    jobs = [Job(5, 4), Job(6, 1), Job(7, 3, arrival=1.5), Job(8, 2, arrival=20.0)]
    finished: list[float] = []
    run = drive(
        llm.engine, jobs, random_prompts(jobs, llm.tokenizer, 0), lambda: finished.append(clock.now), clock, clock.sleep
    )
    # Steps end at 1, 2, 3, 4, 5 (the third request is seen at 2) and, after a pause until 20, at 21 and 22.
    assert [(times.arrival, times.first, times.last) for times in run.requests] == [
        (0.0, 1.0, 4.0),
        (0.0, 1.0, 1.0),
        (1.5, 3.0, 5.0),
        (20.0, 21.0, 22.0),
    ]
    assert [times.gaps for times in run.requests] == [[1.0] * 3, [], [1.0] * 2, [1.0]]
    assert [times.new_tokens for times in run.requests] == [4, 1, 3, 2]
    assert clock.slept == [15.0]
    assert sorted(finished) == [101.0, 104.0, 105.0, 122.0]
    assert run.seconds == 22
    assert run.decode_steps == 4  # those that end at 2, 4, 5 and 22
    found = report(run)
    assert (found["requests"], found["prompt_tokens"], found["new_tokens"]) == (4, 26, 10)
    assert found["new_tokens_per_s"] == pytest.approx(10 / 22)
    assert found["ttft_s"]["max"] == 1.5
    assert found["end_to_end_s"]["mean"] == pytest.approx((4 + 1 + 3.5 + 2) / 4)


def test_lengths_are_exact_and_the_engine_is_left_empty(llm: LLM) -> None:
    jobs = [Job(10 + i, 1 + i % 7) for i in range(30)]
    run = drive(llm.engine, jobs, random_prompts(jobs, llm.tokenizer, 1))
    assert [(t.prompt_tokens, t.new_tokens) for t in run.requests] == [(j.prompt_tokens, j.new_tokens) for j in jobs]
    assert [len(t.gaps) for t in run.requests] == [j.new_tokens - 1 for j in jobs]
    assert run.stats.prefill_tokens + run.stats.decode_tokens >= sum(j.prompt_tokens for j in jobs)
    assert not llm.engine.has_work


def test_a_run_that_is_interrupted_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(plan: StepPlan) -> StepResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        drive(llm.engine, [Job(5, 5)] * 3, [[65, 66, 67, 68, 69]] * 3)
    assert not llm.engine.has_work


def test_tokens_of_one_step_share_its_time() -> None:
    times = RequestTimes(arrival=1.0, prompt_tokens=3)
    for now, count in ((3.0, 1), (5.0, 3), (5.5, 3), (6.0, 4)):
        times.take(RequestOutput(0, [1], [7] * count, "", "", None), now)
    assert times.gaps == [1.0, 1.0, 0.5 + 0.5]
    assert (times.time_to_first_token, times.end_to_end, times.new_tokens) == (2.0, 5.0, 4)
    assert math.isclose(sum(times.gaps), times.last - times.first)


@given(st.lists(FINITE, min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpys(samples: list[float], percent: float) -> None:
    assert percentile(samples, percent) == pytest.approx(float(numpy.percentile(samples, percent)), rel=1e-9, abs=1e-6)


def test_summary() -> None:
    found = summary(list(range(101)))
    assert found == {"mean": 50, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert summary([]) is None


def test_runs_add_up(llm: LLM) -> None:
    jobs = [Job(9, 3)]
    runs = [drive(llm.engine, jobs, random_prompts(jobs, llm.tokenizer, seed)) for seed in range(4)]
    whole = joined(runs)
    assert len(whole.requests) == 4
    assert whole.decode_steps == 8
    assert whole.stats.prefill_tokens == 36
    assert whole.seconds == pytest.approx(sum(run.seconds for run in runs))


@pytest.mark.parametrize("tied", [False, True])
def test_the_work_of_a_token_is_what_torch_counts(tmp_path: Path, tied: bool) -> None:
    """Against transformers' model: its matrix products for two prompts whose lengths differ by one token."""
    theirs = write_tiny(tmp_path, tie_word_embeddings=tied).theirs
    config = Glm4Config.from_dict(theirs.config.to_dict(), "config.json")

    def flop(length: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            theirs(torch.ones(1, length, dtype=torch.long), logits_to_keep=1)
        return int(counter.get_flop_counts()["Global"][torch.ops.aten.mm]) + int(
            counter.get_flop_counts()["Global"].get(torch.ops.aten.addmm, 0)
        )

    work = Work.of(config, torch.bfloat16)
    assert work.flop_per_token == flop(21) - flop(20)
    weights = dict(theirs.named_parameters())  # a tied head is listed once
    embedding = 0 if tied else weights["model.embed_tokens.weight"].numel()
    assert work.bytes_per_step == 2 * (sum(weight.numel() for weight in weights.values()) - embedding)


def test_shares_of_the_ceilings(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(10, 5)]
    run = drive(llm.engine, jobs, random_prompts(jobs, llm.tokenizer, 5))
    run.stats.prefill_seconds, run.stats.decode_seconds = 2.0, 4.0
    found = shares(run, Work(bytes_per_step=100, flop_per_token=30), Ceilings(bytes_per_s=1000.0, flop_per_s=600.0))
    assert found["decode_bytes_per_s"] == 4 * 100 / 4.0
    assert found["decode_share_of_memory"] == pytest.approx(0.1)
    assert found["prefill_flop_per_s"] == 10 * 30 / 2.0
    assert found["prefill_share_of_matmul"] == pytest.approx(0.25)


def test_a_run_without_decode_steps_has_no_share_of_memory(llm: LLM) -> None:
    jobs = [Job(10, 1)]
    run = drive(llm.engine, jobs, random_prompts(jobs, llm.tokenizer, 6))
    found = shares(run, Work(100, 30), Ceilings(1000.0, 600.0))
    assert found["decode_share_of_memory"] is None
    assert report(run)["inter_token_s"] is None


def test_speeds_are_within_what_machines_do() -> None:
    device = torch.device("cpu")
    assert 1e8 < read_speed(device) < 1e13
    assert 1e8 < multiply_speed(device, torch.float32) < 1e16
