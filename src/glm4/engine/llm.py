"""`LLM`: a folder in, answers out, in this process."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from typing_extensions import TypeIs

from glm4.checkpoint.folder import ModelFolder
from glm4.engine.progress import answer_progress
from glm4.engine.request import Reading, RequestOutput
from glm4.engine.stats import EngineStats
from glm4.errors import EngineError, OptionError, PromptError
from glm4.interrupts import interrupts_held
from glm4.model.configuration_glm4 import Glm4Config, folder_sampling
from glm4.model.sharding import Shard
from glm4.options import EngineOptions, SamplingParams, options_from
from glm4.parallel.followers import start_followers
from glm4.text.chat import ChatTemplate
from glm4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

log = logging.getLogger("glm4")

Message = dict[str, Any]
Prompt = str | list[int]


class LLM:
    """GLM-4 from a Hugging Face folder.

    llm = LLM("/path/hf_dir", dtype="bfloat16")
    [answer] = llm.chat([{"role": "user", "content": "请介绍一下北京"}])
    print(answer.text)
    """

    def __init__(
        self,
        options: EngineOptions | str | Path,
        *,
        on_load: Callable[[int, int], None] = lambda done, total: None,
        **overrides: Any,
    ) -> None:
        """Load a model.

        options: the folder, or all options at once; overrides: single EngineOptions by name.
        on_load(tensors done, tensors in all) is called while the weights load.
        With tensor_parallel or pipeline_parallel, the other ranks are started here, unless a launcher did (RANK is
        set); on a rank that only follows, this serves until the first one is done, and leaves with SystemExit.
        Raises a Glm4Error that names what is wrong with the options, the folder, the device or the memory.
        """
        if not isinstance(options, EngineOptions):
            options = EngineOptions(model=str(options))
        self.options = options = replace(options, **_checked(overrides))
        folder = ModelFolder.open(options.model)
        self.config = Glm4Config.from_dict(folder.read_json("config.json"), str(folder.path / "config.json"))
        Shard(0, options.tensor_parallel, 0, options.pipeline_parallel).check(self.config)
        followers = start_followers(options)
        try:
            with interrupts_held():
                from glm4.engine.build import build_engine  # loads torch, as the other ranks do meanwhile
            self.tokenizer = Tokenizer.from_folder(folder.path)
            self._template = ChatTemplate.from_folder(folder.path)
            generation = folder.read_json("generation_config.json", required=False) or {}
            said = folder_sampling(generation, self.thinks)
            built = build_engine(options, folder, self.config, self.tokenizer, said, on_load, followers)
        except BaseException:
            if followers is not None:
                followers.kill()
            raise
        self._built = built
        self.engine, self.plan, self.model = built.engine, built.plan, built.model
        self.last_stats = EngineStats()
        self._lock = threading.RLock()
        self._inboxes: dict[int, deque[RequestOutput | EngineError]] = {}
        """Where the outputs of each open request go: one inbox for each call, from whichever thread."""

    def close(self) -> None:
        """End the other ranks, if there are any; the model cannot be used afterwards."""
        if self._built.ranks is not None:
            self._built.ranks.close()

    @property
    def has_chat_template(self) -> bool:
        """The folder is a chat model's; a base model has no template."""
        return self._template.available

    @property
    def thinks(self) -> bool:
        """The model is a GLM-Z1: its answers begin inside a thought that `</think>` ends."""
        return self._template.thinks

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.engine.max_model_len

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What holds for a request that says nothing of its own."""
        return self.engine.defaults

    @property
    def has_own_tools(self) -> bool:
        """The model is a GLM-Z1-Rumination, whose chat template brings its own tools and ignores all others."""
        return self._template.has_own_tools

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, *, thinking: bool = True
    ) -> list[int]:
        """The token ids that ask for the next answer in a conversation; see `ChatTemplate.encode`.

        Raises PromptError for malformed messages, and for a folder without a chat template.
        """
        return self._template.encode(self.tokenizer, messages, tools, thinking=thinking)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        progress: bool = True,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Continue raw prompts, texts or token ids, all side by side; `n` outputs each, in order.

        progress: show a bar for several prompts, where standard error is a terminal; priority: lower ones are served
        before what other threads ask for.
        Raises PromptError, OptionError or MemoryPlanError for what cannot be served, before anything runs. A request
        that fails on its way has the finish_reason "error" and the reason in `error`; EngineError when all fail.
        """
        return self._run(self._several(prompts), sampling, False, progress, priority)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        progress: bool = True,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several, all side by side; `n` outputs each, in order."""
        several = [conversations] if _is_conversation(conversations) else conversations
        return self._run(
            [self.encode_chat(messages, tools) for messages in several], sampling, True, progress, priority
        )

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> Generator[RequestOutput]:
        """The answer to one raw prompt (text or ids) or one conversation, as it grows.

        Leaving the loop early ends the request and frees its blocks. Raises EngineError when the request fails.
        """
        if (sampling or SamplingParams()).over(self.engine.defaults).n != 1:
            raise OptionError("n: a stream is one answer; leave n out, or take several with LLM.chat in Python")
        if _is_conversation(prompt):
            return self._one(self._stream([self.encode_chat(prompt, tools)], sampling, chat=True))
        return self._one(self._stream([self._as_ids(prompt)], sampling, chat=False))

    def _one(self, outputs: Generator[RequestOutput]) -> Generator[RequestOutput]:
        with closing(outputs):
            for output in outputs:
                if output.error is not None:
                    raise EngineError(output.error)
                yield output

    def _several(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
            raise PromptError("a prompt is a text or a list of token ids; messages go to chat")
        return [self._as_ids(prompt) for prompt in ([prompts] if _is_prompt(prompts) else prompts)]

    def _as_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, list) or any(type(token_id) is not int for token_id in prompt):
            raise PromptError("a prompt is a text or a list of token ids; messages go to chat")
        return list(prompt)

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> list[list[float]]:
        """For each prompt the mean of its tokens' last hidden states (after the final norm), [hidden_size]."""
        several = self._several(prompts)
        return [mean_hidden_state(output) for output in self._read(several, [Reading("sum")] * len(several))]

    def hidden_states(self, prompts: Prompt | Sequence[Prompt]) -> list[torch.Tensor]:
        """For each prompt its tokens' last hidden states (after the final norm), [tokens, hidden_size]."""
        import torch

        several = self._several(prompts)
        return [torch.cat(output.hidden_states) for output in self._read(several, [Reading("all")] * len(several))]

    def logits(self, prompts: Prompt | Sequence[Prompt], positions: Sequence[int] | None = None) -> list[torch.Tensor]:
        """For each prompt the logits after the tokens at `positions`, float32 [positions, vocab_size].

        A negative position counts from the end; None: after each token. Raises PromptError for a position that a prompt
        does not have.
        """
        import torch

        several = self._several(prompts)
        wanted = [_positions(len(ids), positions) for ids in several]
        readings = [Reading(logits_at=tuple(sorted(set(each)))) for each in wanted]
        outputs = self._read(several, readings)
        return [
            torch.cat(output.logits)[[reading.logits_at.index(position) for position in each]]
            for output, reading, each in zip(outputs, readings, wanted, strict=True)
        ]

    def _read(self, prompts: list[list[int]], readings: list[Reading]) -> list[RequestOutput]:
        latest = {output.request_id: output for output in self._stream(prompts, None, False, readings=readings)}
        for output in latest.values():
            if output.error is not None:
                raise EngineError(output.error)
        return [latest[request_id] for request_id in sorted(latest)]

    def _run(
        self, prompts: list[list[int]], sampling: SamplingParams | None, chat: bool, progress: bool, priority: int
    ) -> list[RequestOutput]:
        params = (sampling or SamplingParams()).over(self.engine.defaults)
        kept, drawn = params.n or 1, params.best_of or params.n or 1
        if drawn > kept and params.logprobs is None:
            sampling = replace(sampling or SamplingParams(), logprobs=0)  # by which the likeliest are found
        latest: dict[int, RequestOutput] = {}
        shown = progress and len(prompts) > 1
        with answer_progress(lambda: sum(len(output.token_ids) for output in latest.values()), shown) as bar:
            task = bar.add_task("", total=len(prompts) * drawn)
            for output in self._stream(prompts, sampling, chat, drawn, priority):
                latest[output.request_id] = output
                bar.advance(task, output.finish_reason is not None)
        outputs = [latest[request_id] for request_id in sorted(latest)]
        failures = [output.error for output in outputs if output.error is not None]
        for reason in failures:
            log.error("%s", reason)
        if failures and len(failures) == len(outputs):
            raise EngineError(failures[0])
        groups = [outputs[first : first + drawn] for first in range(0, len(outputs), drawn)]
        if drawn > kept:
            groups = [sorted(group, key=_mean_logprob, reverse=True)[:kept] for group in groups]
        return [output for group in groups for output in group]

    def _stream(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | None,
        chat: bool,
        choices: int = 1,
        priority: int = 0,
        readings: Sequence[Reading | None] = (),
    ) -> Generator[RequestOutput]:
        engine = self.engine
        ids: list[int] = []
        mine: deque[RequestOutput | EngineError] = deque()
        try:
            with self._lock:
                engine.stats = self.last_stats = EngineStats()
                for prompt, reading in zip(prompts, readings or [None] * len(prompts), strict=True):
                    ids.append(first := engine.add(prompt, sampling, chat=chat, priority=priority, reading=reading))
                    ids.extend(
                        engine.add(prompt, sampling, chat=chat, priority=priority, choice=choice, after=first)
                        for choice in range(1, choices)
                    )
                self._inboxes |= dict.fromkeys(ids, mine)
            open_ids = set(ids)
            while open_ids:
                output = self._next(mine)
                if output.finish_reason is not None:
                    open_ids.discard(output.request_id)
                yield output
        finally:
            with self._lock:
                engine.abort(*ids)
                for request_id in ids:
                    self._inboxes.pop(request_id, None)

    def _next(self, mine: deque[RequestOutput | EngineError]) -> RequestOutput:
        """The next output of `mine`; a step serves every open call, so each one's outputs go to its own inbox."""
        with self._lock:
            while not mine:
                try:
                    for output in self.engine.step():
                        self._inboxes[output.request_id].append(output)
                except Exception as error:  # the engine is in an unknown state: whoever waits must know
                    self.engine.abort(*self._inboxes)
                    broken = EngineError(f"the engine failed: {type(error).__name__}: {error}; load the model again")
                    broken.__cause__ = error
                    for inbox in {id(each): each for each in self._inboxes.values()}.values():
                        inbox.append(broken)
            item = mine.popleft()
        if isinstance(item, EngineError):
            raise item
        return item


def mean_hidden_state(output: RequestOutput) -> list[float]:
    """The mean over a prompt that was read with Reading("sum")."""
    mean: list[float] = (sum(output.hidden_states) / len(output.prompt_token_ids)).tolist()
    return mean


def _positions(length: int, positions: Sequence[int] | None) -> list[int]:
    if positions is None:
        return list(range(length))
    if not positions:
        raise PromptError("positions: the list is empty: give at least one")
    for position in positions:
        if not -length <= position < length:
            raise PromptError(f"position {position} is not in a prompt of {length} tokens")
    return [position % length for position in positions]


def _mean_logprob(output: RequestOutput) -> float:
    """How likely an answer is for its length."""
    return fmean(entry.logprob for entry in output.logprobs) if output.logprobs else -inf


def _checked(overrides: dict[str, Any]) -> dict[str, Any]:
    options_from(EngineOptions, overrides)
    return overrides


def _is_conversation(value: Any) -> TypeIs[Sequence[Message]]:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], dict)


def _is_prompt(value: Any) -> TypeIs[Prompt]:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], int))
