"""GLM-4-0414 for inference: any mix of prompt chunks and single tokens over a paged KV cache.

The same mathematics as `modeling_glm4`, on flat [tokens, hidden] rows and on weights that may be views of a
memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.modeling_glm4 import RotaryEmbedding
from glm4.ops.attention import AttentionBatch, CacheTensor, KVCache
from glm4.ops.fused import add_norm, rotary_attention, swiglu
from glm4.ops.linear import Linear, LinearLayer
from glm4.ops.norm import rms_norm


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


class Glm4ForInference:
    """The model over its own KV cache."""

    def __init__(
        self, config: Glm4Config, weight: Callable[[str], Tensor], linear: Callable[[str, bool], LinearLayer]
    ) -> None:
        """What the checkpoint holds, on the device and in the number format to use.

        weight(name): the tensor of that name; linear(name, bias): the layer with the weights `name`.weight and, where
        it has one, `name`.bias.
        """
        self.config = config
        self.embed_tokens = weight("model.embed_tokens.weight")
        self.layers = [self._layer(f"model.layers.{i}.", weight, linear) for i in range(config.num_hidden_layers)]
        self.norm = weight("model.norm.weight")
        self.lm_head = Linear(self.embed_tokens) if config.tie_word_embeddings else linear("lm_head", False)
        self.rotary = RotaryEmbedding(config).to(self.embed_tokens.device)

    def _layer(
        self, prefix: str, weight: Callable[[str], Tensor], linear: Callable[[str, bool], LinearLayer]
    ) -> LayerWeights:
        bias = self.config.attention_bias
        return LayerWeights(
            input_layernorm=weight(prefix + "input_layernorm.weight"),
            q_proj=linear(prefix + "self_attn.q_proj", bias),
            k_proj=linear(prefix + "self_attn.k_proj", bias),
            v_proj=linear(prefix + "self_attn.v_proj", bias),
            o_proj=linear(prefix + "self_attn.o_proj", False),
            post_self_attn_layernorm=weight(prefix + "post_self_attn_layernorm.weight"),
            post_attention_layernorm=weight(prefix + "post_attention_layernorm.weight"),
            gate_up_proj=linear(prefix + "mlp.gate_up_proj", False),
            down_proj=linear(prefix + "mlp.down_proj", False),
            post_mlp_layernorm=weight(prefix + "post_mlp_layernorm.weight"),
        )

    def new_kv_cache(self, slots: int, dtype: torch.dtype) -> KVCache:
        """Room for the keys and values of `slots` tokens in `dtype` (bfloat16, float32 or int8), not initialised."""

        def empty() -> CacheTensor:
            heads, device = self.config.num_key_value_heads, self.embed_tokens.device
            return CacheTensor.empty(slots, heads, self.config.head_dim, dtype, device)

        return [(empty(), empty()) for _ in self.layers]

    def forward(self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch, kv_cache: KVCache) -> Tensor:
        """token_ids, positions: int64 [tokens] → the last layer's normalised hidden states [tokens, hidden_size]."""
        x = self.embed_tokens[token_ids]
        cos, sin = self.rotary(positions, x.dtype)
        eps = self.config.rms_norm_eps
        next_norms = [*(layer.input_layernorm for layer in self.layers[1:]), self.norm]
        normed = rms_norm(x, self.layers[0].input_layernorm, eps)
        for layer, next_norm, (k_cache, v_cache) in zip(self.layers, next_norms, kv_cache, strict=True):
            attended = self._attend(layer, normed, cos, sin, batch, k_cache, v_cache)
            x, normed = add_norm(x, attended, layer.post_self_attn_layernorm, layer.post_attention_layernorm, eps)
            gated = swiglu(layer.gate_up_proj(normed))
            x, normed = add_norm(x, layer.down_proj(gated), layer.post_mlp_layernorm, next_norm, eps)
        return normed

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

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] → float32 [rows, vocab_size]."""
        return self.lm_head(hidden).float()
