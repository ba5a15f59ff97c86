"""Sampling against transformers' own logits processors, and the random stream against counting."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glm4.engine.sampler import Sampler, SamplingState, draw, filtered_probabilities, penalised
from glm4.options import GREEDY, SamplingParams

VOCAB = 40


def state(params: SamplingParams, prompt: list[int], answer: list[int]) -> SamplingState:
    return SamplingState(params.over(GREEDY), len(prompt), prompt + answer)


def logits_of(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    prompt=tokens.filter(bool),
    answer=tokens,
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    repetition=st.floats(0.5, 2),
    least=st.integers(0, 12),
)
def test_distribution_equals_transformers(
    seed: int,
    prompt: list[int],
    answer: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
    least: int,
) -> None:
    row, stops = logits_of(seed), [3, 7]
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        min_new_tokens=least,
        stop_token_ids=tuple(stops),
    )
    ours = filtered_probabilities(penalised(row, state(params, prompt, answer)), params)
    steps = [
        RepetitionPenaltyLogitsProcessor(repetition),
        MinNewTokensLengthLogitsProcessor(len(prompt), least, stops),
        TemperatureLogitsWarper(temperature),
    ]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    theirs = LogitsProcessorList(steps)(torch.tensor([prompt + answer]), row[None].clone()).softmax(-1)[0]
    # Which side of a threshold a probability falls on may hang on its last bit; allow for one such token.
    different = (ours - theirs).abs() > 1e-5
    if different.any():
        assert ((ours > 0) != (theirs > 0)).sum() == 1
        edge = ours.where((ours > 0) != (theirs > 0), theirs)
        assert abs(float(ours.sum()) - 1) < 1e-5
        assert float(edge[(ours > 0) != (theirs > 0)].max()) < 1
    else:
        assert torch.equal(ours > 0, theirs > 0)


@given(answer=st.lists(st.integers(0, 5), max_size=10), presence=st.floats(-2, 2), frequency=st.floats(-2, 2))
@settings(max_examples=50)
def test_presence_and_frequency_follow_openais_formula(answer: list[int], presence: float, frequency: float) -> None:
    row = logits_of(1)
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    ours = penalised(row, state(params, [0, 1, 2], answer))
    for token_id in range(VOCAB):
        count = answer.count(token_id)
        wanted = float(row[token_id]) - count * frequency - (presence if count else 0)
        assert float(ours[token_id]) == pytest.approx(wanted, abs=1e-5)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 positions of one stream, and over 20,000 streams."""
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1])
    for drawn in (
        Counter(draw(probabilities, 7, position) for position in range(20_000)),
        Counter(draw(probabilities, seed, 3) for seed in range(20_000)),
    ):
        assert drawn[1] == 0
        expected = {i: float(p) * 20_000 for i, p in enumerate(probabilities) if p > 0}
        chi_square = sum((drawn[i] - count) ** 2 / count for i, count in expected.items())
        assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001


def test_same_seed_same_token_whatever_runs_beside_it() -> None:
    sampler = Sampler(VOCAB, [])
    params = SamplingParams(temperature=1.5, seed=11)
    mine, row = state(params, [1, 2], [5]), logits_of(3)
    alone = sampler(row[None].clone(), [mine])[0].token_ids
    others = [state(SamplingParams(temperature=0.7, seed=s, top_k=3), [4], [6, 7]) for s in range(5)]
    rows = torch.stack([*(logits_of(20 + s) for s in range(5)), row])
    assert sampler(rows, [*others, mine])[-1].token_ids == alone


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=5.0, seed=1), SamplingParams(logprobs=2)]
)
def test_unknown_ids_are_never_picked(params: SamplingParams) -> None:
    row = torch.zeros(VOCAB)
    row[30:] = 50.0
    sampler = Sampler(VOCAB, list(range(30, VOCAB)))
    for position in range(50):
        result = sampler(row[None].clone(), [state(params, [1], [2] * position)])[0]
        assert result.token_ids[0] < 30
        assert all(token_id < 30 for entry in result.logprobs for token_id, _ in entry.top)


def test_logprobs_are_the_models_own() -> None:
    """Before penalties and temperature; over the ids that can be picked."""
    row = logits_of(5)
    params = SamplingParams(temperature=0.5, seed=3, logprobs=4, repetition_penalty=1.7)
    [entry] = Sampler(VOCAB, [39])(row[None].clone(), [state(params, [1], [2])])[0].logprobs
    expected = row[:39].double().log_softmax(-1)
    assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)
    assert [token_id for token_id, _ in entry.top] == expected.topk(4).indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_greedy_takes_the_likeliest_after_penalties() -> None:
    row = torch.tensor([2.0, 1.9, 0.0])
    params = SamplingParams(frequency_penalty=0.2)
    assert Sampler(3, [])(row[None].clone(), [state(params, [1], [0])])[0].token_ids == [1]
