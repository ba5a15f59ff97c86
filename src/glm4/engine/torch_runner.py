"""Executes step plans with torch: on a CPU, CUDA, or an Ascend card through torch_npu."""

from __future__ import annotations

from dataclasses import replace

import torch

from glm4.engine.sampler import Sampler, SamplingState
from glm4.engine.step import RequestResult, RequestStep, StepPlan, StepResult
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.ops.attention import make_batch


class TorchRunner:
    """Owns the weights, the KV memory and the sampler."""

    def __init__(self, model: Glm4ForInference, num_blocks: int, block_size: int, unknown_ids: list[int]) -> None:
        """`unknown_ids`: vocabulary rows without a token, never sampled."""
        self.model, self.num_blocks, self.block_size = model, num_blocks, block_size
        self.device = model.embed_tokens.device
        self._kv_cache = model.new_kv_cache(num_blocks * block_size, model.embed_tokens.dtype)
        self._sampler = Sampler(model.config.vocab_size, unknown_ids)
        self._states: dict[int, SamplingState] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step: see `Runner.execute`."""
        self._copy_blocks(plan.block_copies)
        for request_id in plan.finished_ids:
            self._states.pop(request_id, None)
        for step in plan.requests:
            self._remember(step)
        return StepResult(self._compute(plan.requests) if plan.requests else {})

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            for tensors in self._kv_cache:
                for cache in tensors:
                    blocks = cache.view(self.num_blocks, self.block_size, *cache.shape[1:])
                    blocks[target] = blocks[source]

    def _remember(self, step: RequestStep) -> None:
        if step.sampling is not None:
            self._states[step.request_id] = SamplingState(step.sampling, step.prompt_len, list(step.earlier_token_ids))
        self._states[step.request_id].token_ids[step.start :] = step.token_ids

    def _compute(self, steps: list[RequestStep]) -> dict[int, RequestResult]:
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
        results = self._sample(hidden, steps, spans)
        for step, (first, end) in zip(steps, spans, strict=True):
            if step.want_hidden_states:
                result = results.get(step.request_id, RequestResult([]))
                results[step.request_id] = replace(result, hidden_states=hidden[first:end].clone())
        return results

    def _sample(
        self, hidden: torch.Tensor, steps: list[RequestStep], spans: list[tuple[int, int]]
    ) -> dict[int, RequestResult]:
        wanted = [(step, first + i) for step, (first, _) in zip(steps, spans, strict=True) for i in step.logits_at]
        if not wanted:
            return {}
        logits = self.model.logits(hidden[[row for _, row in wanted]])
        picked = self._sampler(logits, [self._states[step.request_id] for step, _ in wanted])
        return {step.request_id: result for (step, _), result in zip(wanted, picked, strict=True)}
