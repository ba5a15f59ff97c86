"""What goes down to a runner and what comes back: plain integers, so that a plan can cross a process border."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from glm4.options import SamplingParams

PLAN_VERSION = 2

HiddenStates = Literal["none", "all", "sum"]
"""Which of the last layer's normalised hidden states are wanted: each token's, or their sum over the step."""


@dataclass(frozen=True, slots=True)
class RequestStep:
    """One request's share of a step: which of its tokens to compute, and where their keys and values live."""

    request_id: int
    token_ids: list[int]
    """Tokens to compute, in order; the last ones are `draft_token_ids` where there are drafts."""
    start: int
    """Position of the first of them: how many tokens of the request the KV cache holds already."""
    block_ids: list[int]
    """The request's whole block table; position p lives in block_ids[p // block_size]."""
    logits_at: list[int] = field(default_factory=list)
    """Indices into token_ids after which a token is to be picked (none while a prompt is only caught up on)."""
    draft_token_ids: list[int] = field(default_factory=list)
    prompt_targets: list[int] = field(default_factory=list)
    """The token after each of token_ids, as far as the prompt goes, where the prompt's log-probabilities are wanted."""
    hidden_states: HiddenStates = "none"
    raw_logits_at: list[int] = field(default_factory=list)
    """Indices into token_ids whose logits are wanted as they are."""
    sampling: SamplingParams | None = None
    """Sent with the request's first step, and again after a preemption; every value filled in but the limits."""
    earlier_token_ids: list[int] = field(default_factory=list)
    """Sent with `sampling`: the tokens before `start`, whose keys and values were found in the cache."""
    prompt_len: int = 0
    """Sent with `sampling`: how many of the request's tokens are its prompt (penalties tell them apart)."""

    @property
    def catches_up(self) -> bool:
        """More than the one token that an answer grew by last, and its drafts."""
        return len(self.token_ids) - len(self.draft_token_ids) > 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: any mix of prompt chunks and single tokens."""

    requests: list[RequestStep]
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(from, to) block copies to make before anything is computed."""
    finished_ids: list[int] = field(default_factory=list)
    """Requests whose state the runner may drop."""
    grammar_masks: Mapping[int, bytes] = field(default_factory=dict)
    """Request id to bitmaps over the vocabulary, least significant bit first, 1 = allowed: one for each of logits_at.
    Taking one may wait for it: they are computed beside the model's forward."""
    version: int = PLAN_VERSION


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One picked token's log-probability under the model, before penalties and temperature."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest token ids and their log-probabilities, best first, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What one request of a plan gave."""

    token_ids: list[int]
    """The picked tokens: one, or the drafts that the model confirms and the token it picks after them."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of `prompt_targets`."""
    hidden_states: Any = None
    """"all": [tokens, hidden_size] in the model's number format; "sum": float32 [hidden_size]."""
    logits: Any = None
    """float32 [len(raw_logits_at), vocab_size]."""
    error: str | None = None
    """Why this request cannot go on, though the others can."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results by request id; requests that wanted nothing are not in it."""

    results: dict[int, RequestResult]
    version: int = PLAN_VERSION


class Runner(Protocol):
    """Owns the weights and the KV memory; holds no tokenizer and takes no decisions."""

    num_blocks: int
    block_size: int
    vocab_size: int
    """Rows of logits: at least the tokenizer's ids."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step. What it raises ends all requests of the plan; a result's `error` ends that one alone."""
        ...


@runtime_checkable
class StagedRunner(Runner, Protocol):
    """One whose parts each compute a step of their own at the same time."""

    stages: int
    """Steps that can be under way at once without one waiting for another."""

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin one step; what is returned waits for its result, and is called in the order of the beginnings.

        Steps are computed in that order on every part, so one may use the blocks that another gives up. Either raises
        as `execute` does.
        """
        ...
