"""Executes step plans with torch: on a CPU, CUDA, or an Ascend card through torch_npu."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from glm4.engine.sampler import Sampler, SamplingState, token_logprobs
from glm4.engine.step import RequestResult, RequestStep, StepPlan, StepResult, TokenLogprobs
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.ops.attention import make_batch

_LOGIT_ROWS = 64
"""Rows of logits that exist at once for a prompt's log-probabilities."""
_NOT_FINITE = "the logits are not finite: a weight is damaged, so fetch the model again"


class TorchRunner:
    """Owns the weights, the KV memory and the sampler."""

    def __init__(
        self,
        model: Glm4ForInference,
        num_blocks: int,
        block_size: int,
        unknown_ids: list[int],
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`unknown_ids`: vocabulary rows without a token, never sampled; `kv_dtype`: None is the model's own."""
        self.model, self.num_blocks, self.block_size = model, num_blocks, block_size
        self.vocab_size = model.config.vocab_size
        self.device = model.embed_tokens.device
        self._kv_cache = model.new_kv_cache(num_blocks * block_size, kv_dtype or model.embed_tokens.dtype)
        self._sampler = Sampler(unknown_ids)
        self._states: dict[int, SamplingState] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step: see `Runner.execute`."""
        self._copy_blocks(plan.block_copies)
        for request_id in plan.finished_ids:
            self._states.pop(request_id, None)
        for step in plan.requests:
            self._remember(step)
        return StepResult(self._compute(plan) if plan.requests else {})

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            for keys, values in self._kv_cache:
                for tensor in (*keys.tensors, *values.tensors):
                    blocks = tensor.view(self.num_blocks, self.block_size, *tensor.shape[1:])
                    blocks[target] = blocks[source]

    def _remember(self, step: RequestStep) -> None:
        if step.sampling is not None:
            self._states[step.request_id] = SamplingState(step.sampling, step.prompt_len, list(step.earlier_token_ids))
        self._states[step.request_id].token_ids[step.start :] = step.token_ids

    def _compute(self, plan: StepPlan) -> dict[int, RequestResult]:
        steps = plan.requests
        spans: list[tuple[int, int]] = []
        token_ids: list[int] = []
        positions: list[int] = []
        for step in steps:
            spans.append((len(token_ids), len(token_ids) + len(step.token_ids)))
            token_ids += step.token_ids
            positions += range(step.start, step.start + len(step.token_ids))
        batch = make_batch(spans, [s.start for s in steps], [s.block_ids for s in steps], self.block_size, self.device)
        ids, places = (torch.tensor(numbers, device=self.device) for numbers in (token_ids, positions))
        hidden = self.model.forward(ids, places, batch, self._kv_cache)
        results = self._pick(hidden, plan, spans)
        for step, (first, end) in zip(steps, spans, strict=True):
            extra: dict[str, Any] = {}
            if step.prompt_targets:
                extra["prompt_logprobs"] = self._prompt_logprobs(hidden[first:end], step)
            if step.hidden_states == "all":
                extra["hidden_states"] = hidden[first:end].clone()
            if step.hidden_states == "sum":
                extra["hidden_states"] = hidden[first:end].sum(0, dtype=torch.float32)
            if step.raw_logits_at:
                extra["logits"] = self.model.logits(hidden[[first + i for i in step.raw_logits_at]])
            if extra:
                results[step.request_id] = replace(results.get(step.request_id, RequestResult([])), **extra)
        return results

    def _pick(self, hidden: torch.Tensor, plan: StepPlan, spans: list[tuple[int, int]]) -> dict[int, RequestResult]:
        """Tokens at all wanted positions at once; what follows an unconfirmed draft is dropped."""
        wanted = [
            (step, first, i) for step, (first, _) in zip(plan.requests, spans, strict=True) for i in step.logits_at
        ]
        if not wanted:
            return {}
        logits = self.model.logits(hidden[[first + i for _, first, i in wanted]])
        finite = logits.sum(-1).isfinite().tolist()  # one pass; isfinite on all of them takes several
        damaged = {step.request_id for (step, _, _), sound in zip(wanted, finite, strict=True) if not sound}
        if damaged:
            logits.nan_to_num_()
        states = [self._states[step.request_id].cut(step.start + i + 1) for step, _, i in wanted]
        token_ids, logprobs = self._sampler(logits, states, self._masks(plan, wanted))
        picked: dict[int, RequestResult] = {}
        for (step, _, i), token_id, entry in zip(wanted, token_ids, logprobs, strict=True):
            result = picked.setdefault(step.request_id, RequestResult([]))
            position = i - step.logits_at[0]
            if result.token_ids != step.draft_token_ids[:position]:
                continue
            result.token_ids.append(token_id)
            if entry is not None:
                result.logprobs.append(entry)
        return picked | {request_id: RequestResult([], error=_NOT_FINITE) for request_id in damaged}

    def _masks(self, plan: StepPlan, wanted: list[tuple[RequestStep, int, int]]) -> dict[int, bytes]:
        """Which tokens are allowed, for those rows of `wanted` that are held to a form."""
        size = -(-self.vocab_size // 8)
        masks = {}
        for row, (step, _, i) in enumerate(wanted):
            if step.request_id in plan.grammar_masks:
                at = i - step.logits_at[0]
                masks[row] = plan.grammar_masks[step.request_id][at * size : (at + 1) * size]
        return masks

    def _prompt_logprobs(self, hidden: torch.Tensor, step: RequestStep) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt's own tokens, in slices, for the logits of a whole prompt are large."""
        count = self._states[step.request_id].sampling.prompt_logprobs or 0
        found = []
        for first in range(0, len(step.prompt_targets), _LOGIT_ROWS):
            targets = step.prompt_targets[first : first + _LOGIT_ROWS]
            logits = self.model.logits(hidden[first : first + len(targets)])
            self._sampler.mask_unknown(logits)
            found += [token_logprobs(row, t, count) for row, t in zip(logits.log_softmax(-1), targets, strict=True)]
        return found
