"""Replicas on a Ray cluster, served as if they were one engine of this process.

Ray Serve starts them, as many as there is work for, and again when they die; `AffinityRouter` says who gets what.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

from glm4.cluster.placement import Scale
from glm4.cluster.ray_cluster import as_ours, connect, placed
from glm4.cluster.replicas import summed
from glm4.engine.answer_stream import AnswerStream
from glm4.engine.async_llm import AsyncLLM, RestartPolicy
from glm4.engine.messages import Stats
from glm4.engine.request import RequestOutput
from glm4.engine.served_model import Health, ServedModel, started
from glm4.errors import EngineError, OptionError
from glm4.options import EngineOptions, SamplingParams
from glm4.parallel.control import Failure
from glm4.text.messages import Message

_EVENT_SECONDS = 0.05
"""Between two outputs that a replica sends for one request: each is an object that Ray keeps books of."""
_POLL_SECONDS = 1.0
_STATS_SECONDS = 5.0
_UPSCALE_SECONDS = 10.0

log = logging.getLogger("glm4")


class RayReplicas(ServedModel):
    """`AsyncLLM`'s interface to a deployment of Ray Serve.

    async with RayReplicas(EngineOptions("/path/hf_dir"), Scale(1, 8)) as llm:
        async for output in llm.generate("Once upon a time"):
            print(output.delta, end="", flush=True)
    """

    def __init__(self, options: EngineOptions, scale: Scale, name: str = "glm4") -> None:
        """name: of the application in Ray Serve, where it takes the place of one that has the same."""
        super().__init__(options)
        self._scale, self._name = scale, name
        self._ray: Any = None
        """Set while this process is in the cluster, …"""
        self._serve: Any = None
        """… and while its application may be in Serve."""
        self._handle: Any = None
        """Serve's DeploymentHandle."""
        self._facts: tuple[int, SamplingParams] | None = None
        self._state: Health = "starting"
        self._draining = False
        self._numbers = itertools.count()
        self._streams: dict[int, AnswerStream] = {}
        self._no_streams = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> Self:
        """Deploy the replicas, and return when the least number of them serves.

        Raises OptionError where Ray or the machines for a replica are not there, and what `AsyncLLM.start` raises.
        """
        try:
            await self._load_text()
            self._handle = await asyncio.to_thread(self._deploy)
            self._facts = await self._handle.facts.remote()
        except Exception as error:
            await self.shutdown()
            raise as_ours(error) from error
        self._state = "ready"
        self._poller = asyncio.create_task(self._poll(), name="glm4 ray")
        return self

    def _deploy(self) -> Any:
        self._ray = connect()
        options, place = placed(self._ray, self.options)
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what matters is told as an error of ours
        self._serve = serve
        serve.start(proxy_location="Disabled")  # the server that this model is for listens itself
        side_by_side = options.max_batch_requests
        deployment = serve.deployment(
            Replica,
            ray_actor_options=place,
            max_ongoing_requests=2 * side_by_side,
            autoscaling_config={
                "min_replicas": self._scale.min_replicas,
                "max_replicas": self._scale.max_replicas,
                "target_ongoing_requests": max(1, side_by_side // 2),
                "upscale_delay_s": _UPSCALE_SECONDS,
            },
            request_router_config={
                "request_router_class": "glm4.cluster.ray_router.AffinityRouter",
                "request_router_kwargs": {"block_size": options.block_size},
            },
            health_check_period_s=_POLL_SECONDS,
            max_constructor_retry_count=2,
        )
        try:
            return serve.run(deployment.bind(options), name=self._name, route_prefix=None)
        except RuntimeError as error:  # it says only that there is something to be read elsewhere
            deployments = serve.status().applications[self._name].deployments
            raise as_ours(RuntimeError(deployments[Replica.__name__].message)) from error

    @property
    def health(self) -> Health:
        """What it does now: "restarting" is no replica that answers."""
        return "draining" if self._draining and self._state != "dead" else self._state

    @property
    def num_restarts(self) -> int:
        """None that this process would know of: Ray Serve starts replicas again, and counts them."""
        return 0

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return started(self._facts)[0]

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What holds for a request that says nothing of its own."""
        return started(self._facts)[1]

    async def generate(
        self,
        prompt: str | list[int] | Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat: bool = False,
        request_id: str | None = None,
        priority: int = 0,
        choice: int = 0,
        after: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`; the replica that has the request is the only one that its end can touch."""
        self._refuse_if_closed()
        if not isinstance(sampling, SamplingParams | None):
            raise OptionError(f"sampling: {type(sampling).__name__} is no SamplingParams")
        stream = self._open(request_id)
        reader: asyncio.Task[None] | None = None
        try:
            stream.prompt_token_ids, through_template = await self.encode(prompt, tools)
            named = {"request_id": request_id, "priority": priority, "choice": choice, "after": after}
            answer = self._handle.options(stream=True).generate.remote(
                stream.prompt_token_ids, sampling, chat=chat or through_template, **named
            )
            reader = asyncio.create_task(_read(answer, stream))
            while True:
                output = await stream.next()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._close(stream)
            if reader is not None:
                reader.cancel()

    async def embed(self, prompt: str | list[int], *, priority: int = 0) -> list[float]:
        """The mean of the prompt's last hidden states (after the final norm), as `LLM.embed`."""
        self._refuse_if_closed()
        stream = self._open(None)
        try:
            ids, _ = await self.encode(prompt)
            values: list[float] = await self._handle.embed.remote(ids, None, priority=priority)
        except Exception as error:
            raise as_ours(error) from error
        finally:
            self._close(stream)
        return values

    async def abort(self, request_id: str | int) -> None:
        """End the requests called so, or that have this number in their outputs; none is no error."""
        for stream in list(self._streams.values()):
            if request_id in (stream.request_id, stream.number):
                stream.abort()

    async def stats(self) -> Stats:
        """The sum over the replicas that answer. Raises EngineError while there is none."""
        answers = await started(self._handle).broadcast("stats").results_async(
            timeout_s=_STATS_SECONDS, return_exceptions=True
        )  # fmt: skip
        return summed(answer for answer in answers if isinstance(answer, Stats))

    async def drain(self) -> None:
        """Take no more requests, and return when those that are there have ended."""
        self._draining = True
        while self._streams:
            self._no_streams.clear()
            await self._no_streams.wait()

    async def shutdown(self, timeout: float = 10.0) -> None:
        """End every request with EngineError, take the deployment away, and leave the cluster."""
        self._state = "dead"
        for stream in self._streams.values():
            stream.fail(Failure.of(EngineError("the engine has been shut down")))
        if self._poller is not None:
            self._poller.cancel()
        if self._ray is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._undeploy), timeout)

    def _undeploy(self) -> None:
        if self._serve is not None:
            self._serve.delete(self._name)
            if not self._serve.status().applications:
                self._serve.shutdown()
        self._ray.shutdown()

    def _open(self, request_id: str | None) -> AnswerStream:
        number = next(self._numbers)
        stream = self._streams[number] = AnswerStream(number, request_id)
        return stream

    def _close(self, stream: AnswerStream) -> None:
        del self._streams[stream.number]
        if not self._streams:
            self._no_streams.set()

    def _refuse_if_closed(self) -> None:
        if self._state == "dead":
            raise EngineError("the engine has been shut down")
        if self._draining:
            raise EngineError("the engine takes no more requests: it finishes those it has")

    async def _poll(self) -> None:
        """Find out whether any replica answers."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                await self.stats()
                self._state = "ready"
            except Exception as error:
                self._state = "restarting"
                log.warning("no replica answers: %s", as_ours(error))


async def _read(answer: Any, stream: AnswerStream) -> None:
    """Take what a replica sends. Serve is told when nobody wants it any more."""
    try:
        async for news in answer:
            stream.push(replace(news, request_id=stream.number))
    except Exception as error:
        stream.fail(Failure.of(as_ours(error)))
    finally:
        answer.cancel()


class Replica:
    """One engine in an actor of Ray Serve. It is gone when its engine is: then Serve makes another one."""

    async def __init__(self, options: EngineOptions) -> None:  # type: ignore[misc]  # Serve awaits it
        self._llm = await AsyncLLM(options, restarts=RestartPolicy(max_restarts=0)).start()
        self._stats = await self._llm.stats()
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self._leave_if_dead()
            await asyncio.sleep(_EVENT_SECONDS)

    def _leave_if_dead(self) -> None:
        if self._llm.health == "dead":
            os._exit(1)

    async def facts(self) -> tuple[int, SamplingParams]:
        """The model's max_model_len and sampling_defaults."""
        return self._llm.max_model_len, self._llm.sampling_defaults

    async def generate(
        self, ids: list[int], sampling: SamplingParams | None, **more: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """What is new in the answer each time, as `Progress` has it."""
        known = 0
        try:
            async for output in self._llm.generate(ids, sampling, **more):
                yield replace(
                    output,
                    prompt_token_ids=[],
                    token_ids=output.token_ids[known:],
                    text="",
                    logprobs=output.logprobs[known:],
                    prompt_logprobs=[] if known else output.prompt_logprobs,
                )
                known = len(output.token_ids)
                if output.finish_reason is None:
                    await asyncio.sleep(_EVENT_SECONDS)
        except EngineError:
            self._leave_if_dead()
            raise

    async def embed(self, ids: list[int], sampling: None, priority: int) -> list[float]:
        """`AsyncLLM.embed`; `sampling` is where `AffinityRouter` looks for it."""
        return await self._llm.embed(ids, priority=priority)

    async def stats(self) -> Stats:
        """`AsyncLLM.stats`; those of before, while a step takes long."""
        with suppress(TimeoutError):
            self._stats = await asyncio.wait_for(self._llm.stats(), _POLL_SECONDS)
        return self._stats
