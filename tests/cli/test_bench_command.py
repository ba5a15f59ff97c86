"""`glm4 bench`: a table for people, and a line of JSON that agrees with itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from programs import Bench, Ran

QUICK = ("-m", "model", "--no-ceilings")


def report(ran: Ran) -> dict[str, Any]:
    """The last line, after checks of what holds for every report."""
    assert ran.code == 0, ran.err
    *table, last = ran.out.splitlines()
    assert "to the first token" in "\n".join(table)
    found: dict[str, Any] = json.loads(last)
    assert found["requests_per_s"] == pytest.approx(found["requests"] / found["seconds"])
    assert found["new_tokens_per_s"] == pytest.approx(found["new_tokens"] / found["seconds"])
    assert found["prompt_tokens_per_s"] == pytest.approx(found["prompt_tokens"] / found["seconds"])
    for name in ("ttft_s", "inter_token_s", "end_to_end_s"):
        times = found[name]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= times["max"] <= found["seconds"]
        assert times["mean"] <= times["max"]
    assert found["ttft_s"]["mean"] <= found["end_to_end_s"]["mean"]
    assert (found["model"], found["device"], found["dtype"]) == ("model", "cpu", "float32")
    return found


def test_latency(bench: Bench) -> None:
    found = report(bench.glm4("bench", "latency", *QUICK, "--prompt-tokens", "20", "--new-tokens", "5"))
    assert (found["benchmark"], found["rounds"], found["requests"]) == ("latency", 5, 5)
    assert (found["prompt_tokens"], found["new_tokens"]) == (100, 25)
    assert found["prefill_tokens_per_s"] > 0
    assert found["decode_tokens_per_s"] > 0


def test_ceilings(bench: Bench) -> None:
    bench.monkeypatch.setattr("glm4.bench.ceilings._BUFFER_BYTES", 2**20)
    bench.monkeypatch.setattr("glm4.bench.ceilings._ENOUGH_SECONDS", 0.0001)
    ran = bench.glm4("bench", "latency", "-m", "model", "--prompt-tokens", "20", "--new-tokens", "5")
    ceilings = report(ran)["ceilings"]
    for share, used, best in (
        ("decode_share_of_memory", "decode_bytes_per_s", "memory_bytes_per_s"),
        ("prefill_share_of_matmul", "prefill_flop_per_s", "matmul_flop_per_s"),
    ):
        assert ceilings[share] == pytest.approx(ceilings[used] / ceilings[best])
        assert 0 < ceilings[share] < 1
    assert "of the ceiling" in ran.out


def test_random_lengths_at_once(bench: Bench) -> None:
    flags = ("--requests", "12", "--prompt-tokens", "40", "--new-tokens", "6")
    first, second = (report(bench.glm4("bench", "throughput", *QUICK, *flags)) for _ in range(2))
    assert (first["requests"], first["arrivals"], first["clipped_requests"]) == (12, "at once", 0)
    for key in ("prompt_tokens", "new_tokens"):
        assert first[key] == second[key]  # the seed is fixed
    assert first["prefix_cache"] == {"queried_tokens": first["prompt_tokens"], "hit_tokens": 0}


def test_a_shared_prefix_is_found_in_the_cache(bench: Bench) -> None:
    flags = ("--requests", "8", "--prompt-tokens", "64", "--new-tokens", "2", "--shared-prefix", "32", "--rate", "50")
    found = report(bench.glm4("bench", "throughput", *QUICK, *flags))
    assert found["arrivals"] == "poisson"
    hits = found["prefix_cache"]["hit_tokens"]
    assert 0 < hits <= 7 * 32
    assert hits % 16 == 0


def test_a_trace(bench: Bench) -> None:
    rows = "".join(f"2023-11-16 18:15:46.{i}00000,{1000 * i},{20 + i}\n" for i in range(9))
    Path("trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    flags = ("--trace", "trace.csv", "--requests", "7", "--scale-lengths", "0.1")
    found = report(bench.glm4("bench", "throughput", *QUICK, *flags))
    assert (found["requests"], found["trace"], found["arrivals"]) == (7, "trace.csv", "at once")
    # The context is 512: prompts are 1, 100, 200 … 500 and 511 of 600, answers 2, or 3 from the sixth on.
    assert found["prompt_tokens"] == 1 + 100 + 200 + 300 + 400 + 500 + 511
    assert found["new_tokens"] == 5 * 2 + 2 + 1
    assert found["clipped_requests"] == 1
    timed = report(bench.glm4("bench", "throughput", *QUICK, *flags, "--arrivals", "trace"))
    assert timed["arrivals"] == "trace"
    assert timed["seconds"] >= 0.6  # when the seventh arrives


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("throughput", "--scale-lengths", "0"), 2, "--scale-lengths 0: give a number above 0"),
        (("throughput", "--scale-lengths", "nan"), 2, "--scale-lengths nan: give a number above 0"),
        (("throughput", "--rate", "-1"), 2, "--rate -1: give a number of requests a second above 0"),
        (("throughput", "--arrivals", "trace"), 2, "--arrivals trace needs a --trace"),
        (
            ("throughput", "--trace", "a.csv", "--arrivals", "trace", "--rate", "1"),
            2,
            "--arrivals trace and --rate both",
        ),
        (("throughput", "--trace", "a.csv"), 4, "a.csv cannot be read: No such file or directory"),
        (
            ("latency", "--prompt-tokens", "510", "--new-tokens", "9"),
            2,
            "--prompt-tokens 510 and --new-tokens 9 do not",
        ),
        (("latency", "--rounds", "2"), 2, "Invalid value for '--rounds'"),
    ],
)
def test_what_cannot_be_measured(bench: Bench, flags: tuple[str, ...], code: int, message: str) -> None:
    ran = bench.glm4("bench", *flags, *QUICK)
    assert ran.code == code
    assert ran.message.startswith(message)


def test_no_model(bench: Bench) -> None:
    ran = bench.glm4("bench", "latency")
    assert ran.code == 2
    assert ran.message.startswith("no model: give its folder with -m DIR")


@pytest.mark.parametrize("name", ["latency", "throughput"])
def test_help_has_every_option_and_an_example(bench: Bench, name: str) -> None:
    ran = bench.glm4("bench", name, "--help")
    assert ran.code == 0
    assert f"glm4 bench {name}" in ran.out.partition("Examples:")[2]
    for option in ("--no-ceilings", "--bench-seed", "--max-batch-tokens", "--model"):
        assert option in ran.out
