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

from glm4.engine.sampler import Sampler, SamplingState, draw, filtered_scores, penalise, random_point, unpack_mask
from glm4.engine.step import TokenLogprobs
from glm4.options import GREEDY, SamplingParams

VOCAB = 40


def state(params: SamplingParams, prompt: list[int], answer: list[int]) -> SamplingState:
    return SamplingState(params.over(GREEDY), len(prompt), prompt + answer)


def penalised(row: torch.Tensor, held: SamplingState) -> torch.Tensor:
    row = row.clone()
    penalise(row, held)
    return row


def pick(rows: torch.Tensor, states: list[SamplingState], unknown: list[int] | None = None) -> list[int]:
    return Sampler(unknown or [], rows.shape[1])(rows.clone(), states)[0]


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
    ours = filtered_scores(penalised(row, state(params, prompt, answer))[None], [params])[0].softmax(-1)
    steps = [
        RepetitionPenaltyLogitsProcessor(repetition),
        MinNewTokensLengthLogitsProcessor(len(prompt), least, stops),
        TemperatureLogitsWarper(temperature),
    ]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    theirs = LogitsProcessorList(steps)(torch.tensor([prompt + answer]), row[None].clone()).softmax(-1)[0]
    # Which side of a threshold a probability falls on may hang on its last bit: allow for one such token, and for any
    # that are together less than a float32 sum of probabilities can tell (where top_p is just below 1).
    edge = (ours > 0) != (theirs > 0)
    assert edge.sum() <= 1 or (ours + theirs)[edge].sum() < 1e-6
    ours, theirs = ours.masked_fill(edge, 0), theirs.masked_fill(edge, 0)
    assert torch.allclose(ours / ours.sum(), theirs / theirs.sum(), atol=1e-5)


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
        Counter(draw(probabilities.expand(20_000, -1), [random_point(7, p) for p in range(20_000)])),
        Counter(draw(probabilities.expand(20_000, -1), [random_point(seed, 3) for seed in range(20_000)])),
    ):
        assert drawn[1] == 0
        expected = {i: float(p) * 20_000 for i, p in enumerate(probabilities) if p > 0}
        chi_square = sum((drawn[i] - count) ** 2 / count for i, count in expected.items())
        assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001


def test_same_seed_same_token_whatever_runs_beside_it() -> None:
    params = SamplingParams(temperature=1.5, seed=11)
    mine, row = state(params, [1, 2], [5]), logits_of(3)
    [alone] = pick(row[None], [mine])
    others = [state(SamplingParams(temperature=0.7, seed=s, top_k=3), [4], [6, 7]) for s in range(5)]
    rows = torch.stack([*(logits_of(20 + s) for s in range(5)), row])
    assert pick(rows, [*others, mine])[-1] == alone


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=5.0, seed=1), SamplingParams(logprobs=2)]
)
def test_unknown_ids_are_never_picked(params: SamplingParams) -> None:
    row = torch.zeros(VOCAB)
    row[30:] = 50.0
    sampler = Sampler(list(range(30, VOCAB)), VOCAB)
    for position in range(50):
        [token], [entry] = sampler(row[None].clone(), [state(params, [1], [2] * position)])
        assert token < 30
        assert entry is None or all(token_id < 30 for token_id, _ in entry.top)


def test_logprobs_are_the_models_own() -> None:
    """Before penalties and temperature; over the ids that can be picked."""
    row = logits_of(5)
    params = SamplingParams(temperature=0.5, seed=3, logprobs=4, repetition_penalty=1.7)
    _, [entry] = Sampler([39], VOCAB)(row[None].clone(), [state(params, [1], [2])])
    assert isinstance(entry, TokenLogprobs)
    expected = row[:39].double().log_softmax(-1)
    assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)
    assert [token_id for token_id, _ in entry.top] == expected.topk(4).indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_greedy_takes_the_likeliest_after_penalties() -> None:
    row = torch.tensor([2.0, 1.9, 0.0])
    params = SamplingParams(frequency_penalty=0.2)
    assert pick(row[None], [state(params, [1], [0])]) == [1]


@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_a_large_vocabulary_is_filtered_alike(top_k: int, spread: float) -> None:
    """Flat and peaked rows beside each other: the short cut over the likeliest tokens changes nothing."""
    rows = torch.randn(4, 5000, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [[spread], [8.0], [1], [0.1]]
    )
    params = [SamplingParams(temperature=1.0, top_p=p, top_k=top_k) for p in (0.9, 0.5, 0.999, 1.0)]
    ours = filtered_scores(rows, params).softmax(-1)
    for row, mine, each in zip(rows, ours, params, strict=True):
        steps = [TopKLogitsWarper(top_k)] if top_k else []
        theirs = LogitsProcessorList([*steps, TopPLogitsWarper(each.top_p)])(torch.tensor([[0]]), row[None].clone())
        kept, their_kept = (mine > 0), (theirs[0] > -torch.inf)
        assert (kept != their_kept).sum() <= 1  # one token may fall on either side of the threshold by rounding
        assert torch.allclose(mine, theirs[0].softmax(-1), atol=1e-4)


def test_logit_bias_is_added() -> None:
    params = SamplingParams(logit_bias=((3, 100.0), (4, -100.0)))
    row = logits_of(9)
    ours = penalised(row, state(params, [1], []))
    assert (ours - row).nonzero().flatten().tolist() == [3, 4]
    assert pick(row[None], [state(params, [1], [])]) == [3]


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_masks_unpack(bits: list[bool]) -> None:
    packed = bytes(sum(bit << i for i, bit in enumerate(bits[j : j + 8])) for j in range(0, len(bits), 8))
    assert unpack_mask(packed, len(bits)).tolist() == bits
    assert unpack_mask(packed, len(bits) + 20).tolist() == bits + [False] * 20


def test_what_a_mask_forbids_is_never_picked() -> None:
    rows = torch.stack([logits_of(1), logits_of(1)])
    masked = bytes([0b1000]) + bytes(4)
    states = [state(SamplingParams(temperature=3.0, seed=1), [1], []), state(SamplingParams(), [1], [])]
    picked, _ = Sampler([], rows.shape[1])(rows.clone(), states, {0: masked})
    assert picked == [3, int(rows[1].argmax())]
