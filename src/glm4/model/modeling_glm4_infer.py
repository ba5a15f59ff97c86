"""GLM-4-0414 for inference: any mix of prompt chunks and single tokens over a paged KV cache.

The same mathematics as `modeling_glm4`, on flat [tokens, hidden] rows and on weights that may be views of a
memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.modeling_glm4 import RotaryEmbedding
from glm4.model.sharding import WHOLE, Shard
from glm4.ops.attention import AttentionBatch, CacheTensor, KVCache
from glm4.ops.fused import (
    add_norm,
    make_native_blocks,
    rms_norm,
    rotary_attention,
    run_native_blocks,
    swiglu,
)
from glm4.ops.linear import Linear, LinearLayer
from glm4.parallel.collectives import ALONE, Collectives


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; names are the checkpoint's."""

    input_layernorm: Tensor
    q_proj: LinearLayer
    k_proj: LinearLayer
    v_proj: LinearLayer
    o_proj: LinearLayer
    post_self_attn_layernorm: Tensor
    post_attention_layernorm: Tensor
    gate_up_proj: LinearLayer
    down_proj: LinearLayer
    post_mlp_layernorm: Tensor

    @property
    def linears(self) -> tuple[LinearLayer, ...]:
        """In the order of their use."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_up_proj, self.down_proj

    def norms(self, following: Tensor) -> tuple[Tensor, ...]:
        """In the order of their use, `following` being that of the next layer; its own first one is not among them."""
        return self.post_self_attn_layernorm, self.post_attention_layernorm, self.post_mlp_layernorm, following


class RowParallel:
    """A linear layer that holds some columns of the weight: its results are summed over ranks."""

    needs_largest: ClassVar[bool] = False

    def __init__(self, layer: LinearLayer, collectives: Collectives) -> None:
        """layer: without a bias, which every rank would add."""
        self._layer, self._collectives = layer, collectives

    def __call__(self, x: Tensor, largest: Tensor | None = None) -> Tensor:
        """x: this rank's inputs, [tokens, inputs] → [tokens, outputs], the same on every rank."""
        if self._layer.needs_largest:
            largest = self._collectives.all_reduce_max(x.abs().amax(-1).float())
        return self._collectives.all_reduce(self._layer(x, largest))


class Glm4ForInference:
    """The model, or one rank's part of it, over its own KV cache."""

    def __init__(
        self,
        config: Glm4Config,
        weight: Callable[[str], Tensor],
        linear: Callable[[str, bool], LinearLayer],
        device: torch.device,
        dtype: torch.dtype,
        shard: Shard = WHOLE,
        collectives: Collectives = ALONE,
    ) -> None:
        """What the checkpoint holds, on the device and in the number format to use; of a shared model, `shard` of it.

        weight(name): the tensor of that name; linear(name, bias): the layer with the weights `name`.weight and, where
        it has one, `name`.bias.
        """
        self.config, self.device, self.dtype = config, device, dtype
        self._shard, self._collectives = shard, collectives
        if shard.is_first or (shard.is_last and config.tie_word_embeddings):
            self.embed_tokens = weight("model.embed_tokens.weight")
        self.layers = [self._layer(f"model.layers.{i}.", weight, linear) for i in shard.layers(config)]
        # A stage hands on its residual stream, so what the norm after its last layer gives is not used.
        self.norm = weight("model.norm.weight") if shard.is_last else self.layers[-1].post_mlp_layernorm
        if shard.is_last:
            self.lm_head = Linear(self.embed_tokens) if config.tie_word_embeddings else linear("lm_head", False)
        self.rotary = RotaryEmbedding(config).to(device)
        self._blocks = make_native_blocks(
            [(layer.linears, layer.norms(norm)) for layer, norm in zip(self.layers, self._next_norms(), strict=True)],
            config.head_dim,
        )

    def _layer(
        self, prefix: str, weight: Callable[[str], Tensor], linear: Callable[[str, bool], LinearLayer]
    ) -> LayerWeights:
        bias = self.config.attention_bias

        def row_parallel(name: str) -> LinearLayer:
            layer = linear(name, False)
            return layer if self._collectives.size == 1 else RowParallel(layer, self._collectives)

        return LayerWeights(
            input_layernorm=weight(prefix + "input_layernorm.weight"),
            q_proj=linear(prefix + "self_attn.q_proj", bias),
            k_proj=linear(prefix + "self_attn.k_proj", bias),
            v_proj=linear(prefix + "self_attn.v_proj", bias),
            o_proj=row_parallel(prefix + "self_attn.o_proj"),
            post_self_attn_layernorm=weight(prefix + "post_self_attn_layernorm.weight"),
            post_attention_layernorm=weight(prefix + "post_attention_layernorm.weight"),
            gate_up_proj=linear(prefix + "mlp.gate_up_proj", False),
            down_proj=row_parallel(prefix + "mlp.down_proj"),
            post_mlp_layernorm=weight(prefix + "post_mlp_layernorm.weight"),
        )

    def _next_norms(self) -> list[Tensor]:
        """For each layer, the norm that comes after it."""
        return [*(layer.input_layernorm for layer in self.layers[1:]), self.norm]

    def new_kv_cache(self, slots: int, dtype: torch.dtype) -> KVCache:
        """Room for the keys and values of `slots` tokens in `dtype` (bfloat16, float32 or int8), not initialised."""

        def empty() -> CacheTensor:
            heads = self._shard.num_kv_heads(self.config)
            return CacheTensor.empty(slots, heads, self.config.head_dim, dtype, self.device)

        return [(empty(), empty()) for _ in self.layers]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kv_cache: KVCache,
        stream: Tensor | None = None,
    ) -> Tensor:
        """token_ids, positions: int64 [tokens] → the last layer's normalised hidden states [tokens, hidden_size].

        Of a model in stages, all but the first take the `stream` that the one before gave instead of token_ids, and
        all but the last give the residual stream.
        """
        x = self._embed(token_ids) if stream is None else stream
        cos, sin = self.rotary(positions, x.dtype)
        eps = self.config.rms_norm_eps
        normed = rms_norm(x, self.layers[0].input_layernorm, eps)
        if self._blocks is not None:
            x, normed = run_native_blocks(self._blocks, x, normed, cos, sin, kv_cache, batch, eps)
            return normed if self._shard.is_last else x
        for layer, next_norm, (k_cache, v_cache) in zip(self.layers, self._next_norms(), kv_cache, strict=True):
            attended = self._attend(layer, normed, cos, sin, batch, k_cache, v_cache)
            x, normed = add_norm(x, attended, layer.post_self_attn_layernorm, layer.post_attention_layernorm, eps)
            gated = swiglu(layer.gate_up_proj(normed))
            x, normed = add_norm(x, layer.down_proj(gated), layer.post_mlp_layernorm, next_norm, eps)
        return normed if self._shard.is_last else x

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self._collectives.size == 1:
            return F.embedding(token_ids, self.embed_tokens)
        first, end = self._shard.vocabulary(self.config)
        here = (token_ids >= first) & (token_ids < end)
        rows = F.embedding((token_ids - first).where(here, 0), self.embed_tokens)
        return self._collectives.all_reduce(rows.where(here[:, None], 0))  # all but one rank add zeros

    def _attend(
        self,
        layer: LayerWeights,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: AttentionBatch,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
    ) -> Tensor:
        tokens, head_dim = x.shape[0], self.config.head_dim
        q, k, v = (proj(x).view(tokens, -1, head_dim) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        return layer.o_proj(rotary_attention(q, k, v, cos, sin, k_cache, v_cache, batch).view(tokens, -1))

    def logits(self, hidden: Tensor) -> Tensor | None:
        """hidden: [rows, hidden_size] → [rows, vocab_size], of its dtype; None on all but the first rank."""
        logits, ranks = self.lm_head(hidden), self._collectives.size
        if ranks == 1:
            return logits
        widths = [end - first for first, end in (self._shard.vocabulary(self.config, rank) for rank in range(ranks))]
        widest = max(widths)
        gathered = self._collectives.gather(F.pad(logits, (0, widest - logits.shape[1])))
        if gathered is None or widest * ranks == self.config.vocab_size:
            return gathered
        parts = gathered.view(len(gathered), ranks, widest).unbind(1)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)
