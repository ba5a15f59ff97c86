"""Executes step plans with torch: on a CPU, CUDA, or an Ascend card through torch_npu."""

from __future__ import annotations

import torch
from torch import Tensor

from glm4.engine.step import StepPlan, StepResult
from glm4.engine.token_picker import TokenPicker
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.ops.attention import make_batch
from glm4.parallel.ranks import Ranks


class _Output:
    """See `StepOutput`."""

    def __init__(self, model: Glm4ForInference, hidden: Tensor) -> None:
        self._model, self._hidden = model, hidden

    def hidden(self, first: int, end: int) -> Tensor:
        return self._hidden[first:end].clone()

    def logits(self, rows: list[int]) -> Tensor | None:
        places = torch.tensor(rows, device=self._hidden.device)
        return self._model.logits(self._hidden.index_select(0, places))


class TorchRunner:
    """Owns a rank's weights, KV memory and sampler."""

    def __init__(
        self,
        model: Glm4ForInference,
        num_blocks: int,
        block_size: int,
        unknown_ids: list[int],
        kv_dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`unknown_ids`: vocabulary rows without a token, never sampled; `kv_dtype`: None is the model's own;
        `ranks`: those that hold the model together, if they do."""
        self.model, self.num_blocks, self.block_size = model, num_blocks, block_size
        self.vocab_size = model.config.vocab_size
        self.device, self.dtype = model.device, model.dtype
        self._ranks = ranks
        self._kv_cache = model.new_kv_cache(num_blocks * block_size, kv_dtype or model.dtype)
        self._picker = TokenPicker(unknown_ids, self.vocab_size)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step: see `Runner.execute`."""
        self._copy_blocks(plan.block_copies)
        self._picker.remember(plan)
        hidden = self._forward(plan) if plan.requests else None
        return StepResult({} if hidden is None else self._picker.results(plan, _Output(self.model, hidden)))

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            for keys, values in self._kv_cache:
                for tensor in (*keys.tensors, *values.tensors):
                    blocks = tensor.view(self.num_blocks, self.block_size, *tensor.shape[1:])
                    blocks[target] = blocks[source]

    def _forward(self, plan: StepPlan) -> Tensor | None:
        """The last layer's normalised hidden states, a row for each token; None on ranks of an earlier stage."""
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
        if self._ranks is None:
            return self.model.forward(ids, places, batch, self._kv_cache)
        stream = None
        if self._ranks.place.previous is not None:
            shape = (len(token_ids), self.model.config.hidden_size)
            stream = self._ranks.receive_stage(shape, self.dtype, self.device)
        hidden = self.model.forward(ids, places, batch, self._kv_cache, stream)
        if self._ranks.place.next is None:
            return hidden
        self._ranks.send_stage(hidden)
        return None
