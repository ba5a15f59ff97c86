"""The engine: requests in, words out, one step at a time. It knows no device; the runner does."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from glm4.engine.kv_cache import BlockPool
from glm4.engine.request import Request, RequestOutput
from glm4.engine.scheduler import Scheduler
from glm4.engine.speculative import PromptLookup, Speculator
from glm4.engine.stats import EngineStats
from glm4.engine.step import Runner, StepResult, TokenLogprobs
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
    stop_reason: str | int | None = None


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
        drafts = options.speculative_tokens
        self._speculator = Speculator(PromptLookup(), drafts) if drafts else None
        raisable = options.max_model_len is not None and self.max_model_len == options.max_model_len
        self._longer = ", or raise the limit (max_model_len, max_length in the YAML)" if raisable else ""
        self.stats = EngineStats()
        self._answers: dict[int, _Answer] = {}
        self._ids = itertools.count()
        self._seed = secrets.randbits(32) if options.seed is None else options.seed

    @property
    def has_work(self) -> bool:
        """Some request has not ended yet."""
        return self.scheduler.has_work

    def add(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams | None = None,
        *,
        chat: bool = False,
        priority: int = 0,
        choice: int = 0,
        after: int | None = None,
    ) -> int:
        """Queue a prompt and return the request's id.

        `chat`: the prompt came through the chat template, so the newline that begins an ordinary answer is not
        part of it. Lower priorities are served first. `choice` numbers several answers to one prompt, and `after`
        is the request of the first of them, which computes the prompt for all.
        Raises PromptError for a prompt that is empty, too long, or holds an id that is no token's, and
        MemoryPlanError for one that the KV cache can never hold.
        """
        self._check_prompt(prompt_token_ids)
        request_id = next(self._ids)
        params = (sampling or SamplingParams()).over(self.defaults)
        seed = self._seed + request_id if params.seed is None else params.seed + choice
        params = replace(params, seed=seed)
        self._check_ids(params)
        if not params.ignore_eos:
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *self.eos_token_ids))
        prompt_len = len(prompt_token_ids)
        max_len = min(self.max_model_len, prompt_len + (params.max_new_tokens or self.max_model_len))
        request = Request(request_id, list(prompt_token_ids), prompt_len, params, max_len, priority)
        if after in self._answers:
            request.after = self._answers[after].request
        self.scheduler.add(request)
        detokenizer = Detokenizer(self.tokenizer, bool(params.skip_special_tokens), params.stop)
        self._answers[request_id] = _Answer(request, detokenizer, at_start=chat)
        return request_id

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise PromptError("the prompt is empty: give some text")
        if len(token_ids) >= self.max_model_len:
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
        """Compute one step and return the requests that got further.

        Raises EngineError when the runner fails; every request is ended then, its blocks free.
        """
        if self._speculator is not None:
            self._speculator.prepare(self.scheduler.running)
        plan = self.scheduler.plan()
        started = time.perf_counter()
        try:
            result = self.runner.execute(plan)
        except Exception as error:
            self.abort(*self._answers)
            if isinstance(error, Glm4Error):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise EngineError(
                f"the step failed: {reason}; ask again, with a smaller max_batch_tokens if memory ran out"
            ) from error
        self.stats.count(plan, result, time.perf_counter() - started)
        if self._speculator is not None:
            self._speculator.learn(plan, result)
        for step in plan.requests:
            if step.prompt_targets and step.request_id in self._answers:
                self._answers[step.request_id].prompt_logprobs += result.results[step.request_id].prompt_logprobs
        return [self._output(request, result) for request in self.scheduler.update(plan, result)]

    def _output(self, request: Request, result: StepResult) -> RequestOutput:
        answer = self._answers[request.request_id]
        answer.logprobs += result.results[request.request_id].logprobs
        delta = self._new_words(answer)
        if answer.detokenizer.stopped is not None and request.finish_reason != "stop":
            answer.stop_reason = answer.detokenizer.stopped
            if request.finish_reason is None:
                self.scheduler.finish(request, "stop")
            request.finish_reason = "stop"
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
        )

    def _new_words(self, answer: _Answer) -> str:
        request, words = answer.request, ""
        new_ids = request.token_ids[request.prompt_len + answer.num_read :]
        if request.finish_reason == "stop":  # by an id, which is not part of the answer
            answer.stop_reason = new_ids.pop()
        for token_id in new_ids:
            words += answer.detokenizer.push(token_id)
            answer.num_read += 1
            if answer.detokenizer.stopped is not None:
                break
        if request.finish_reason is not None and answer.detokenizer.stopped is None:
            words += answer.detokenizer.finish()
        if answer.at_start and words:
            answer.at_start = False
            words = words.removeprefix("\n")
        return words

    def abort(self, *request_ids: int) -> None:
        """End requests at once and free their blocks; ids that have ended already are ignored."""
        for request_id in request_ids:
            if request_id in self._answers:
                self.scheduler.finish(self._answers[request_id].request, "abort")
                self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        del self._answers[request_id]
        if self._speculator is not None:
            self._speculator.forget([request_id])
