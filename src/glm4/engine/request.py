"""A request on its way through the engine, and what its caller gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from glm4.engine.step import HiddenStates, TokenLogprobs
from glm4.options import SamplingParams


@dataclass(frozen=True, slots=True)
class Reading:
    """What is wanted of a prompt that is only read, not continued."""

    hidden_states: HiddenStates = "none"
    logits_at: tuple[int, ...] = ()
    """Positions in the prompt."""


FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True, eq=False)
class Request:
    """What the scheduler knows of one request."""

    request_id: int
    token_ids: list[int]
    """The prompt, then every token generated so far."""
    prompt_len: int
    sampling: SamplingParams
    max_len: int
    """Length of prompt plus answer at which the request ends."""
    priority: int = 0
    """Lower ones are served first; among equals, those that came first."""
    after: Request | None = None
    """A request with the same prompt that computes it first, so that this one finds it in the cache."""
    reading: Reading | None = None
    """Set for a request that ends when its prompt has been computed."""
    draft_token_ids: list[int] = field(default_factory=list)
    """Guesses of what comes next, for the next step to confirm."""
    is_running: bool = False
    is_paused: bool = False
    """It keeps what it holds and is not computed: the beams of a search wait for each other."""
    num_computed: int = 0
    """How many of its tokens have their keys and values in the cache."""
    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    """How many of its blocks are full and can be found by others."""
    identity: int = 0
    """The block pool's name for what the published blocks hold."""
    known_to_runner: bool = False
    """The runner has its sampling parameters, and history, from an earlier step."""
    finish_reason: FinishReason | None = None

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next one can be picked."""
        return len(self.token_ids) - self.num_computed

    @property
    def needs_every_token(self) -> bool:
        """Each of its prompt's tokens must be computed, though the cache may hold what others computed of it."""
        return self.reading is not None or self.sampling.prompt_logprobs is not None

    @property
    def is_beam(self) -> bool:
        """A search decides how it goes on, not the sampler."""
        return (self.sampling.num_beams or 1) > 1

    @property
    def order(self) -> tuple[int, int]:
        """Requests are served in ascending order of this."""
        return self.priority, self.request_id

    @property
    def waits_for_another(self) -> bool:
        """Another request is still computing the prompt that both have."""
        return self.after is not None and self.after.finish_reason is None and self.after.num_generated == 0

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, the one that ended the answer included."""
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's answer so far; `finish_reason` is None while there is more to come."""

    request_id: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    """Generated ids, without the one that ended the answer."""
    text: str
    """Their words, up to a stop string if one was met."""
    delta: str
    """What this step added to `text`."""
    finish_reason: FinishReason | None
    """"stop": the model ended the answer, its form is complete, or a stop string or id was met; "length": a limit was
    met; "error": it failed, and `error` says why."""
    stop_reason: str | int | None = None
    """The stop string or the id that ended the answer."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of `token_ids`, where they were asked for."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of the prompt's tokens but the first, where they were asked for."""
    error: str | None = None
    hidden_states: list[Any] = field(default_factory=list)
    """Of a prompt that was only read, in pieces; so is `logits`."""
    logits: list[Any] = field(default_factory=list)
