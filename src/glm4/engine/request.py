"""A request on its way through the engine, and what its caller gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glm4.engine.step import TokenLogprobs
from glm4.options import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


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
    draft_token_ids: list[int] = field(default_factory=list)
    """Guesses of what comes next, for the next step to confirm."""
    is_running: bool = False
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
    """"stop": the model ended the answer, or a stop string or id was met; "length": a limit was met."""
    stop_reason: str | int | None = None
    """The stop string or the id that ended the answer."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of `token_ids`, where they were asked for."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of the prompt's tokens but the first, where they were asked for."""
