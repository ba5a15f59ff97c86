"""What MindSpore computes in its own way on each device: one small table, read column by column.

`CPU` is made of plain operations and is what the tests run. `ASCEND` is made of MindSpore's fused inference operations,
written from the documentation of MindSpore 2.7.1 that is named at each, and **has not run on hardware**: see
docs/ascend.md for the commands that verify it there.

All rows of a step are flat. T: tokens; B: requests; a head is `head_dim` numbers. What the cells take beside
activations is
  angles: cos and sin, [T, head_dim];
  batch: positions [T] in the request; slots [T], block · block_size + offset; block_tables [B, blocks of the longest];
    context_lens [B], tokens so far with the new ones; query_lens [B], the new ones; all int32.
In graph mode MindSpore compiles each `construct`, so they keep to the Python that it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from mindspore import Tensor, nn, ops

Tensors = tuple[Tensor, ...]


class CpuRmsNorm(nn.Cell):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, 2019)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: [T, size]; weight: [size] → [T, size]."""
        return x * ops.rsqrt(self.mean(x * x, -1) + self.eps) * weight


class AscendRmsNorm(nn.Cell):
    """mindspore.ops.RmsNorm, which gives (result, reciprocal deviation)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm = ops.RmsNorm(eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.norm(x, weight)[0]


class CpuSwiglu(nn.Cell):
    """silu(gate) · up (Shazeer, 2020); gate_up: [T, 2·size], the gate's half first → [T, size]."""

    def construct(self, gate_up: Tensor) -> Tensor:
        gate, up = ops.split(gate_up, gate_up.shape[-1] // 2, -1)
        return gate * ops.sigmoid(gate) * up


class AscendSwiglu(nn.Cell):
    """mindspore.ops.swiglu: the first half of the last axis goes through silu."""

    def __init__(self) -> None:
        super().__init__()
        self.swiglu = ops.auto_generate.Swiglu()

    def construct(self, gate_up: Tensor) -> Tensor:
        return self.swiglu(gate_up, -1)


class CpuRotary(nn.Cell):
    """Turn the pairs (i, i + head_dim/2) of each head: x · cos + rotate_half(x) · sin (Su et al., 2021)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def construct(
        self, q: Tensor, k: Tensor, angles: tuple[Tensor, ...], batch: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """q: [T, heads · head_dim]; k: [T, kv_heads · head_dim] → both turned."""
        return self.turn(q, *angles), self.turn(k, *angles)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.reshape((x.shape[0], -1, self.head_dim))
        first, second = ops.split(heads, self.head_dim // 2, -1)
        turned = heads * cos.expand_dims(1) + ops.concat((-second, first), -1) * sin.expand_dims(1)
        return turned.reshape(x.shape)


class AscendRotary(nn.Cell):
    """mindspore.ops.ApplyRotaryPosEmb in cos_format 2: pairs (i, i + head_dim/2), a row of cos and sin for each token.

    As in MindSpore's tutorial "Building a Large Language Model Inference Network from Scratch" (its decode step).
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.rotate = ops.ApplyRotaryPosEmb(2)

    def construct(
        self, q: Tensor, k: Tensor, angles: tuple[Tensor, ...], batch: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        _, _, _, context_lens, _ = batch
        q, k = self.rotate(q, k, *angles, context_lens)
        return q, k


class CpuPagedAttention(nn.Cell):
    """Write the step's keys and values into the cache, then let each token see its request's past and itself.

    Every request of a call has the same number of new tokens, T / B: the runner sees to that.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
        super().__init__()
        self.kv_heads, self.group, self.head_dim, self.block_size = kv_heads, heads // kv_heads, head_dim, block_size
        self.scale = 1 / sqrt(head_dim)
        self.write = ops.ScatterNdUpdate()
        self.compare, self.weigh = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Tensors) -> Tensor:
        """q: [T, heads · head_dim]; k, v: [T, kv_heads · head_dim] → [T, heads · head_dim].

        The caches, changed in place: [blocks, block_size, kv_heads, head_dim].
        """
        positions, slots, block_tables, context_lens, _ = batch
        indices = ops.stack((slots // self.block_size, slots % self.block_size), -1)
        self.write(k_cache, indices, k.reshape((-1, self.kv_heads, self.head_dim)))
        self.write(v_cache, indices, v.reshape((-1, self.kv_heads, self.head_dim)))
        requests = block_tables.shape[0]
        keys, values = self.context(k_cache, block_tables), self.context(v_cache, block_tables)
        queries = q.reshape((requests, -1, self.kv_heads, self.group, self.head_dim)).transpose(0, 2, 3, 1, 4)
        scores = self.compare(queries.reshape((requests, self.kv_heads, -1, self.head_dim)), keys) * self.scale
        # [B, kv_heads, group, new tokens, context]
        scores = scores.reshape((requests, self.kv_heads, self.group, -1, keys.shape[2]))
        places = ops.arange(keys.shape[2])
        hidden = places > positions.reshape((requests, 1, 1, -1, 1))
        weights = self.softmax(ops.masked_fill(scores, hidden, float("-inf")))
        # Beyond its end a block holds what somebody left there: 0 times a NaN would be a NaN.
        values = ops.masked_fill(values, places.expand_dims(1) >= context_lens.reshape((requests, 1, 1, 1)), 0.0)
        seen = self.weigh(weights.reshape((requests, self.kv_heads, -1, keys.shape[2])), values)
        seen = seen.reshape((requests, self.kv_heads, self.group, -1, self.head_dim)).transpose(0, 3, 1, 2, 4)
        return seen.reshape((-1, self.kv_heads * self.group * self.head_dim))

    def context(self, cache: Tensor, block_tables: Tensor) -> Tensor:
        """The requests' blocks in a row: [B, kv_heads, context, head_dim]."""
        blocks = ops.gather(cache, block_tables, 0)
        return blocks.reshape((block_tables.shape[0], -1, self.kv_heads, self.head_dim)).transpose(0, 2, 1, 3)


class AscendPagedAttention(nn.Cell):
    """mindspore.ops.ReshapeAndCache, then PagedAttention, which takes prompts and answers in one call.

    With q_seq_lens a request may have any number of new tokens, and attn_mask says which keys each of them sees: 0, or
    -10000 for those after it, [T, context].
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.write = ops.auto_generate.ReshapeAndCache()
        self.attend = ops.auto_generate.PagedAttention(heads, 1 / sqrt(head_dim), kv_heads)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Tensors) -> Tensor:
        positions, slots, block_tables, context_lens, query_lens = batch
        q = ops.depend(q, self.write(k, v, k_cache, v_cache, slots))
        after = ops.arange(block_tables.shape[1] * self.block_size) > positions.expand_dims(1)
        mask = after.astype(q.dtype) * -10000.0
        return self.attend(q, k_cache, v_cache, block_tables, context_lens, None, None, mask, query_lens)


@dataclass(frozen=True, slots=True)
class DeviceOps:
    """One column: the cells that a decoder layer is built from, all with the same arguments on every device."""

    rms_norm: type[nn.Cell]
    swiglu: type[nn.Cell]
    rotary: type[nn.Cell]
    paged_attention: type[nn.Cell]
    mixes_lengths: bool
    """Whether requests with different numbers of new tokens fit into one call."""


#                  rms_norm       swiglu        rotary        paged_attention       mixes_lengths
CPU = DeviceOps(   CpuRmsNorm,    CpuSwiglu,    CpuRotary,    CpuPagedAttention,    mixes_lengths=False)  # fmt: skip
ASCEND = DeviceOps(AscendRmsNorm, AscendSwiglu, AscendRotary, AscendPagedAttention, mixes_lengths=True)  # fmt: skip
BY_TARGET = {"CPU": CPU, "Ascend": ASCEND}
"""By MindSpore's name of the device."""
