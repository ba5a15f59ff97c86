"""What a server needs of a model, wherever it runs: `AsyncLLM` is one engine, `glm4.cluster` has groups of them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

import msgspec

from glm4.engine.messages import Stats
from glm4.engine.request import RequestOutput
from glm4.errors import EngineError, OptionError, PromptError
from glm4.options import EngineOptions, SamplingParams
from glm4.text.chat import ChatTemplate
from glm4.text.messages import Message
from glm4.text.tokenizer import Tokenizer

Health = Literal["starting", "ready", "draining", "restarting", "dead"]

_T = TypeVar("_T")


class ServedModel(ABC):
    """A model for asyncio. Its text is handled in this process, in threads; it computes elsewhere."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._text: tuple[Tokenizer, ChatTemplate] | None = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exception: object) -> None:
        await self.shutdown()

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer."""
        return started(self._text)[0]

    @property
    def has_chat_template(self) -> bool:
        """The folder is a chat model's; a base model has no template."""
        return started(self._text)[1].available

    @property
    def thinks(self) -> bool:
        """The model is a GLM-Z1: its answers begin inside a thought that `</think>` ends."""
        return started(self._text)[1].thinks

    @property
    def has_own_tools(self) -> bool:
        """The model is a GLM-Z1-Rumination, whose chat template brings its own tools and ignores all others."""
        return started(self._text)[1].has_own_tools

    async def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, *, thinking: bool = True
    ) -> list[int]:
        """The token ids that ask for the next answer in a conversation; see `ChatTemplate.encode`.

        Raises PromptError for malformed messages, and for a folder without a chat template.
        """
        tokenizer, template = started(self._text)
        return await asyncio.to_thread(template.encode, tokenizer, messages, tools, thinking=thinking)

    async def encode(self, prompt: Any, tools: Sequence[dict[str, Any]] | None = None) -> tuple[list[int], bool]:
        """The token ids of a prompt, as `generate` takes one, and whether they came through the chat template.

        Raises PromptError and OptionError.
        """
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return await self.encode_chat(prompt, tools), True
        if tools:
            raise OptionError("tools belong to a conversation: give messages in place of a raw prompt")
        if isinstance(prompt, str):
            return await asyncio.to_thread(self.tokenizer.encode, prompt), False
        try:
            return msgspec.convert(prompt, list[int]), False
        except msgspec.ValidationError as error:
            raise PromptError(f"the prompt is no text, no messages and no token ids: {error}") from error

    async def _load_text(self) -> None:
        folder = self.options.model
        self._text = await asyncio.to_thread(lambda: (Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)))

    @abstractmethod
    async def start(self) -> Self:
        """Load the model, and return when requests are served. Raises a Glm4Error that says why there is none."""

    @property
    @abstractmethod
    def health(self) -> Health:
        """What it does now: "draining" finishes the requests it has, "dead" never serves one again."""

    @property
    @abstractmethod
    def num_restarts(self) -> int:
        """How often an engine was started again after a crash."""

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    @property
    @abstractmethod
    def sampling_defaults(self) -> SamplingParams:
        """What holds for a request that says nothing of its own."""

    @abstractmethod
    def generate(
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
        """The answer to one raw prompt (text or ids) or one conversation, as it grows; see `AsyncLLM.generate`."""

    @abstractmethod
    async def embed(self, prompt: str | list[int], *, priority: int = 0) -> list[float]:
        """The mean of the prompt's last hidden states (after the final norm), as `LLM.embed`."""

    @abstractmethod
    async def abort(self, request_id: str | int) -> None:
        """End the requests called so, or that have this number in their outputs; none is no error."""

    @abstractmethod
    async def stats(self) -> Stats:
        """What it holds and has counted. Raises EngineError while there is no engine."""

    @abstractmethod
    async def drain(self) -> None:
        """Take no more requests, and return when those that are there have ended."""

    @abstractmethod
    async def shutdown(self, timeout: float = 10.0) -> None:
        """End every request with EngineError, and the engines, by force after `timeout` seconds."""


def started(value: _T | None) -> _T:
    """`value`, which is set when the engine has started."""
    if value is None:
        raise EngineError("the engine has not been started: `await llm.start()`, or use `async with`")
    return value
