"""Guessing what comes next, so that one step can confirm several tokens. Guesses never change an answer.

A draft is confirmed exactly when it is the token that would have been picked without it, greedy or drawn: a random
number depends on the request's seed and the position alone. So the words are the same, only sooner.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from glm4.engine.request import Request
from glm4.engine.step import StepPlan, StepResult

_WINDOW = 32
"""Drafts over which a request's acceptance is judged."""
_RETRY_AFTER = 256
"""Tokens after which a request whose drafts did not pay is tried again."""


class PromptLookup:
    """Proposes what followed the last few tokens where they stood before, in the prompt or the answer.

    After Saxena, "Prompt Lookup Decoding", 2023. An index of all n-grams is kept up to date for each request, so that
    a proposal costs the same however long the text is.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.longest, self.shortest = longest, shortest
        self._indexes: dict[int, _Index] = {}

    def propose(self, request: Request, count: int) -> list[int]:
        """At most `count` tokens that may follow request.token_ids."""
        tokens = request.token_ids
        index = self._indexes.setdefault(request.request_id, _Index())
        index.extend(tokens, range(self.shortest, self.longest + 1))
        for size in range(self.longest, self.shortest - 1, -1):
            end = index.ends.get(tuple(tokens[-size:]))
            if end is not None:
                return tokens[end : end + count]
        return []

    def forget(self, request_ids: Iterable[int]) -> None:
        """Drop what is kept for ended requests."""
        for request_id in request_ids:
            self._indexes.pop(request_id, None)


@dataclass(slots=True)
class _Index:
    """For each n-gram but the very last ones, where the token after its latest occurrence stands."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    length: int = 0

    def extend(self, tokens: list[int], sizes: range) -> None:
        for end in range(max(1, self.length), len(tokens)):
            for size in sizes:
                if size <= end:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.length = len(tokens)


@dataclass(slots=True)
class _Record:
    """How a request's drafts fared lately."""

    drafted: int = 0
    confirmed: int = 0
    resting_until: int = 0
    """Length of the request at which it is tried again."""


class Speculator:
    """Asks a drafter for each request, and lets one rest whose drafts do not pay."""

    def __init__(self, drafter: PromptLookup, count: int, least_acceptance: float = 0.25) -> None:
        """`count`: drafts a step; below `least_acceptance` of them confirmed, a request rests for a while."""
        self.drafter, self.count, self.least_acceptance = drafter, count, least_acceptance
        self.drafted = self.confirmed = 0
        self._records: dict[int, _Record] = {}

    def prepare(self, requests: Iterable[Request]) -> None:
        """Put drafts into those of `requests` that have nothing else to catch up on."""
        for request in requests:
            room = request.max_len - len(request.token_ids) - 1
            record = self._records.setdefault(request.request_id, _Record())
            if request.num_pending == 1 and room > 0 and len(request.token_ids) >= record.resting_until:
                request.draft_token_ids = self.drafter.propose(request, min(self.count, room))

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """Take in which drafts of `plan` were confirmed."""
        for step in plan.requests:
            if not step.draft_token_ids or step.request_id not in result.results:
                continue
            record = self._records[step.request_id]
            confirmed = len(result.results[step.request_id].token_ids) - 1
            self.drafted += len(step.draft_token_ids)
            self.confirmed += confirmed
            record.drafted += len(step.draft_token_ids)
            record.confirmed += confirmed
            if record.drafted >= _WINDOW:
                if record.confirmed < self.least_acceptance * record.drafted:
                    record.resting_until = step.start + _RETRY_AFTER
                record.drafted = record.confirmed = 0

    def forget(self, request_ids: Iterable[int]) -> None:
        """Drop what is kept for ended requests."""
        for request_id in request_ids:
            self._records.pop(request_id, None)
        self.drafter.forget(request_ids)
