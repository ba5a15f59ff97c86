"""What every endpoint shares: the engine, who may use it now, and how its answers come."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from glm4.api.answer import AnswerForm
from glm4.api.chat import ChatRequest
from glm4.api.openai import Head
from glm4.engine.request import RequestOutput
from glm4.engine.served_model import ServedModel
from glm4.errors import EngineError, Glm4Error, OptionError
from glm4.options import SamplingParams, ServerOptions
from glm4.server.errors import HttpError
from glm4.server.metrics import Metrics
from glm4.server.streams import merged


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts on their way to the engine; each gets `n` answers, numbered in order."""

    prompts: list[list[int]]
    sampling: SamplingParams
    """Every value filled in; `n` is one."""
    n: int
    chat: bool
    """They came through the chat template."""
    form: AnswerForm

    @property
    def num_answers(self) -> int:
        """Answers to all prompts."""
        return len(self.prompts) * self.n


class Service:
    """The engine as the endpoints see it."""

    def __init__(self, llm: ServedModel, options: ServerOptions, metrics: Metrics) -> None:
        """`llm` has been started."""
        self.llm, self.options, self.metrics = llm, options, metrics
        self.names = options.served_model_name or (Path(llm.options.model).resolve().name,)
        self.created = int(time.time())
        self._open = 0
        self._limit = llm.options.max_batch_requests + options.max_queue
        self._mean_seconds = 1.0
        """How long answers took lately."""
        defaults = llm.sampling_defaults
        if not defaults.do_sample:  # the folder advises nothing: OpenAI's default holds
            defaults = replace(defaults, do_sample=True, temperature=1.0)
        limits = [limit for limit in (defaults.max_new_tokens, options.max_answer_tokens) if limit is not None]
        self._defaults = replace(defaults, max_new_tokens=min(limits, default=None))

    def head(self, model: str | None) -> Head:
        """The head of an answer by `model`. Raises HttpError for a model there is not."""
        if model is not None and model not in self.names:
            names = ", ".join(self.names)
            raise HttpError(404, f"model {model!r} is not served here: use {names}", param="model")
        return Head(secrets.token_hex(12), model or self.names[0], int(time.time()))

    async def chat_job(self, chat: ChatRequest) -> Job:
        """Raises PromptError and OptionError for what cannot be answered."""
        llm = self.llm
        if chat.thinking and not llm.thinks:
            raise OptionError(
                "thinking: this model does not think before it answers; leave it, or reasoning_effort, out"
            )
        ids = await self.chat_ids(chat)
        sampling = chat.constrained(llm.has_own_tools)
        return self.job([ids], sampling, chat.form(llm.thinks, llm.has_own_tools))

    async def chat_ids(self, chat: ChatRequest) -> list[int]:
        """The prompt of a conversation."""
        return await self.llm.encode_chat(chat.messages, chat.tools.shown, thinking=chat.thinking is not False)

    async def text_ids(self, prompt: str | list[int]) -> list[int]:
        """The prompt that is a text, or is there already."""
        return await asyncio.to_thread(self.llm.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt

    def job(self, prompts: list[list[int]], sampling: SamplingParams, form: AnswerForm | None = None) -> Job:
        """Fill in what was not said, and hold the job to the server's limits. Raises OptionError and HttpError.

        form: how to read answers to prompts that came through the chat template.
        """
        limit, longest = self.options.max_prompt_tokens, max(map(len, prompts))
        if limit is not None and longest > limit:
            raise HttpError(400, f"the prompt has {longest} tokens, and this server takes {limit}: shorten it")
        most, asked = self.options.max_answer_tokens, sampling.max_new_tokens
        if most is not None and asked is not None and asked > most:
            raise OptionError(f"max_tokens: {asked} is beyond the {most} that this server gives: lower it")
        n = sampling.n or 1
        if sampling.best_of not in (None, n):
            raise OptionError("best_of: every answer that is drawn is given, so say n alone")
        filled = replace(sampling.over(self._defaults), n=1, best_of=None)
        return Job(prompts, filled, n, form is not None, form or AnswerForm())

    async def outputs(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(number of the answer, it so far) as words come. Leaving early ends all of the job's requests.

        Raises HttpError when there is no room or no time, and what `ServedModel.generate` raises.
        """
        self._refuse_if_full(job.num_answers)
        self._open += job.num_answers
        clock = _Clock(self.metrics, job.num_answers)
        try:
            deadline = asyncio.get_running_loop().time() + self.options.request_timeout
            async with aclosing(merged(self._streams(job), deadline)) as answers:
                async for number, output in answers:
                    clock.take(number, output)
                    yield number, output
            self._mean_seconds += 0.1 * (time.perf_counter() - clock.started - self._mean_seconds)
        except TimeoutError as error:
            raise self._too_slow() from error
        except Glm4Error:
            clock.num_open = 0  # an error is no abort
            raise
        finally:
            self._open -= job.num_answers
            self.metrics.aborts.inc(clock.num_open)

    async def embeddings(self, prompts: list[list[int]]) -> list[list[float]]:
        """The vector of each prompt. Raises HttpError when there is no room or no time."""
        self._refuse_if_full(len(prompts))
        self._open += len(prompts)
        tasks = [asyncio.create_task(self.llm.embed(prompt)) for prompt in prompts]
        try:
            async with asyncio.timeout(self.options.request_timeout):
                return await asyncio.gather(*tasks)
        except TimeoutError as error:
            raise self._too_slow() from error
        finally:
            self._open -= len(prompts)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _too_slow(self) -> HttpError:
        limit = self.options.request_timeout
        return HttpError(504, f"the answer took more than {limit:g} s: ask for less, or less at a time")

    def _refuse_if_full(self, wanted: int) -> None:
        if self.llm.health == "draining":
            raise HttpError(503, "the server is being stopped and takes no more requests", retry_after=10)
        if wanted > self._limit:
            raise HttpError(400, f"{wanted} answers are more than this server gives at a time: ask for {self._limit}")
        if self._open + wanted > self._limit:
            raise HttpError(
                429, f"{self._open} answers are running or waiting, and no more may wait: try again later",
                retry_after=self._mean_seconds,
            )  # fmt: skip

    def _streams(self, job: Job) -> Sequence[AsyncGenerator[RequestOutput, None]]:
        streams = []
        for prompt in job.prompts:
            first = secrets.token_hex(8)
            streams += [
                self.llm.generate(
                    prompt,
                    job.sampling,
                    chat=job.chat,
                    request_id=None if choice else first,
                    choice=choice,
                    after=first if choice else None,
                )
                for choice in range(job.n)
            ]
        return streams

    async def whole(self, job: Job) -> list[RequestOutput]:
        """Every answer at its end, in order."""
        async with aclosing(self.outputs(job)) as outputs:
            last = {number: output async for number, output in outputs}
        return [last[number] for number in range(job.num_answers)]

    async def exposition(self) -> bytes:
        """The metrics, those of the engine included while there is one."""
        try:
            stats = await self.llm.stats()
        except EngineError:
            stats = None
        return self.metrics.exposition(stats, self.llm.health, self.llm.num_restarts)


class _Clock:
    """Counts the tokens of one job, and the seconds between them."""

    def __init__(self, metrics: Metrics, num_answers: int) -> None:
        self.started, self.num_open = time.perf_counter(), num_answers
        self._metrics = metrics
        self._begun: dict[int, tuple[float, int, int]] = {}
        """Number of an answer to when its first words came, how many tokens they were, and how many there are now."""

    def take(self, number: int, output: RequestOutput) -> None:
        """One more output of an answer."""
        now, tokens = time.perf_counter(), len(output.token_ids)
        if number not in self._begun:
            self._metrics.first_token.observe(now - self.started)
            self._metrics.prompt_tokens.inc(len(output.prompt_token_ids))
            self._begun[number] = (now, tokens, 0)
        first, at_first, before = self._begun[number]
        self._metrics.answer_tokens.inc(tokens - before)
        self._begun[number] = (first, at_first, tokens)
        if output.finish_reason is not None:
            self.num_open -= 1
            if tokens > at_first:
                self._metrics.next_token.observe((now - first) / (tokens - at_first))
