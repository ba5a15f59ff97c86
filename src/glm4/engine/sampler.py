"""Logits to token ids: penalties, temperature, top-k, top-p, min-p, and a random stream of each request's own."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glm4.engine.step import TokenLogprobs
from glm4.ops.fused import argmax
from glm4.options import SamplingParams

_CANDIDATES = 1024
"""Likeliest tokens that top-p looks at before it sorts the whole vocabulary."""
_LEAST_TEMPERATURE = 1e-6
"""Below it the likeliest token has all the probability that a float32 can tell."""
# Eight booleans, each a byte, seen as one number: a table lookup unpacks a bitmap many times faster than shifting bits.
_BITS_OF_BYTE = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool().view(torch.int64).flatten()


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

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is picked, whatever was said before, and nothing else is asked for."""
        said = self.sampling
        return not (
            said.do_sample
            or said.logprobs is not None
            or said.logit_bias
            or said.repetition_penalty not in (None, 1.0)
            or said.presence_penalty
            or said.frequency_penalty
            or self.num_generated < (said.min_new_tokens or 0)
        )

    def cut(self, length: int) -> SamplingState:
        """The state when only `length` tokens were there."""
        return self if length == len(self.token_ids) else replace(self, token_ids=self.token_ids[:length])


class Sampler:
    """Picks one token for each row of logits."""

    def __init__(self, unknown_ids: list[int], vocab_size: int) -> None:
        """`unknown_ids`: rows of the vocabulary that the tokenizer has no token for; they are never picked."""
        self._unknown = torch.tensor(unknown_ids, dtype=torch.int64)
        known = vocab_size - len(unknown_ids)
        self._known = known if unknown_ids == list(range(known, vocab_size)) else None
        """Where they begin, if they are the vocabulary's end."""

    def mask_unknown(self, logits: Tensor) -> None:
        """Make the unknown ids of `logits` (float32 [rows, vocab_size]) impossible, in place."""
        if self._known is not None:
            logits[:, self._known :] = -torch.inf
            return
        self._unknown = self._unknown.to(logits.device)
        logits.index_fill_(-1, self._unknown, -torch.inf)

    def pick_plain(self, logits: Tensor, states: list[SamplingState]) -> list[int] | None:
        """The likeliest ids, -1 for a row that is not finite, where nothing else is asked for: None where it is.

        logits: float32 or bfloat16 [rows, vocab_size], not changed. All that greedy decoding needs, in one pass.
        """
        if self._known is None or not all(state.is_plain for state in states):
            return None
        return argmax(logits, self._known)

    def __call__(
        self, logits: Tensor, states: list[SamplingState], allowed: dict[int, bytes] | None = None
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The picked ids, and their log-probabilities where they are wanted.

        logits: float32 [rows, vocab_size], overwritten; one state a row, in the same order; `allowed`: for some
        rows a bitmap over the vocabulary, least significant bit first.
        """
        self.mask_unknown(logits)
        wanted = [row for row, state in enumerate(states) if state.sampling.logprobs is not None]
        own = dict(zip(wanted, logits[wanted].log_softmax(-1), strict=True)) if wanted else {}
        for row, bitmap in (allowed or {}).items():
            logits[row].masked_fill_(~unpack_mask(bitmap, logits.shape[1]).to(logits.device), -torch.inf)
        for row, state in enumerate(states):
            penalise(logits[row], state)
        drawn = [row for row, state in enumerate(states) if state.sampling.do_sample]
        picked: list[int] = logits.argmax(-1).tolist()
        if drawn:
            filtered = filtered_scores(logits[drawn], [states[row].sampling for row in drawn])
            points = [random_point(states[row].sampling.seed or 0, states[row].num_generated) for row in drawn]
            for row, token_id in zip(drawn, draw(filtered.softmax(-1), points), strict=True):
                picked[row] = token_id
        return picked, [
            token_logprobs(own[row], picked[row], state.sampling.logprobs or 0) if row in own else None
            for row, state in enumerate(states)
        ]


def unpack_mask(bitmap: bytes, vocab_size: int) -> Tensor:
    """bool [vocab_size] from a bitmap, least significant bit first; bits beyond its end are 0."""
    packed = torch.zeros(-(-vocab_size // 8), dtype=torch.uint8)
    given = torch.frombuffer(bytearray(bitmap[: len(packed)]), dtype=torch.uint8)
    packed[: len(given)] = given
    return _BITS_OF_BYTE[packed.int()].view(torch.bool)[:vocab_size]


def token_logprobs(logprobs: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """One token's entry; logprobs: [vocab_size]; `count` likeliest ones beside it."""
    top = logprobs.topk(count)
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs[token_id]), pairs)


def penalise(row: Tensor, state: SamplingState) -> None:
    """Apply bias, penalties and the minimum length to `row` (float32 [vocab_size]), in place.

    Repetition: positive logits of tokens seen, prompt included, are divided by the penalty and negative ones
    multiplied (Keskar et al., CTRL, 2019). Presence and frequency count the answer's tokens only (OpenAI's API).
    """
    sampling = state.sampling
    for token_id, bias in sampling.logit_bias:
        row[token_id] += bias
    penalty = sampling.repetition_penalty or 1.0
    if penalty != 1:
        seen = torch.tensor(sorted(set(state.token_ids)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(state.token_ids[state.prompt_len :])
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[list(counts)] -= (sampling.presence_penalty or 0) + (sampling.frequency_penalty or 0) * times
    if state.num_generated < (sampling.min_new_tokens or 0):
        stops = list(sampling.stop_token_ids)
        before = row[stops]
        row[stops] = -torch.inf
        if row.max() == -torch.inf:  # the answer's form allows nothing else
            row[stops] = before


def filtered_scores(scores: Tensor, params: list[SamplingParams]) -> Tensor:
    """Scores after temperature, with what top-k, top-p and min-p (in this order) drop at -inf.

    scores: float32 [rows, vocab_size]; one SamplingParams a row. Each filter keeps what is at least as likely as the
    last token it keeps, so it is a threshold for the row.
    """
    vocab_size, device = scores.shape[1], scores.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=scores.dtype, device=device)[:, None]

    # Relative to the best one, so that no temperature makes it infinite.
    temperatures = column([max(p.temperature or 1.0, _LEAST_TEMPERATURE) for p in params])
    scores = (scores - scores.amax(-1, keepdim=True)) / temperatures
    top_k = torch.tensor([p.top_k or vocab_size for p in params], device=device).clamp(max=vocab_size)[:, None]
    top_p, min_p = column([p.top_p or 1.0 for p in params]), column([p.min_p or 0.0 for p in params])
    limited = [p.top_k for p in params if p.top_k]
    if not limited and all(p.top_p in (None, 1.0) for p in params):
        return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + min_p.log(), -torch.inf)
    count = min(vocab_size, max(_CANDIDATES, *limited, 1))
    best, held_before = _ranked(scores, count, top_k)
    if count < vocab_size and bool((held_before[:, -1:] < top_p)[top_k > count].any()):
        best, held_before = _ranked(scores, vocab_size, top_k)
    rank = torch.arange(best.shape[1], device=device)
    kept = ((rank < top_k) & (held_before < top_p)).sum(-1, keepdim=True).clamp(min=1)
    threshold = best.gather(1, kept - 1).maximum(best[:, :1] + min_p.log())
    return scores.masked_fill(scores < threshold, -torch.inf)


def _ranked(scores: Tensor, count: int, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` best scores of each row, best first, and the probability that those before each hold."""
    best = scores.topk(count).values
    rank = torch.arange(count, device=scores.device)
    inside = best.masked_fill(rank >= top_k, -torch.inf)
    everything = torch.where(top_k > count, scores.logsumexp(-1, keepdim=True), inside.logsumexp(-1, keepdim=True))
    probabilities = (inside - everything).exp()
    return best, probabilities.cumsum(-1) - probabilities


def random_point(seed: int, position: int) -> float:
    """A number in [0, 1) that `seed` and `position` alone decide.

    So a request's words depend neither on what runs beside it nor on being computed again after a preemption, and a
    draft is confirmed exactly when it is the token that would have been drawn without it.
    """
    return random.Random(seed << 32 | position).random()


def draw(probabilities: Tensor, points: list[float]) -> list[int]:
    """One token id a row, by inverting the cumulative distribution; probabilities: [rows, vocab_size]."""
    cumulative = probabilities.double().cumsum(-1)
    targets = torch.tensor(points, dtype=torch.float64, device=cumulative.device)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # Rounding can leave a point beyond the last possible token.
    last = cumulative.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return [min(pair) for pair in zip(found.tolist(), last.tolist(), strict=True)]
