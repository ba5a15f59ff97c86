"""Logits to token ids: penalties, temperature, top-k, top-p, min-p, and a random stream of each request's own."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm4.engine.step import RequestResult, TokenLogprobs
from glm4.options import SamplingParams


@dataclass(slots=True)
class SamplingState:
    """What picking a request's next token depends on, beside the logits."""

    sampling: SamplingParams
    """Every value filled in; stop_token_ids holds the model's own, too."""
    prompt_len: int
    token_ids: list[int] = field(default_factory=list)
    """Prompt and answer so far."""

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.prompt_len


class Sampler:
    """Picks one token for each row of logits."""

    def __init__(self, vocab_size: int, unknown_ids: list[int]) -> None:
        """`unknown_ids`: rows of the vocabulary that the tokenizer has no token for; they are never picked."""
        self._unknown = torch.zeros(vocab_size, dtype=torch.bool)
        self._unknown[unknown_ids] = True

    def __call__(self, logits: Tensor, states: list[SamplingState]) -> list[RequestResult]:
        """logits: float32 [rows, vocab_size], overwritten; one state a row, in the same order."""
        self._unknown = self._unknown.to(logits.device)
        logits.masked_fill_(self._unknown, -torch.inf)
        if all(_is_plain_greedy(state.sampling) for state in states):
            return [RequestResult([token_id]) for token_id in logits.argmax(-1).tolist()]
        return [_pick(row, state) for row, state in zip(logits, states, strict=True)]


def _is_plain_greedy(sampling: SamplingParams) -> bool:
    return not (
        sampling.do_sample
        or sampling.min_new_tokens
        or sampling.logprobs is not None
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def _pick(row: Tensor, state: SamplingState) -> RequestResult:
    sampling = state.sampling
    scores = penalised(row, state)
    if sampling.do_sample:
        probabilities = filtered_probabilities(scores, sampling)
        token_id = draw(probabilities, sampling.seed or 0, state.num_generated)
    else:
        token_id = int(scores.argmax())
    if sampling.logprobs is None:
        return RequestResult([token_id])
    logprobs = row.log_softmax(-1)
    top = logprobs.topk(sampling.logprobs)
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return RequestResult([token_id], [TokenLogprobs(token_id, float(logprobs[token_id]), pairs)])


def penalised(row: Tensor, state: SamplingState) -> Tensor:
    """`row` (float32 [vocab_size]) after the minimum length and the penalties; `row` itself is left alone.

    Repetition: positive logits of tokens seen, prompt included, are divided by the penalty and negative ones
    multiplied (Keskar et al., CTRL, 2019). Presence and frequency count the answer's tokens only (OpenAI's API).
    """
    sampling, scores = state.sampling, row.clone()
    if sampling.repetition_penalty not in (None, 1):
        seen = torch.tensor(sorted(set(state.token_ids)), device=row.device)
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(state.token_ids[state.prompt_len :])
        times = torch.tensor(list(counts.values()), dtype=scores.dtype, device=row.device)
        penalties = (sampling.presence_penalty or 0) + (sampling.frequency_penalty or 0) * times
        scores[list(counts)] -= penalties
    if state.num_generated < (sampling.min_new_tokens or 0):
        scores[list(sampling.stop_token_ids)] = -torch.inf
    return scores


def filtered_probabilities(scores: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities [vocab_size] after temperature, top-k, top-p and min-p, in this order, renormalised at the end."""
    scores = scores / (sampling.temperature or 1.0)
    if sampling.top_k and sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        held_before = ordered.cumsum(-1) - ordered
        probabilities[order[held_before >= sampling.top_p]] = 0
    if sampling.min_p:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def draw(probabilities: Tensor, seed: int, position: int) -> int:
    """One token id, by inverting the cumulative distribution at a point that `seed` and `position` alone decide.

    So a request's words depend neither on what runs beside it nor on being computed again after a preemption.
    """
    point = random.Random(seed << 32 | position).random()
    cumulative = probabilities.double().cumsum(-1)
    token_id = int(torch.searchsorted(cumulative, point * float(cumulative[-1]), right=True))
    return min(token_id, int(probabilities.nonzero()[-1]))  # rounding can leave the point beyond the last one
