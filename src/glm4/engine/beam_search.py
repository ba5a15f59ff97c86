"""Beam search: several beginnings of one answer grow side by side, and the likeliest are kept.

After each step every beam proposes its likeliest next tokens. Those that end the answer become finished answers; of the
others the `num_beams` likeliest go on, which means that some beams are forked and some given up. The rules are those of
transformers' `generate(num_beams=…)`, so that the answers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import nlargest
from typing import NamedTuple

from glm4.engine.request import FinishReason, Request
from glm4.engine.scheduler import Scheduler
from glm4.engine.step import TokenLogprobs
from glm4.errors import OptionError
from glm4.options import SamplingParams

_MOST_LOGPROBS = 20
_EXCLUDED = {
    **dict.fromkeys(("stop", "logit_bias", "choice"), ()),
    **dict.fromkeys(("json_schema", "regex", "grammar", "prompt_logprobs", "best_of")),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_new_tokens"), 0),
    "repetition_penalty": 1,
}
"""What does not go together with beam search, and the values that ask for nothing."""


def check_beam_params(params: SamplingParams, most_requests: int) -> None:
    """Raise OptionError for what does not go together with num_beams; `most_requests`: that run side by side."""
    if params.do_sample:
        raise OptionError("num_beams: beam search draws nothing at random; leave temperature, top_k, top_p, min_p out")
    for name, neutral in _EXCLUDED.items():
        if getattr(params, name) not in (None, neutral):
            raise OptionError(f"num_beams: {name} does not go together with beam search; leave one of them out")
    num_beams = params.num_beams or 1
    if (params.n or 1) > num_beams:
        raise OptionError(f"n {params.n} is above num_beams {num_beams}: a beam gives one answer")
    if num_beams > most_requests:
        raise OptionError(
            f"num_beams {num_beams} is above max_batch_requests {most_requests}: lower one, raise the other"
        )


class Finished(NamedTuple):
    """An answer that beam search has found."""

    score: float
    """Its log-probability over its length to the power of the length penalty."""
    token_ids: list[int]
    """Without the one that ended it."""
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    stop_id: int | None


class _Candidate(NamedTuple):
    total: float
    """Log-probability of the whole answer so far."""
    beam: _Beam
    token_id: int


@dataclass(slots=True, eq=False)
class _Beam:
    request: Request
    total: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    proposed: TokenLogprobs | None = None
    """What the last step gave, until all beams have theirs."""


class BeamSearch:
    """The beams of one prompt."""

    def __init__(self, request: Request, root_id: int) -> None:
        """`request`: the first that gets an answer; its prompt becomes the first beam, as a request of its own."""
        params = request.sampling
        self.num_beams = params.num_beams or 1
        self._length_penalty = 1.0 if params.length_penalty is None else params.length_penalty
        self._early_stopping = bool(params.early_stopping)
        self._stop_ids, self._max_len, self._prompt_len = (
            frozenset(params.stop_token_ids),
            request.max_len,
            request.prompt_len,
        )
        wanted = self.num_beams + len(self._stop_ids)
        if wanted > _MOST_LOGPROBS:
            raise OptionError(
                f"num_beams {self.num_beams} and the {len(self._stop_ids)} ids that end an answer are {wanted}: "
                f"at most {_MOST_LOGPROBS} go together"
            )
        # The search ends its beams itself, and needs of each as many proposals as can go on or end.
        sampling = replace(params, stop_token_ids=(), logprobs=wanted, n=1)
        self.root = replace(
            request,
            request_id=root_id,
            token_ids=list(request.token_ids),
            sampling=sampling,
            max_len=request.max_len + 1,
        )
        self.beams = {root_id: _Beam(self.root)}
        self.finished: list[Finished] = []
        """The best so far, best first."""
        self.callers: dict[int, Request] = {}
        """By their ids, those that get the answers: the best one first."""

    def take(self, request: Request, entry: TokenLogprobs) -> bool:
        """What a step gave for one beam, which pauses then; True when the last of them has come."""
        self.beams[request.request_id].proposed = entry
        request.is_paused = True
        return all(beam.proposed is not None for beam in self.beams.values())

    def advance(self, scheduler: Scheduler, new_ids: Iterator[int]) -> bool:
        """Move all beams on by one token, once all have their proposals; False when the search is over."""
        ranked = self._ranked()
        length = len(next(iter(self.beams.values())).request.token_ids)
        at_limit = length >= self._max_len
        self._finish(ranked[: self.num_beams], length, at_limit)
        going_on = [] if at_limit else [c for c in ranked if c.token_id not in self._stop_ids][: self.num_beams]
        if not going_on or self._is_over(going_on[0].total, length):
            return False
        self._branch(going_on, scheduler, new_ids)
        return True

    def _ranked(self) -> list[_Candidate]:
        """The likeliest candidates, best first: enough for `num_beams` to go on whichever of them end."""
        candidates = []
        for beam in self.beams.values():
            assert beam.proposed is not None
            candidates += [_Candidate(beam.total + logprob, beam, id) for id, logprob in beam.proposed.top]
        count = self.num_beams * (1 + max(1, len(self._stop_ids)))
        return nlargest(count, candidates, key=lambda candidate: candidate.total)

    def _finish(self, best: list[_Candidate], length: int, at_limit: bool) -> None:
        """Take in those of the best candidates that end; further down the rank nothing counts as found."""
        for candidate in best:
            stopped = candidate.token_id in self._stop_ids
            if not stopped and not at_limit:
                continue
            beam = candidate.beam
            token_ids = beam.request.token_ids[self._prompt_len : -1]
            entries = [*beam.logprobs, _entry(beam, candidate)]
            if not stopped:
                token_ids = [*token_ids, candidate.token_id]
            score = candidate.total / (length - self._prompt_len) ** self._length_penalty
            ended: tuple[FinishReason, int | None] = ("stop", candidate.token_id) if stopped else ("length", None)
            self.finished.append(Finished(score, token_ids, entries[: len(token_ids)], *ended))
        self.finished = nlargest(self.num_beams, self.finished, key=lambda found: found.score)

    def _is_over(self, best_total: float, length: int) -> bool:
        if len(self.finished) < self.num_beams:
            return False
        return self._early_stopping or self.finished[-1].score >= best_total / (
            (length - self._prompt_len) ** self._length_penalty
        )

    def _branch(self, chosen: list[_Candidate], scheduler: Scheduler, new_ids: Iterator[int]) -> None:
        """Each beam goes on as the first candidate that stems from it, and is forked for the others."""
        beams: dict[int, _Beam] = {}
        first_of: dict[int, _Candidate] = {}
        for candidate in chosen:
            parent = candidate.beam
            entries = [*parent.logprobs, _entry(parent, candidate)]
            if first_of.setdefault(parent.request.request_id, candidate) is candidate:
                request = parent.request
            else:
                request = scheduler.fork(parent.request, next(new_ids))
                request.token_ids[-1] = candidate.token_id
            request.is_paused = False
            beams[request.request_id] = _Beam(request, candidate.total, entries)
        for request_id, beam in self.beams.items():
            if request_id in first_of:
                beam.request.token_ids[-1] = first_of[request_id].token_id
            else:
                scheduler.finish(beam.request, "abort")
        self.beams = beams

    def end(self, scheduler: Scheduler) -> None:
        """Give up all beams."""
        for beam in self.beams.values():
            if beam.request.finish_reason is None:
                scheduler.finish(beam.request, "abort")
        self.beams = {}


def _entry(beam: _Beam, candidate: _Candidate) -> TokenLogprobs:
    """The log-probability of the candidate's own token, beside the likeliest ones."""
    assert beam.proposed is not None
    return replace(beam.proposed, token_id=candidate.token_id, logprob=candidate.total - beam.total)
