"""Decides, step by step, which requests run and how many of their tokens.

There is no prefill phase and no decode phase: every request has tokens to catch up on, under one token budget.
When blocks run out, the last in order gives up its own and computes its tokens again later.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

from glm4.engine.kv_cache import START, BlockPool, Prefix
from glm4.engine.request import FinishReason, Request
from glm4.engine.step import RequestStep, StepPlan, StepResult
from glm4.errors import MemoryPlanError

_LEAST_SHARE = 16
"""A step of so few tokens waits for the weights to be read: two halves of it would take as long each as the whole."""


@dataclass(slots=True)
class SchedulerStats:
    """Tokens of admitted requests and how many of them the KV cache held already; preemptions."""

    queried_tokens: int = 0
    hit_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """By priority; first come, first served among equals."""

    def __init__(
        self, pool: BlockPool, max_batch_tokens: int, max_batch_requests: int, prefix_caching: bool = True
    ) -> None:
        self.pool, self.prefix_caching = pool, prefix_caching
        self.max_batch_tokens, self.max_batch_requests = max_batch_tokens, max_batch_requests
        self.stats = SchedulerStats()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        """Both in order, the first to be served first."""
        self._underway: dict[int, Request] = {}
        """By id, those of steps whose results have not come yet: there is nothing to plan for them until then."""
        self._finished_ids: list[int] = []
        self._block_copies: list[tuple[int, int]] = []

    @property
    def has_work(self) -> bool:
        """A request is waiting or running."""
        return bool(self.waiting or self.running)

    def fair_share(self, steps: int) -> int:
        """A fair number of requests for each of as many `steps` under way at once."""
        fair = -(-min(len(self.waiting) + len(self.running), self.max_batch_requests) // steps)
        return max(fair, _LEAST_SHARE)

    def add(self, request: Request, copies: int = 1) -> None:
        """Queue a request, which may be forked into as many `copies`.

        Raises MemoryPlanError for one that could not finish even if it were alone.
        """
        capacity = self.pool.num_blocks // copies * self.pool.block_size
        if request.max_len > capacity:
            each = f" for each of {copies} beams" if copies > 1 else ""
            raise MemoryPlanError(
                f"prompt of {request.prompt_len} tokens plus {request.max_len - request.prompt_len} new ones needs "
                f"room for {request.max_len}, and the KV cache holds {capacity}{each}: lower max_new_tokens or raise "
                "max_device_memory"
            )
        bisect.insort(self.waiting, request, key=_order)

    def plan(self, max_prompt_tokens: int | None = None, max_requests: int | None = None) -> StepPlan:
        """The next step, and the requests' new block tables. Those that are in a step under way are left alone.

        max_prompt_tokens: those of requests that have more than one to catch up on, so that the others need not wait;
        max_requests: as many at most.
        """
        most = self.max_batch_requests if max_requests is None else max_requests
        budget = self.max_batch_tokens
        prompt_budget = budget if max_prompt_tokens is None else max_prompt_tokens
        steps: list[RequestStep] = []
        for request in list(self.running):
            # One that is no longer running has lost its blocks to one before it.
            if budget == 0 or len(steps) == most or not request.is_running:
                continue
            if request.is_paused or request.request_id in self._underway:
                continue
            is_answering = request.num_pending == 1
            count = min(request.num_pending + len(request.draft_token_ids), budget if is_answering else prompt_budget)
            if count and self._make_room(request, count):
                steps.append(self._step(request, count))
                budget -= count
                prompt_budget = min(budget, prompt_budget - count * (not is_answering))
        place = 0
        while (
            place < len(self.waiting)
            and prompt_budget > 0
            and len(steps) < most
            and len(self.running) < self.max_batch_requests
        ):
            request = self.waiting[place]
            if request.is_paused or request.request_id in self._underway or request.waits_for_another:
                place += 1
                continue
            if not self._admit(request):
                break
            del self.waiting[place]
            request.is_running = True
            bisect.insort(self.running, request, key=_order)
            count = min(request.num_pending, prompt_budget)
            request.block_ids += self.pool.take(self._missing_blocks(request, count))
            steps.append(self._step(request, count))
            prompt_budget -= count
        stuck = not steps and not self._underway and self.running
        if stuck and not all(request.is_paused for request in self.waiting):
            self._preempt(self.running[-1])  # only paused ones run, and what they wait for has no room beside them
            return self.plan(max_prompt_tokens, max_requests)
        finished, self._finished_ids = self._finished_ids, []
        copies, self._block_copies = self._block_copies, []
        return StepPlan(steps, copies, finished)

    def _admit(self, request: Request) -> bool:
        """Hold the blocks that already have the beginning of `request`; False when the rest has no room now."""
        size, known = self.pool.block_size, request.prompt_len - 1
        twin = self._twin(request)
        shareable = self.prefix_caching and not request.needs_every_token
        prefix = self.pool.find_prefix(request.token_ids if shareable else [])
        if twin is not None and not self.prefix_caching:
            prefix = Prefix(twin.block_ids[: known // size], START, self.pool.num_free)
        if self.pool.blocks_for(len(request.token_ids)) - len(prefix.blocks) > prefix.num_free_beside:
            return False
        self.pool.share(prefix.blocks)
        request.block_ids = list(prefix.blocks)
        request.num_published, request.identity = len(prefix.blocks), prefix.identity
        request.num_computed = len(prefix.blocks) * size
        if twin is not None and len(prefix.blocks) == known // size and known % size:
            self._copy_block(twin, request)
            request.num_computed = known
        self.stats.queried_tokens += len(request.token_ids)
        self.stats.hit_tokens += request.num_computed
        return True

    @staticmethod
    def _twin(request: Request) -> Request | None:
        """The first answer to the same prompt, where it runs and has computed all that the two can share."""
        first = request.after
        if first is None or request.needs_every_token:
            return None
        return first if first.is_running and first.num_computed >= request.prompt_len - 1 else None

    def _missing_blocks(self, request: Request, count: int) -> int:
        return max(0, self.pool.blocks_for(request.num_computed + count) - len(request.block_ids))

    def _make_room(self, request: Request, count: int) -> bool:
        """Blocks for `count` more tokens of `request`; False when it had to give up its own."""
        missing = self._missing_blocks(request, count)
        while missing > self.pool.num_free:
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        request.block_ids += self.pool.take(missing)
        return True

    def _preempt(self, request: Request) -> None:
        self.stats.preemptions += 1
        self._release(request)
        request.num_computed, request.known_to_runner = 0, False
        bisect.insort(self.waiting, request, key=_order)

    def _release(self, request: Request) -> None:
        if request.is_running:
            del self.running[bisect.bisect_left(self.running, request.order, key=_order)]
            request.is_running = False
        self.pool.give_back(request.block_ids)
        request.block_ids, request.draft_token_ids = [], []

    def _step(self, request: Request, count: int) -> RequestStep:
        start, pending = request.num_computed, request.num_pending
        self._underway[request.request_id] = request
        first_time, request.known_to_runner = not request.known_to_runner, True
        drafts = request.draft_token_ids[: max(0, count - pending)]
        request.draft_token_ids = []
        end = start + min(count, pending)
        return RequestStep(
            request_id=request.request_id,
            token_ids=request.token_ids[start:end] + drafts,
            start=start,
            block_ids=list(request.block_ids),
            logits_at=[] if request.reading else list(range(pending - 1, count)),
            draft_token_ids=drafts,
            prompt_targets=self._prompt_targets(request, start, end),
            hidden_states=request.reading.hidden_states if request.reading else "none",
            raw_logits_at=[p - start for p in request.reading.logits_at if start <= p < end] if request.reading else [],
            sampling=request.sampling if first_time else None,
            earlier_token_ids=request.token_ids[:start] if first_time else [],
            prompt_len=request.prompt_len if first_time else 0,
        )

    @staticmethod
    def _prompt_targets(request: Request, start: int, end: int) -> list[int]:
        if request.sampling.prompt_logprobs is None or request.num_generated:
            return []
        return request.token_ids[start + 1 : min(end + 1, request.prompt_len)]

    def update(self, plan: StepPlan, result: StepResult) -> list[Request]:
        """Take in what `plan` gave: the requests that got a token or have been read, those that ended marked so."""
        progressed = []
        for step, request in zip(plan.requests, self.give_up(plan), strict=True):
            if not request.is_running:  # aborted or preempted while the step ran
                continue
            picked = result.results[step.request_id].token_ids if step.logits_at else []
            rejected = len(step.draft_token_ids) + 1 - len(picked) if picked else 0
            request.num_computed += len(step.token_ids) - rejected
            if self.prefix_caching:  # confirmed drafts are computed already, and added to the tokens after this
                known = min(request.num_computed, len(request.token_ids))
                self.pool.publish_full(request, request.token_ids, known)
            if request.reading is not None and request.num_pending == 0:
                self.finish(request, "stop")
                progressed.append(request)
            if picked:
                self._extend(request, picked)
                progressed.append(request)
        return progressed

    def give_up(self, plan: StepPlan) -> list[Request]:
        """The requests of a plan that is under way no longer, whatever has become of it."""
        return [self._underway.pop(step.request_id) for step in plan.requests]

    def _extend(self, request: Request, picked: list[int]) -> None:
        for token_id in picked:
            request.token_ids.append(token_id)
            reason = _reason_to_end(request)
            if reason:
                self.finish(request, reason)
                return

    def fork(self, request: Request, request_id: int) -> Request:
        """A request that goes on from where `request` is, by itself.

        They share the blocks that are full; of the one that is written next each has its own copy. Where there is no
        room for that, the new one waits and computes its tokens again, as after a preemption.
        """
        num_full, remainder = divmod(request.num_computed, self.pool.block_size)
        child = replace(
            request,
            request_id=request_id,
            token_ids=list(request.token_ids),
            draft_token_ids=[],
            known_to_runner=False,
            is_running=request.is_running and self.pool.num_free >= (remainder > 0),
        )
        if child.is_running:
            child.block_ids = request.block_ids[:num_full]
            self.pool.share(child.block_ids)
            if remainder:
                self._copy_block(request, child)
        else:
            child.num_computed, child.block_ids = 0, []
        bisect.insort(self.running if child.is_running else self.waiting, child, key=_order)
        return child

    def _copy_block(self, source: Request, target: Request) -> None:
        """Give `target` its own copy of the block of `source` that comes next."""
        [copy] = self.pool.take(1)
        self._block_copies.append((source.block_ids[len(target.block_ids)], copy))
        target.block_ids.append(copy)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, wherever it is, and free its blocks."""
        request.finish_reason = reason
        if not request.is_running:
            self.waiting.remove(request)
        self._release(request)
        self._finished_ids.append(request.request_id)


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _reason_to_end(request: Request) -> FinishReason | None:
    enough = request.num_generated > (request.sampling.min_new_tokens or 0)
    if enough and request.token_ids[-1] in request.sampling.stop_token_ids:
        return "stop"
    return "length" if len(request.token_ids) >= request.max_len else None
