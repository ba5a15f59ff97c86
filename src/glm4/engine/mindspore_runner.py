"""Executes step plans with MindSpore: on a CPU, or on Ascend cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.device_mindspore import MindSporeDevice
from glm4.engine.step import RequestStep, StepPlan, StepResult
from glm4.engine.token_picker import TokenPicker
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading_mindspore import load_model
from glm4.model.modeling_glm4_mindspore import LogitsHead, RotaryEmbedding
from glm4.model.sharding import Shard
from glm4.ops.mindspore import BY_TARGET

_ATTENTION_BYTES = 512 * 2**20
"""What the plain attention on a CPU may take for the keys, values and scores of one call."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some of a request's new tokens, that are computed in one call."""

    row: int
    """Where in the plan's rows the first of them stands."""
    token_ids: list[int]
    start: int
    block_ids: list[int]

    @property
    def context(self) -> int:
        """The request's tokens, up to the last of these."""
        return self.start + len(self.token_ids)


class _Output:
    """See `StepOutput`; the rows lie in the order in which they were computed."""

    def __init__(self, head: LogitsHead, rank: int, calls: list[list[_Piece]], hidden: list[Tensor]) -> None:
        rows = [row for pieces in calls for p in pieces for row in range(p.row, p.row + len(p.token_ids))]
        self._places = [0] * len(rows)
        for place, row in enumerate(rows):
            self._places[row] = place
        self._hidden = hidden[0] if len(hidden) == 1 else ops.concat(hidden)
        self._head, self._is_sampler = head, rank == 0

    def hidden(self, first: int, end: int) -> torch.Tensor:
        rows = ops.gather(self._hidden, _int32(self._places[first:end]), 0)
        # A bfloat16 array is nothing that torch knows; through float32 nothing is lost.
        wide = torch.tensor(rows.astype(mstype.float32).asnumpy())
        return wide.bfloat16() if rows.dtype == mstype.bfloat16 else wide

    def logits(self, rows: list[int]) -> torch.Tensor | None:
        logits = self._head(self._hidden, _int32([self._places[row] for row in rows]))
        return torch.tensor(logits.asnumpy()) if self._is_sampler else None


class MindSporeRunner:
    """Owns the weights, the KV memory and the state of what picks tokens."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Glm4Config,
        device: MindSporeDevice,
        dtype: str,
        num_blocks: int,
        block_size: int,
        unknown_ids: list[int],
        on_tensor: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`unknown_ids`: vocabulary rows without a token, never sampled; the rest as for `load_model`.

        Raises what that does, and OptionError where `device.size` ranks cannot share the model.
        """
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, config.vocab_size
        self._config, self._target, self._shard = config, device.target, Shard(device.rank, device.size)
        self._shard.check(config)
        self._model, self._head = load_model(
            checkpoint, config, device.target, dtype, num_blocks, block_size, self._shard, on_tensor
        )
        self._rotary = RotaryEmbedding(config)
        self._picker = TokenPicker(unknown_ids, config.vocab_size)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step: see `Runner.execute`. All ranks execute the same plans; only rank 0 picks tokens."""
        for source, target in plan.block_copies:
            self._model.copy_block(source, target)
        self._picker.remember(plan)
        if not plan.requests:
            return StepResult({})
        calls = list(self._calls(plan.requests))
        output = _Output(self._head, self._shard.tensor_rank, calls, [self._forward(pieces) for pieces in calls])
        return StepResult(self._picker.results(plan, output))

    def _calls(self, steps: list[RequestStep]) -> Iterator[list[_Piece]]:
        """What goes into each call of the model: everything into one, where the device's attention takes that.

        Else a call takes requests with equally many new tokens, as many as the attention has memory for; a request for
        which there is not enough even alone is computed in parts.
        """
        pieces, row = [], 0
        for step in steps:
            pieces.append(_Piece(row, step.token_ids, step.start, step.block_ids))
            row += len(step.token_ids)
        if BY_TARGET[self._target].mixes_lengths:
            yield pieces
            return
        call: list[_Piece] = []
        for piece in sorted(pieces, key=lambda piece: len(piece.token_ids)):
            for part in self._parts(piece):
                if call and not self._fits([*call, part]):
                    yield call
                    call = []
                call.append(part)
        yield call

    def _fits(self, call: list[_Piece]) -> bool:
        """Whether the plain attention takes these requests in one call."""
        length, context = len(call[0].token_ids), max(piece.context for piece in call)
        same = all(len(piece.token_ids) == length for piece in call)
        return same and len(call) * context * self._bytes_per_context(length) <= _ATTENTION_BYTES

    def _bytes_per_context(self, length: int) -> int:
        """What each token of a context takes: keys and values, each in two layouts; twice the scores of each head."""
        config, shard = self._config, self._shard
        keys_and_values = 4 * shard.num_kv_heads(config) * config.head_dim
        return 4 * (keys_and_values + 2 * length * config.num_attention_heads // shard.tensor_size)

    def _parts(self, piece: _Piece) -> Iterator[_Piece]:
        """`piece` in as few parts as fit one by one."""
        count = len(piece.token_ids)
        while count > 1 and piece.context * self._bytes_per_context(count) > _ATTENTION_BYTES:
            count = -(-count // 2)
        for first in range(0, len(piece.token_ids), count):
            ids = piece.token_ids[first : first + count]
            yield _Piece(piece.row + first, ids, piece.start + first, piece.block_ids)

    def _forward(self, pieces: list[_Piece]) -> Tensor:
        """The hidden states of the pieces' tokens, one piece after the other."""
        size = self.block_size
        positions = [position for piece in pieces for position in range(piece.start, piece.context)]
        slots = [p.block_ids[i // size] * size + i % size for p in pieces for i in range(p.start, p.context)]
        tables = [piece.block_ids[: -(-piece.context // size)] for piece in pieces]
        width = max(map(len, tables))
        cos, sin = self._rotary(np.array(positions, np.int32))
        return self._model(
            _int32([token_id for piece in pieces for token_id in piece.token_ids]),
            Tensor(cos, self._head.weight.dtype),
            Tensor(sin, self._head.weight.dtype),
            _int32(positions),
            _int32(slots),
            _int32([table + table[:1] * (width - len(table)) for table in tables]),
            _int32([piece.context for piece in pieces]),
            _int32([len(piece.token_ids) for piece in pieces]),
        )


def _int32(numbers: list[Any]) -> Tensor:
    return Tensor(np.array(numbers, np.int32))
