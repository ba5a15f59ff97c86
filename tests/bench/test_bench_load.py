"""Traces are read as they were written; lengths, times and prompts are what was asked for."""

from __future__ import annotations

import csv
import itertools
import re
import statistics
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tiny_chat

from glm4.bench.load import Job, arriving_at_random, fit, random_jobs, random_prompts, read_trace
from glm4.errors import PromptError
from glm4.text.tokenizer import Tokenizer

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:16:00,5,6\n"
    )
    assert read_trace(str(file), 2) == [Job(374, 44, 0.0), Job(396, 109, pytest.approx(4.314579, abs=1e-6))]
    assert len(read_trace(str(file), 9)) == 3


def test_azures_trace(shared: Path) -> None:
    file = shared / "data" / "AzureLLMInferenceTrace_conv.csv"
    jobs = read_trace(str(file), 10**6)
    with file.open(newline="") as rows:
        _, *rest = csv.reader(rows)
    assert [(job.prompt_tokens, job.new_tokens) for job in jobs] == [(int(row[1]), int(row[2])) for row in rest]
    first, last = (datetime.strptime(rest[i][0][:26], "%Y-%m-%d %H:%M:%S.%f") for i in (0, -1))
    assert jobs[-1].arrival == pytest.approx((last - first).total_seconds(), abs=1e-5)
    assert all(earlier.arrival <= later.arrival for earlier, later in itertools.pairwise(jobs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: no column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens\n", ":1: no column GeneratedTokens; a trace has TIMESTAMP, ContextTokens, Gener"),
        (HEADER, " holds no requests"),
        (HEADER + "2023-11-16 18:15:46,1,2\nyesterday,3,4\n", ":3: Invalid isoformat string: 'yesterday'"),
        (HEADER + "2023-11-16 18:15:46,one,2\n", ":2: invalid literal"),
        (HEADER + "2023-11-16 18:15:46,1\n", ":2: invalid literal"),
        (HEADER + "2023-11-16 18:15:46,-1,2\n", ":2: a number of tokens is below 0"),
    ],
)
def test_a_trace_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(PromptError, match="trace.csv" + re.escape(message)):
        read_trace(str(tmp_path / "trace.csv"), 9)


def test_a_trace_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot be read: No such file"):
        read_trace(str(tmp_path / "trace.csv"), 9)
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="is no CSV file"):
        read_trace(str(tmp_path / "trace.csv"), 9)


def test_random_lengths() -> None:
    jobs = random_jobs(2000, 100, 10, seed=1)
    assert {job.prompt_tokens for job in jobs} == set(range(50, 151))
    assert {job.new_tokens for job in jobs} == set(range(5, 16))
    assert statistics.fmean(job.prompt_tokens for job in jobs) == pytest.approx(100, rel=0.05)
    assert random_jobs(2000, 100, 10, seed=1) == jobs != random_jobs(2000, 100, 10, seed=2)


def test_poisson_arrivals() -> None:
    """Gaps of a Poisson process are exponential: mean and standard deviation are both 1 / rate."""
    jobs = arriving_at_random([Job(1, 1)] * 5000, rate=4.0, seed=3)
    gaps = [later.arrival - earlier.arrival for earlier, later in itertools.pairwise(jobs)]
    assert jobs[0].arrival == 0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(2.718281828**-1, rel=0.05)


@given(
    st.lists(st.builds(Job, st.integers(0, 5000), st.integers(0, 5000), st.just(1.5)), min_size=1),
    st.floats(0.01, 3),
    st.integers(2, 4000),
)
def test_lengths_fit(jobs: list[Job], scale: float, longest: int) -> None:
    fitted, clipped = fit(jobs, scale, longest)
    changed = 0
    for job, found in zip(jobs, fitted, strict=True):
        wanted = max(1, round(job.prompt_tokens * scale)), max(1, round(job.new_tokens * scale))
        got = found.prompt_tokens, found.new_tokens
        assert min(got) >= 1
        assert sum(got) <= longest
        assert found.arrival == job.arrival
        assert got == wanted or sum(got) == longest
        changed += got != wanted
    assert clipped == changed


def test_prompts_share_what_was_asked_for_and_nothing_else(tmp_path: Path) -> None:
    write_tiny_chat(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    jobs = [Job(length, 1) for length in (3, 8, 40, 200)]
    prompts = random_prompts(jobs, tokenizer, seed=4, shared_prefix=8)
    assert [len(prompt) for prompt in prompts] == [3, 8, 40, 200]
    assert prompts[0] == prompts[1][:3]
    assert prompts[2][:8] == prompts[3][:8] == prompts[1]
    assert prompts[2][8:] != prompts[3][8:40]
    used = Counter(token for prompt in random_prompts([Job(20_000, 1)], tokenizer, seed=4) for token in prompt)
    assert set(used) == set(range(256))  # its bytes, and none of the control tokens
