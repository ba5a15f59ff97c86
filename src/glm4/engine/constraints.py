"""Which answers are held to a form, and where in an answer the form begins.

The newline that leads an ordinary chat answer belongs to the template, and a thought to the model alone: what has the
form is what stands after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from glm4.engine.request import Request
from glm4.engine.step import StepPlan
from glm4.options import SamplingParams
from glm4.structured.grammar import GrammarCompiler, Matcher
from glm4.text.reasoning import END_THINK, THINK
from glm4.text.tokenizer import Tokenizer

_END_THINK = END_THINK.encode()
_PROMPT_END = 16
"""Tokens at the prompt's end among which its `<think>` stands, if there is one."""
_LONGEST_TOKEN = 1024


@dataclass(slots=True)
class Constraint:
    """How far one answer has got in its form."""

    matcher: Matcher
    thinking: bool
    tail: bytes = b""
    """The end of the thought so far, for `</think>` is several tokens."""


class Constraints:
    """The forms of all requests that have one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size`: the model's, which may be larger than the tokenizer's."""
        self._tokenizer = tokenizer
        self._compiler = GrammarCompiler(tokenizer, vocab_size, eos_token_ids)
        self._open: dict[int, Constraint] = {}

    def check(self, params: SamplingParams) -> None:
        """Raise OptionError for a form that cannot be held; from any thread, so that it can be done ahead."""
        if params.constraints:
            self._compiler.compile(**params.constraints)

    def prepare(self, params: SamplingParams, prompt_token_ids: list[int], chat: bool) -> Constraint | None:
        """What will hold a request to the form that `params` ask for, if any. Raises OptionError as `check`.

        `chat`: the prompt came through the chat template.
        """
        if not params.constraints:
            return None
        thinking = chat and self._ends_in_thought(prompt_token_ids)
        leads = ("\n", "\n\n") if thinking else ("\n",) if chat else ()
        lead_ids = [ids[0] for ids in map(self._tokenizer.encode_plain, leads) if len(ids) == 1]
        return Constraint(self._compiler.compile(**params.constraints, lead_ids=lead_ids), thinking)

    def hold(self, request_id: int, constraint: Constraint) -> None:
        """Hold a request to its form from now on."""
        self._open[request_id] = constraint

    def _ends_in_thought(self, prompt_token_ids: list[int]) -> bool:
        return self._tokenizer.decode(prompt_token_ids[-_PROMPT_END:]).rstrip().endswith(THINK)

    def cut_drafts(self, requests: Iterable[Request]) -> None:
        """Leave only those drafts that the forms allow, and none in a thought, where the form may begin any moment."""
        for request in requests:
            constraint = self._open.get(request.request_id)
            if constraint is not None and request.draft_token_ids:
                drafts = request.draft_token_ids
                allowed = 0 if constraint.thinking else constraint.matcher.allowed_drafts(drafts)
                request.draft_token_ids = drafts[:allowed]

    def masks(self, plan: StepPlan) -> Mapping[int, bytes]:
        """Start computing the masks that `plan` needs; taking one waits for it."""
        steps = [step for step in plan.requests if step.logits_at and step.request_id in self._open]
        drafts = {s.request_id: s.draft_token_ids for s in steps if not self._open[s.request_id].thinking}
        return self._compiler.masks({id: self._open[id].matcher for id in drafts}, drafts) if drafts else {}

    def accept(self, request_id: int, token_ids: Sequence[int]) -> str | None:
        """Take in tokens of an answer; says why it cannot go on, if so."""
        constraint = self._open.get(request_id)
        if constraint is None:
            return None
        for token_id in token_ids:
            if constraint.thinking:
                constraint.tail = (constraint.tail + self._tokenizer.token_bytes(token_id))[-_LONGEST_TOKEN:]
                constraint.thinking = _END_THINK not in constraint.tail
            else:
                constraint.matcher.accept(token_id)
        return constraint.matcher.failure

    def is_complete(self, request_id: int) -> bool:
        """The answer has its form, and nothing can follow."""
        constraint = self._open.get(request_id)
        return constraint is not None and constraint.matcher.finished

    def forget(self, request_id: int) -> None:
        """Drop what is kept for an ended request."""
        self._open.pop(request_id, None)
