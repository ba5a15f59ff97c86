"""The engine: requests in, words out, one step at a time. It knows no device; the runner does."""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from glm4.engine.beam_search import BeamSearch, check_beam_params
from glm4.engine.constraints import Constraints
from glm4.engine.kv_cache import BlockPool
from glm4.engine.pace import Pace
from glm4.engine.request import FinishReason, Reading, Request, RequestOutput
from glm4.engine.scheduler import Scheduler
from glm4.engine.speculative import Drafter, PromptLookup, Speculator
from glm4.engine.stats import EngineStats
from glm4.engine.step import (
    RequestResult,
    RequestStep,
    Runner,
    StagedRunner,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from glm4.errors import EngineError, Glm4Error, OptionError, PromptError
from glm4.options import EngineOptions, SamplingParams
from glm4.text.detokenizer import Detokenizer
from glm4.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Answer:
    """The words of one request as they come."""

    request: Request
    detokenizer: Detokenizer
    at_start: bool
    """Nothing said yet, and a leading newline is the template's, not the answer's."""
    text: str = ""
    num_read: int = 0
    """Generated tokens already turned into words."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    hidden_states: list[Any] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    stop_reason: str | int | None = None

    def take(self, step: RequestStep, given: RequestResult) -> None:
        """Keep what was read of the prompt; after a preemption it is read again from its beginning."""
        if step.prompt_targets:
            self.prompt_logprobs[step.start :] = given.prompt_logprobs
        if step.start == 0:
            self.hidden_states, self.logits = [], []
        self.hidden_states += [given.hidden_states] if given.hidden_states is not None else []
        self.logits += [given.logits] if given.logits is not None else []


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is under way."""

    plan: StepPlan
    answering: bool
    """Some request was waiting for its next token, not for its prompt."""
    started: float
    finish: Callable[[], StepResult]


def _raise(error: Exception) -> StepResult:
    raise error


class Engine:
    """Continuous batching over one runner."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        defaults: SamplingParams,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        options: EngineOptions,
        drafter: Drafter | None = None,
    ) -> None:
        """`defaults`: every sampling value filled in; `eos_token_ids` end an answer unless it ignores them."""
        self.runner, self.tokenizer, self.defaults = runner, tokenizer, defaults
        self.eos_token_ids, self.max_model_len = tuple(eos_token_ids), max_model_len
        self.scheduler = Scheduler(
            BlockPool(runner.num_blocks, runner.block_size),
            options.max_batch_tokens,
            options.max_batch_requests,
            options.prefix_caching,
        )
        self.speculator = None
        if options.speculative_tokens:
            self.speculator = Speculator(
                drafter or PromptLookup(), options.speculative_tokens, self.scheduler.pool, options.max_batch_tokens
            )
        raisable = options.max_model_len is not None and self.max_model_len == options.max_model_len
        self._longer = ", or raise the limit (max_model_len, max_length in the YAML)" if raisable else ""
        self._pace = Pace(options.step_stretch) if options.step_stretch is not None else None
        self.constraints = Constraints(tokenizer, runner.vocab_size, self.eos_token_ids)
        self.stats = EngineStats()
        self.failures: list[Exception] = []
        """Why the last steps failed as a whole, if they did: after a few in a row, the device itself may be broken."""
        # What is learned of drafts is what single steps cost, one after the other.
        self._staged = runner if isinstance(runner, StagedRunner) and self.speculator is None else None
        self._underway: deque[_Step] = deque()
        self._last_end = 0.0
        self._answers: dict[int, _Answer] = {}
        self._searches: dict[int, BeamSearch] = {}
        """By the ids of the requests that get their answers."""
        self._ids = itertools.count()
        self._seed = secrets.randbits(32) if options.seed is None else options.seed

    @property
    def has_work(self) -> bool:
        """Some request has not ended yet."""
        return self.scheduler.has_work or bool(self._underway)

    def add(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams | None = None,
        *,
        chat: bool = False,
        priority: int = 0,
        choice: int = 0,
        after: int | None = None,
        reading: Reading | None = None,
    ) -> int:
        """Queue a prompt and return the request's id.

        `chat`: the prompt came through the chat template, so the newline that begins an ordinary answer is not
        part of it. Lower priorities are served first. `choice` numbers several answers to one prompt, and `after`
        is the request of the first of them, which computes the prompt for all. With `reading` the prompt is only read.
        Raises PromptError for a prompt that is empty, too long, or holds an id that is no token's, OptionError for a
        form that cannot be held, and MemoryPlanError for a request that the KV cache can never hold.
        """
        self._check_prompt(prompt_token_ids, self.max_model_len - (reading is None))
        request_id = next(self._ids)
        params = (sampling or SamplingParams()).over(self.defaults)
        seed = self._seed + request_id if params.seed is None else params.seed + choice
        params = replace(params, seed=seed)
        self._check_ids(params)
        if params.constraints and (params.stop or params.stop_token_ids):
            [form] = params.constraints
            raise OptionError(f"{form} says where the answer ends: leave stop and stop_token_ids out")
        if not params.ignore_eos:
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *self.eos_token_ids))
        prompt_len = len(prompt_token_ids)
        max_new_tokens = 0 if reading is not None else params.max_new_tokens or self.max_model_len
        max_len = min(self.max_model_len, prompt_len + max_new_tokens)
        request = Request(request_id, list(prompt_token_ids), prompt_len, params, max_len, priority, reading=reading)
        if after in self._answers:
            request.after = self._answers[after].request
        constraint = self.constraints.prepare(params, prompt_token_ids, chat)
        if request.is_beam:
            self._join_search(request, after)
        else:
            self.scheduler.add(request)
        if constraint is not None:
            self.constraints.hold(request_id, constraint)
        detokenizer = Detokenizer(self.tokenizer, bool(params.skip_special_tokens), params.stop)
        self._answers[request_id] = _Answer(request, detokenizer, at_start=chat)
        return request_id

    def _join_search(self, request: Request, after: int | None) -> None:
        """Give `request` the next best answer of the search of `after`, or begin one."""
        search = self._searches.get(-1 if after is None else after)
        if search is not None and len(search.callers) == search.num_beams:
            raise OptionError(f"n is above num_beams {search.num_beams}: a beam gives one answer")
        if search is None:
            check_beam_params(request.sampling, self.scheduler.max_batch_requests)
            search = BeamSearch(request, next(self._ids))
            self.scheduler.add(search.root, search.num_beams)
        self._searches[request.request_id] = search
        search.callers[request.request_id] = request

    def _check_prompt(self, token_ids: list[int], longest: int) -> None:
        if not token_ids:
            raise PromptError("the prompt is empty: give some text")
        if len(token_ids) > longest:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens and prompt plus answer may have {self.max_model_len}: "
                f"shorten it{self._longer}"
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self.tokenizer.vocab_size:
            raise PromptError(f"the prompt holds a token id outside 0 … {self.tokenizer.vocab_size - 1}")

    def _check_ids(self, params: SamplingParams) -> None:
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", [i for i, _ in params.logit_bias])):
            beyond = [token_id for token_id in ids if token_id >= self.tokenizer.vocab_size]
            if beyond:
                raise OptionError(f"{name}: {beyond[0]} is no token: ids end at {self.tokenizer.vocab_size - 1}")

    def step(self) -> list[RequestOutput]:
        """Compute one step and return the requests that got further or ended.

        What goes wrong in a step ends the requests it touched, with the reason in their outputs; the others go on.
        Where the model is in stages, as many steps as there are stages are kept under way, each with its share of the
        requests.
        """
        stages = 1 if self._staged is None else self._staged.stages
        while len(self._underway) < stages and self._begin(stages):
            pass
        step = self._underway.popleft()
        plan = step.plan
        try:
            result = step.finish()
        except Exception as error:
            return self._fail_step(plan, error)
        self.failures.clear()
        now = time.perf_counter()
        seconds, self._last_end = now - max(step.started, self._last_end), now
        self.stats.count(plan, result, seconds)
        if self._pace is not None and step.answering:
            self._pace.learn(sum(len(each.token_ids) for each in plan.requests if each.catches_up), seconds)
        failed = {id: each.error for id, each in result.results.items() if each.error is not None}
        outputs = self._fail(failed)
        result = StepResult({id: each for id, each in result.results.items() if id not in failed})
        if self.speculator is not None:
            self.speculator.learn(plan, result)
        return outputs + self._take(plan, result)

    def _begin(self, stages: int) -> bool:
        """Put a step under way; False where there is nothing to do beside those that are."""
        if self.speculator is not None:
            running = [request for request in self.scheduler.running if not request.is_beam]
            self.speculator.prepare(running)
            self.constraints.cut_drafts(running)
        answering = any(request.num_pending == 1 for request in self.scheduler.running)
        plan = self.scheduler.plan(
            self._pace.chunk if self._pace is not None and answering else None,
            None if stages == 1 else self.scheduler.fair_share(stages),
        )
        if self._underway and not (plan.requests or plan.block_copies or plan.finished_ids):
            return False
        started = time.perf_counter()
        try:
            masked = replace(plan, grammar_masks=self.constraints.masks(plan))
            finish = partial(self.runner.execute, masked) if self._staged is None else self._staged.start(masked)
        except Exception as error:  # told in its turn
            finish = partial(_raise, error)
        self._underway.append(_Step(plan, answering, started, finish))
        return True

    def _take(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """What a step gave, to the answers and the searches."""
        for step in plan.requests:
            answer, given = self._answers.get(step.request_id), result.results.get(step.request_id)
            if answer is not None and given is not None:
                answer.take(step, given)
        outputs = []
        beams = self._searches_by_beam()
        for request in self.scheduler.update(plan, result):
            search = beams.get(request.request_id)
            if search is None:
                outputs.append(self._output(request, result))
                continue
            [entry] = result.results[request.request_id].logprobs
            if search.take(request, entry) and not search.advance(self.scheduler, self._ids):
                outputs += self._found(search)
        return outputs

    def _searches_by_beam(self) -> dict[int, BeamSearch]:
        return {beam_id: search for search in self._searches.values() for beam_id in search.beams}

    def _found(self, search: BeamSearch) -> list[RequestOutput]:
        """The answers of a search that is over."""
        outputs = []
        for request, found in zip(list(search.callers.values()), search.finished, strict=False):
            answer = self._answers[request.request_id]
            request.token_ids += found.token_ids
            request.finish_reason, answer.stop_reason = found.finish_reason, found.stop_id
            if request.sampling.logprobs is not None:
                answer.logprobs = [replace(e, top=e.top[: request.sampling.logprobs]) for e in found.logprobs]
            outputs.append(self._report(answer, self._new_words(answer, found.token_ids)))
        for request in list(search.callers.values()):  # never, unless a vocabulary is smaller than the search is wide
            request.finish_reason = "error"
            reason = f"beam search found only {len(search.finished)} answers: lower n"
            outputs.append(self._report(self._answers[request.request_id], "", error=reason))
        search.end(self.scheduler)
        return outputs

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[RequestOutput]:
        self.failures.append(error)
        self.scheduler.give_up(plan)
        reason = str(error)
        if not isinstance(error, Glm4Error):
            reason = (
                f"the step failed: {type(error).__name__}: {error}; ask again, with a smaller max_batch_tokens if "
                "memory ran out"
            )
        touched = [step.request_id for step in plan.requests]
        if plan.block_copies:  # perhaps not made, and they were for beams
            touched += self._searches_by_beam()
        return self._fail(dict.fromkeys(touched, reason))

    def _fail(self, reasons: Mapping[int, str | None]) -> list[RequestOutput]:
        """End requests with an error, and the whole search where it is a beam's."""
        beams = self._searches_by_beam()
        outputs = []
        for request_id, reason in reasons.items():
            search = beams.get(request_id)
            for caller_id in [request_id] if search is None else list(search.callers):
                answer = self._answers.get(caller_id)
                if answer is None:  # aborted while the step ran
                    continue
                self._end(answer.request, "error")
                outputs.append(self._report(answer, "", error=reason))
        return outputs

    def _output(self, request: Request, result: StepResult) -> RequestOutput:
        answer = self._answers[request.request_id]
        if request.reading is not None:
            return self._report(answer, "")
        answer.logprobs += result.results[request.request_id].logprobs
        new_ids = request.token_ids[request.prompt_len + answer.num_read :]
        if request.finish_reason == "stop":  # by an id, which is not part of the answer
            answer.stop_reason = new_ids.pop()
        try:
            failure = self.constraints.accept(request.request_id, new_ids)
        except EngineError as error:
            failure = str(error)
        if failure is not None:
            [output] = self._fail({request.request_id: failure})
            return output
        if self.constraints.is_complete(request.request_id):
            self._end(request, "stop")
        delta = self._new_words(answer, new_ids)
        if answer.detokenizer.stopped is not None:
            answer.stop_reason = answer.detokenizer.stopped
            self._end(request, "stop")
        return self._report(answer, delta)

    def _end(self, request: Request, reason: FinishReason) -> None:
        """End a request, or say better why it has ended."""
        if request.finish_reason is None and request.request_id not in self._searches:  # which ends its beams itself
            self.scheduler.finish(request, reason)
        request.finish_reason = reason

    def _new_words(self, answer: _Answer, new_ids: list[int]) -> str:
        words = ""
        for token_id in new_ids:
            words += answer.detokenizer.push(token_id)
            answer.num_read += 1
            if answer.detokenizer.stopped is not None:
                break
        if answer.request.finish_reason is not None and answer.detokenizer.stopped is None:
            words += answer.detokenizer.finish()
        if answer.at_start and words:
            answer.at_start = False
            words = words.removeprefix("\n")
        return words

    def _report(self, answer: _Answer, delta: str, error: str | None = None) -> RequestOutput:
        """What the caller gets of an answer now; one that has ended is forgotten."""
        request = answer.request
        if request.finish_reason is not None:
            self._forget(request.request_id)
        answer.text += delta
        kept = request.prompt_len + answer.num_read
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.token_ids[: request.prompt_len],
            token_ids=request.token_ids[request.prompt_len : kept],
            text=answer.text,
            delta=delta,
            finish_reason=request.finish_reason,
            stop_reason=answer.stop_reason,
            logprobs=answer.logprobs[: answer.num_read],
            prompt_logprobs=answer.prompt_logprobs,
            error=error,
            hidden_states=answer.hidden_states,
            logits=answer.logits,
        )

    def abort(self, *request_ids: int) -> None:
        """End requests at once and free their blocks; ids that have ended already are ignored."""
        for request_id in request_ids:
            if request_id in self._answers:
                self._end(self._answers[request_id].request, "abort")
                self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        del self._answers[request_id]
        self.constraints.forget(request_id)
        search = self._searches.pop(request_id, None)
        if search is not None:
            del search.callers[request_id]
            if not search.callers:
                search.end(self.scheduler)
        if self.speculator is not None:
            self.speculator.forget([request_id])
