"""GLM-4-0414 for inference with MindSpore: any mix of prompt chunks and single tokens over a paged KV cache.

The same mathematics as `modeling_glm4_infer`, built from the cells of `ops.mindspore` and without torch. One thing is
laid out differently: GLM-4 turns the pairs (2i, 2i+1) of the first part of each head, and the fused operation turns the
pairs (i, i + head_dim/2) of all of it. So the rows of q_proj and k_proj are put in another order while they load, the
same for both, which leaves every q · k as it is; the pairs that GLM-4 does not turn get the angle 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from numpy.typing import NDArray

from glm4.model.configuration_glm4 import Glm4Config, RopeParameters
from glm4.ops.mindspore import DeviceOps, Tensors

Weight = Callable[[str], Tensor]
"""From a weight's name in the checkpoint to this rank's part of it."""
LayerCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, [blocks, block_size, this rank's kv_heads, head_dim]."""


def half_split_order(config: Glm4Config) -> NDArray[np.int64]:
    """The order of a head's rows in which the pairs (2i, 2i+1) lie head_dim/2 apart: int64 [head_dim]."""
    rows = np.arange(config.head_dim)
    turned, kept = rows[: config.rotary_dim], rows[config.rotary_dim :]
    half = len(kept) // 2
    return np.concatenate((turned[::2], kept[:half], turned[1::2], kept[half:]))


class RotaryEmbedding:
    """cos and sin of every position's angles, for heads in `half_split_order`."""

    def __init__(self, config: Glm4Config) -> None:
        self._frequencies = np.zeros(config.head_dim // 2, np.float32)
        self._frequencies[: config.rotary_dim // 2] = rotary_frequencies(config.rotary_dim, config.rope)
        self._scale = np.ones(config.head_dim // 2, np.float32)
        self._scale[: config.rotary_dim // 2] = attention_factor(config.rope)

    def __call__(self, positions: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """positions: [tokens] → cos, sin: float32 [tokens, head_dim]."""
        angles = positions[:, None].astype(np.float32) * self._frequencies
        cos, sin = np.cos(angles) * self._scale, np.sin(angles) * self._scale
        return np.concatenate((cos, cos), -1), np.concatenate((sin, sin), -1)


def rotary_frequencies(dim: int, rope: RopeParameters) -> NDArray[np.float32]:
    """`ops.rotary.rotary_frequencies` without torch: the angle per position of each pair, float32 [dim/2]."""
    periods: NDArray[np.float32] = np.float32(rope.theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    if not rope.yarn:
        return np.reciprocal(periods)

    def pair_that_turns(times: float) -> float:
        turns = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width divides by zero
    slowed = ((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    frequencies: NDArray[np.float32] = slowed / (np.float32(rope.factor) * periods) + (1 - slowed) / periods
    return frequencies


def attention_factor(rope: RopeParameters) -> float:
    """By how much YaRN stretches cos and sin, see `ops.rotary.yarn_attention_factor`."""
    if not rope.yarn:
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor

    def stretch(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return stretch(rope.mscale) / stretch(rope.mscale_all_dim)
    return stretch(1.0)


class Linear(nn.Cell):
    """y = x · weightᵀ + bias; `reduce`: each rank has some of the inputs, so the ranks' results are added."""

    def __init__(self, weight: Weight, name: str, has_bias: bool = False, reduce: bool = False) -> None:
        super().__init__()
        self.weight = _parameter(weight, name + ".weight")
        self.bias = _parameter(weight, name + ".bias") if has_bias else None
        self.matmul = ops.MatMul(transpose_b=True)  # x · w.T as two operations takes twenty times as long
        self.all_reduce = ops.AllReduce() if reduce else None

    def construct(self, x: Tensor) -> Tensor:
        """x: [tokens, inputs] → [tokens, outputs]."""
        y = self.matmul(x, self.weight)
        if self.all_reduce is not None:
            y = self.all_reduce(y)
        return y if self.bias is None else y + self.bias


class RmsNorm(nn.Cell):
    def __init__(self, weight: Weight, name: str, eps: float, device: DeviceOps) -> None:
        super().__init__()
        self.weight = _parameter(weight, name + ".weight")
        self.norm = device.rms_norm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight)


class Attention(nn.Cell):
    """Grouped-query attention over the layer's own KV cache; each of `ranks` ranks has some of the heads."""

    def __init__(
        self, config: Glm4Config, weight: Weight, name: str, device: DeviceOps, ranks: int, cache: LayerCache
    ) -> None:
        super().__init__()
        bias, head_dim = config.attention_bias, config.head_dim
        self.q_proj = Linear(weight, name + "q_proj", bias)
        self.k_proj = Linear(weight, name + "k_proj", bias)
        self.v_proj = Linear(weight, name + "v_proj", bias)
        self.o_proj = Linear(weight, name + "o_proj", reduce=ranks > 1)
        self.k_cache = Parameter(cache[0], name=name + "k_cache", requires_grad=False)
        self.v_cache = Parameter(cache[1], name=name + "v_cache", requires_grad=False)
        self.rotary = device.rotary(head_dim)
        _, block_size, kv_heads, _ = cache[0].shape
        self.attend = device.paged_attention(config.num_attention_heads // ranks, kv_heads, head_dim, block_size)

    def construct(self, x: Tensor, angles: Tensors, batch: Tensors) -> Tensor:
        q, k = self.rotary(self.q_proj(x), self.k_proj(x), angles, batch)
        return self.o_proj(self.attend(q, k, self.v_proj(x), self.k_cache, self.v_cache, batch))


class DecoderLayer(nn.Cell):
    """Normalised before *and* after each half; post_attention_layernorm is the MLP's input norm."""

    def __init__(
        self, config: Glm4Config, weight: Weight, name: str, device: DeviceOps, ranks: int, cache: LayerCache
    ) -> None:
        super().__init__()
        self.self_attn = Attention(config, weight, name + "self_attn.", device, ranks, cache)
        self.gate_up_proj = Linear(weight, name + "mlp.gate_up_proj")
        self.swiglu = device.swiglu()
        self.down_proj = Linear(weight, name + "mlp.down_proj", reduce=ranks > 1)
        eps = config.rms_norm_eps
        self.input_layernorm = RmsNorm(weight, name + "input_layernorm", eps, device)
        self.post_self_attn_layernorm = RmsNorm(weight, name + "post_self_attn_layernorm", eps, device)
        self.post_attention_layernorm = RmsNorm(weight, name + "post_attention_layernorm", eps, device)
        self.post_mlp_layernorm = RmsNorm(weight, name + "post_mlp_layernorm", eps, device)

    def construct(self, x: Tensor, angles: Tensors, batch: Tensors) -> Tensor:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), angles, batch))
        gated = self.swiglu(self.gate_up_proj(self.post_attention_layernorm(x)))
        return x + self.post_mlp_layernorm(self.down_proj(gated))


class VocabularyEmbedding(nn.Cell):
    """Each rank has some rows; it gives zeros for the ids of the others, and the ranks' results are added."""

    def __init__(self, weight: Weight, name: str, first_row: int, ranks: int) -> None:
        super().__init__()
        self.weight = _parameter(weight, name + ".weight")
        self.first_row, self.rows = first_row, self.weight.shape[0]
        self.all_reduce = ops.AllReduce() if ranks > 1 else None

    def construct(self, token_ids: Tensor) -> Tensor:
        """token_ids: int32 [tokens] → [tokens, hidden_size]."""
        if self.all_reduce is None:
            return ops.gather(self.weight, token_ids, 0)
        local = token_ids - self.first_row
        mine = ops.logical_and(local >= 0, local < self.rows).astype(mstype.int32)
        found = ops.gather(self.weight, local * mine, 0)
        return self.all_reduce(found * mine.astype(found.dtype).expand_dims(1))


class Glm4ForInference(nn.Cell):
    """The decoder over its own KV cache; `LogitsHead` goes on from what it gives."""

    def __init__(
        self,
        config: Glm4Config,
        weight: Weight,
        device: DeviceOps,
        caches: list[LayerCache],
        first_row: int = 0,
        ranks: int = 1,
    ) -> None:
        """first_row: of the vocabulary, on this one of `ranks` ranks."""
        super().__init__()
        self.embed_tokens = VocabularyEmbedding(weight, "model.embed_tokens", first_row, ranks)
        self.layers = nn.CellList(
            [DecoderLayer(config, weight, f"model.layers.{i}.", device, ranks, cache) for i, cache in enumerate(caches)]
        )
        self.norm = RmsNorm(weight, "model.norm", config.rms_norm_eps, device)
        dtype, row = self.norm.weight.dtype, Tensor(shape=[None], dtype=mstype.int32)
        angles = Tensor(shape=[None, config.head_dim], dtype=dtype)
        tables = Tensor(shape=[None, None], dtype=mstype.int32)
        self.set_inputs(row, angles, angles, row, row, tables, row, row)  # any lengths with one compiled graph

    def construct(
        self,
        token_ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        query_lens: Tensor,
    ) -> Tensor:
        """→ the last layer's normalised hidden states [tokens, hidden_size].

        token_ids: int32 [tokens]; cos, sin: [tokens, head_dim], from `RotaryEmbedding`; the rest, int32, is the batch
        that `ops.mindspore` describes.
        """
        batch = (positions, slots, block_tables, context_lens, query_lens)
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x, (cos, sin), batch)
        return self.norm(x)

    def copy_block(self, source: int, target: int) -> None:
        """Let block `target` of every layer hold what block `source` holds."""
        from_, to = Tensor([source], mstype.int32), Tensor([target], mstype.int32)
        for layer in self.layers:
            for cache in (layer.self_attn.k_cache, layer.self_attn.v_cache):
                ops.scatter_update(cache, to, ops.gather(cache, from_, 0))


class LogitsHead(nn.Cell):
    """Hidden states to logits; each rank has some rows of the vocabulary, and every rank gets all logits."""

    def __init__(
        self, config: Glm4Config, weight: Weight, columns: list[int], ranks: int = 1, tied: Parameter | None = None
    ) -> None:
        """columns: which of all ranks' rows, some of them padding, are the vocabulary's; tied: the embedding's rows,
        where the head has none of its own."""
        super().__init__()
        self.weight = _parameter(weight, "lm_head.weight") if tied is None else tied
        self.ranks = ranks
        padded = len(columns) < ranks * self.weight.shape[0]
        self.columns = Tensor(columns, mstype.int32) if padded else None
        self.matmul = ops.MatMul(transpose_b=True)
        self.all_gather = ops.AllGather() if ranks > 1 else None
        hidden = Tensor(shape=[None, config.hidden_size], dtype=self.weight.dtype)
        self.set_inputs(hidden, Tensor(shape=[None], dtype=mstype.int32))

    def construct(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden: [tokens, hidden_size]; rows: int32 [rows] → float32 [rows, vocab_size]."""
        logits = self.matmul(ops.gather(hidden, rows, 0), self.weight).astype(mstype.float32)
        if self.all_gather is not None:
            shares = self.all_gather(logits).reshape((self.ranks, -1, logits.shape[1]))
            logits = shares.transpose(1, 0, 2).reshape((-1, self.ranks * logits.shape[1]))
        return logits if self.columns is None else ops.gather(logits, self.columns, 1)


def _parameter(weight: Weight, name: str) -> Parameter:
    return Parameter(weight(name), name=name, requires_grad=False)
