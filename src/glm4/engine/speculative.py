"""Guessing what comes next, so that one step can confirm several tokens. Guesses never change an answer.

A draft is confirmed exactly when it is the token that would have been picked without it, greedy or drawn: a random
number depends on the request's seed and the position alone. So the words are the same, only sooner.

Whether it is sooner depends on the text, the models and the machine, so drafts are paid for out of what they save: see
`Speculator`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Protocol

from glm4.engine.kv_cache import BlockPool
from glm4.engine.request import Request
from glm4.engine.step import RequestStep, StepPlan, StepResult

_SHARE = 0.02
"""What may be lost to drafts that do not pay, of all time; the rest of the promised 5 % is for what
the engine begins with, for noise, and for keeping the books."""
_FIRST_CREDIT = 1.0
_MOST_CREDIT = 8.0
"""Tokens' worth of time that a request may lose before it rests: at first, and after drafts that paid well."""
_WAKING_CREDIT = 1.0
"""A resting request drafts again when it has saved up this much."""
_MOST_SAVINGS = 64
"""Steps' worth of past savings that may be spent on trials, so that good times do not pay for endless bad ones."""
_FIRST_COUNT = 1

log = logging.getLogger("glm4")


class Drafter(Protocol):
    """Proposes tokens."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """For each request at most so many tokens that may follow its token_ids; none where it has no idea."""
        ...

    def forget(self, request_ids: Iterable[int]) -> None:
        """Drop what is kept for requests that ended, or lost their place for now."""
        ...


class PromptLookup:
    """Proposes what followed the last few tokens where they stood before, in the prompt or the answer.

    After Saxena, "Prompt Lookup Decoding", 2023. An index of all n-grams is kept up to date for each request, so that
    a proposal costs the same however long the text is.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.longest, self.shortest = longest, shortest
        self._indexes: dict[int, _Index] = {}

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """See `Drafter.propose`."""
        return [self._look_up(request, count) for request, count in wanted]

    def _look_up(self, request: Request, count: int) -> list[int]:
        tokens = request.token_ids
        index = self._indexes.setdefault(request.request_id, _Index())
        index.extend(tokens, range(self.shortest, self.longest + 1))
        for size in range(self.longest, self.shortest - 1, -1):
            end = index.ends.get(tuple(tokens[-size:]))
            if end is not None:
                return tokens[end : end + count]
        return []

    def forget(self, request_ids: Iterable[int]) -> None:
        """See `Drafter.forget`."""
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


class _PlainSteps:
    """How long steps of so many requests take without drafts."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._measured_at: dict[int, int] = {}
        self._num_steps = 0

    def is_due(self, num_requests: int) -> bool:
        """It is to be measured (again): contexts grow. The more is known, the rarer."""
        self._num_steps += 1
        known = self._seconds.get(num_requests, ())
        return self._num_steps > self._measured_at.get(num_requests, 0) + 16 * len(known)

    def add(self, num_requests: int, seconds: float) -> None:
        self._seconds.setdefault(num_requests, deque(maxlen=5)).append(seconds)
        self._measured_at[num_requests] = self._num_steps

    def seconds(self, num_requests: int) -> float:
        known = self._seconds.get(num_requests)
        return median(known) if known else 0.0


@dataclass(slots=True)
class _Account:
    """How a request's drafts fare, in tokens' worth of its time."""

    credit: float = _FIRST_CREDIT
    count: int = _FIRST_COUNT
    """Tokens to guess next time."""
    resting: bool = False
    fresh: bool = True
    """No drafts yet, or none since it rested: the drafter has much to catch up on."""

    def judge(self, drafted: int, confirmed: int, price: float) -> None:
        """Longer guesses after one that was wholly right, shorter ones otherwise."""
        self.count = drafted + 1 if confirmed == drafted else confirmed + 1
        self.fresh = False
        self.earn(confirmed - price * drafted)

    def earn(self, tokens: float) -> None:
        self.credit = min(self.credit + tokens, _MOST_CREDIT)
        if self.credit <= 0:
            self.resting = self.fresh = True
            self.count = _FIRST_COUNT
        elif self.credit >= _WAKING_CREDIT:
            self.resting = False


class Speculator:
    """Asks a drafter for drafts where they pay.

    What a draft costs is measured against steps without drafts: the time to guess it, and to compute one more row. A
    request spends credit on its drafts and earns it with confirmed ones; without credit it rests. Every token earns
    `_SHARE` of its time besides, so a resting request is tried again, and what is lost stays within that share and the
    credit at the beginning. All requests together have such an account, too, for guessing takes a draft model as long
    for one as for many. Beginning costs more, because a draft model has the prompt to read: requests begin only while
    `balance`, which counts every second, is not in debt.
    """

    def __init__(
        self,
        drafter: Drafter,
        count: int,
        pool: BlockPool,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`count`: drafts a step and request at most, as far as the free blocks of `pool` and the step have room."""
        self.drafter, self.count = drafter, count
        self.pool, self.max_batch_tokens = pool, max_batch_tokens
        self.clock = clock
        self.drafted = self.confirmed = 0
        """Tokens guessed so far, and those of them that were right."""
        self.balance = 0.0
        """Seconds that may be lost now without losing more than `_SHARE` of all time."""
        self._accounts: dict[int, _Account] = {}
        self._drafting: set[int] = set()
        """Requests for which the drafter keeps something."""
        self._plain = _PlainSteps()
        self._together = _Account()
        """How all fare together, in steps' worth of time: guessing for one takes as long as guessing for all."""
        self._guessing = 0.0
        """What it cost to guess a token for all of them when it was last measured, in steps' worth of time."""
        self._confirming: deque[float] = deque(maxlen=15)
        """What it cost lately to compute a draft's row, in tokens' worth of time."""
        self._begins = False
        """A request is guessed for that the drafter has not read yet, which takes longer."""
        self._proposed: dict[int, int] = {}
        """Drafts of the step at hand; some may be cut before it, which is as bad as being wrong."""
        self._prepared_at = self._spent = 0.0
        self._broken = False

    def prepare(self, running: Sequence[Request]) -> None:
        """Put drafts into those of `running` where they are likely to pay. The drafter's errors harm no request."""
        started = self.clock()
        self._let_go(self._drafting.difference(request.request_id for request in running))
        self._proposed = {}
        wanted = [] if self._broken else self._wanted(running)
        if wanted:
            self._drafting.update(request.request_id for request, _ in wanted)
            try:
                proposed = self.drafter.propose(wanted)
            except Exception as error:
                log.warning("no more drafts: guessing failed (%s: %s)", type(error).__name__, error)
                self._broken, proposed = True, []
            for (request, _), drafts in zip(wanted, proposed, strict=not self._broken):
                request.draft_token_ids = drafts
            self._proposed = {r.request_id: len(r.draft_token_ids) for r, _ in wanted if r.draft_token_ids}
            self._begins = any(self._accounts[request.request_id].fresh for request, _ in wanted)
        self._prepared_at = self.clock()
        self._spent = self._prepared_at - started

    def _wanted(self, running: Sequence[Request]) -> list[tuple[Request, int]]:
        """Requests to guess for, and how many tokens; none while a prompt is computed, which hides what drafts cost."""
        if self._plain.is_due(len(running)) or any(request.num_pending > 1 for request in running):
            return []
        if self._together.resting:
            return []
        room = self.max_batch_tokens - len(running)
        free = self.pool.num_free - len(running)  # a token of each may begin a block
        wanted = []
        for request in running:
            account = self._accounts.setdefault(request.request_id, _Account())
            if account.resting or (account.fresh and self.balance < 0):
                continue
            length = len(request.token_ids)
            count = min(account.count, self.count, request.max_len - length - 1, room)
            missing = self.pool.blocks_for(length + count) - self.pool.blocks_for(length)
            if count > 0 and missing <= free:
                wanted.append((request, count))
                room -= count
                free -= missing
        return wanted

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """Take in which drafts of `plan` were confirmed, and what they cost."""
        seconds = self.clock() - self._prepared_at
        self.balance += _SHARE * seconds
        share = self._share(plan.requests, seconds)
        num_requests = len(plan.requests)
        extra = price = 0.0
        if self._proposed:
            extra = self._extra(seconds / share - num_requests, num_requests) if share else 0.0
            price = self._guessing + self._confirming_price()
        right = 0
        for step in plan.requests:
            if not step.logits_at or step.request_id not in result.results:
                continue
            account = self._accounts.setdefault(step.request_id, _Account())
            confirmed = len(result.results[step.request_id].token_ids) - 1
            account.earn(_SHARE * (1 + confirmed))
            if drafted := self._proposed.get(step.request_id, 0):
                account.judge(drafted, confirmed, price)
                self.drafted += drafted
                right += confirmed
        self.confirmed += right
        self._settle(share, num_requests, right - extra)

    def _share(self, steps: Sequence[RequestStep], seconds: float) -> float:
        """Seconds that each token of this step would take without drafts; 0 where that is not known."""
        if not steps or not all(step.start > 0 and step.logits_at[:1] == [0] for step in steps):
            return 0.0  # a prompt is among them
        if not self._proposed:
            self._plain.add(len(steps), seconds)
        return self._plain.seconds(len(steps)) / len(steps)

    def _extra(self, tokens: float, num_requests: int) -> float:
        """What computing the drafts' rows cost, where this step took `tokens`' worth of time longer than without.

        A mean, for some numbers of rows need another kernel and cost much more than others. But steps are slow for
        other reasons, too, so that none counts more than double.
        """
        num_drafts = sum(self._proposed.values())
        self._confirming.append(min(tokens, num_requests) / num_drafts)
        return num_drafts * self._confirming_price()

    def _confirming_price(self) -> float:
        """Never below 0: a row more makes no step faster."""
        return max(0.0, fmean(self._confirming)) if self._confirming else 0.0

    def _settle(self, share: float, num_requests: int, earned: float) -> None:
        """Book what the drafts earned all requests together, in tokens' worth of time, but for guessing them."""
        self.balance += share * earned - self._spent
        if not share:
            return
        plain = share * num_requests
        self.balance = min(self.balance, _MOST_SAVINGS * plain)
        self._together.earn(_SHARE)
        if self._proposed and not self._begins:
            self._guessing = self._spent / max(self._proposed.values()) / plain
            self._together.earn(earned / num_requests - self._spent / plain)
            if self._together.resting:
                for account in self._accounts.values():
                    account.fresh = True

    def forget(self, request_ids: Sequence[int]) -> None:
        """Drop what is kept for ended requests."""
        for request_id in request_ids:
            self._accounts.pop(request_id, None)
        self._let_go(self._drafting.intersection(request_ids))

    def _let_go(self, request_ids: set[int]) -> None:
        """Free what the drafter keeps for requests that ended or were preempted, which begin anew."""
        if request_ids:
            self.drafter.forget(request_ids)
            self._drafting -= request_ids
        for request_id in request_ids & self._accounts.keys():
            self._accounts[request_id].fresh = True
