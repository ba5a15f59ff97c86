"""From a step's logits to its results: the half of a runner that is the same whatever computed them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from glm4.engine.sampler import Sampler, SamplingState, token_logprobs
from glm4.engine.step import RequestResult, RequestStep, StepPlan, TokenLogprobs
from glm4.ops.fused import finite_rows

_LOGIT_ROWS = 64
"""Rows of logits that exist at once for a prompt's log-probabilities."""
_NOT_FINITE = "the logits are not finite: a weight is damaged, so fetch the model again"


class StepOutput(Protocol):
    """What a model computed of one step: a row for each of the plan's tokens, request after request."""

    def hidden(self, first: int, end: int) -> Tensor:
        """The normalised hidden states of rows [first, end), [rows, hidden_size]; the caller may keep them."""
        ...

    def logits(self, rows: list[int]) -> Tensor | None:
        """float32 or bfloat16 [len(rows), vocab_size], the caller may overwrite them; None where another rank has them.

        All ranks that share the model call it, with the same rows in the same order.
        """
        ...


class TokenPicker:
    """Remembers what picking a request's tokens depends on, and picks them."""

    def __init__(self, unknown_ids: list[int], vocab_size: int) -> None:
        """`unknown_ids`: vocabulary rows without a token, never picked; vocab_size: all rows."""
        self._sampler, self._vocab_size = Sampler(unknown_ids, vocab_size), vocab_size
        self._states: dict[int, SamplingState] = {}

    def remember(self, plan: StepPlan) -> None:
        """Take in what the plan says of its requests, before anything of it is computed."""
        for request_id in plan.finished_ids:
            self._states.pop(request_id, None)
        for step in plan.requests:
            if step.sampling is not None:
                state = SamplingState(step.sampling, step.prompt_len, list(step.earlier_token_ids))
                self._states[step.request_id] = state
            self._states[step.request_id].token_ids[step.start :] = step.token_ids

    def results(self, plan: StepPlan, output: StepOutput) -> dict[int, RequestResult]:
        """What the plan asks for, by request id; on a rank without logits, what can be said without them."""
        firsts, rows = [], 0
        for step in plan.requests:
            firsts.append(rows)
            rows += len(step.token_ids)
        results = self._pick(plan, output, firsts)
        for step, first in zip(plan.requests, firsts, strict=True):
            extra: dict[str, Any] = {}
            if step.prompt_targets:
                extra["prompt_logprobs"] = self._prompt_logprobs(output, first, step)
            if step.hidden_states != "none":
                hidden = output.hidden(first, first + len(step.token_ids))
                extra["hidden_states"] = hidden if step.hidden_states == "all" else hidden.sum(0, dtype=torch.float32)
            if step.raw_logits_at:
                logits = output.logits([first + i for i in step.raw_logits_at])
                extra["logits"] = None if logits is None else logits.float()
            if extra:
                results[step.request_id] = replace(results.get(step.request_id, RequestResult([])), **extra)
        return results

    def _pick(self, plan: StepPlan, output: StepOutput, firsts: list[int]) -> dict[int, RequestResult]:
        """Tokens at all wanted positions at once; what follows an unconfirmed draft is dropped."""
        wanted = [
            (step, first + i, i) for step, first in zip(plan.requests, firsts, strict=True) for i in step.logits_at
        ]
        logits = output.logits([row for _, row, _ in wanted]) if wanted else None
        if logits is None:
            return {}
        states = [self._states[step.request_id].cut(step.start + i + 1) for step, _, i in wanted]
        masks = self._masks(plan, wanted)
        plain = None if masks else self._sampler.pick_plain(logits, states)
        if plain is not None:
            token_ids, finite = plain, [token_id >= 0 for token_id in plain]
            logprobs: list[TokenLogprobs | None] = [None] * len(plain)
        else:
            logits = logits.float()
            finite = finite_rows(logits).tolist()
            token_ids, logprobs = self._sampler(logits if all(finite) else logits.nan_to_num_(), states, masks)
        damaged = {step.request_id for (step, _, _), sound in zip(wanted, finite, strict=True) if not sound}
        picked: dict[int, RequestResult] = {}
        for (step, _, i), token_id, entry in zip(wanted, token_ids, logprobs, strict=True):
            result = picked.setdefault(step.request_id, RequestResult([]))
            if result.token_ids != step.draft_token_ids[: i - step.logits_at[0]]:
                continue
            result.token_ids.append(token_id)
            if entry is not None:
                result.logprobs.append(entry)
        return picked | {request_id: RequestResult([], error=_NOT_FINITE) for request_id in damaged}

    def _masks(self, plan: StepPlan, wanted: list[tuple[RequestStep, int, int]]) -> dict[int, bytes]:
        """Which tokens are allowed, for those rows of `wanted` that are held to a form."""
        size = -(-self._vocab_size // 8)
        masks = {}
        for row, (step, _, i) in enumerate(wanted):
            if step.request_id in plan.grammar_masks:
                at = i - step.logits_at[0]
                masks[row] = plan.grammar_masks[step.request_id][at * size : (at + 1) * size]
        return masks

    def _prompt_logprobs(self, output: StepOutput, first: int, step: RequestStep) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt's own tokens, in slices, for the logits of a whole prompt are large."""
        count = self._states[step.request_id].sampling.prompt_logprobs or 0
        found = []
        for begin in range(0, len(step.prompt_targets), _LOGIT_ROWS):
            targets = step.prompt_targets[begin : begin + _LOGIT_ROWS]
            logits = output.logits(list(range(first + begin, first + begin + len(targets))))
            if logits is not None:
                logits = logits.float()
                self._sampler.mask_unknown(logits)
                found += [token_logprobs(row, t, count) for row, t in zip(logits.log_softmax(-1), targets, strict=True)]
        return found
