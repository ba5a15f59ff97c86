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
from glm4.ops.activation import swiglu
from glm4.ops.attention import AttentionBatch, paged_attention
from glm4.ops.linear import Linear
from glm4.ops.norm import rms_norm
from glm4.ops.rotary import apply_rotary


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; names are the checkpoint's."""

    input_layernorm: Tensor
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    post_self_attn_layernorm: Tensor
    post_attention_layernorm: Tensor
    gate_up_proj: Linear
    down_proj: Linear
    post_mlp_layernorm: Tensor


class Glm4ForInference:
    """The model over its own KV cache."""

    def __init__(self, config: Glm4Config, weight: Callable[[str], Tensor]) -> None:
        """`weight(name)` gives the checkpoint's tensor of that name, on the device and in the number format to use."""
        self.config = config
        self.embed_tokens = weight("model.embed_tokens.weight")
        self.layers = [self._layer(f"model.layers.{i}.", weight) for i in range(config.num_hidden_layers)]
        self.norm = weight("model.norm.weight")
        self.lm_head = Linear(self.embed_tokens if config.tie_word_embeddings else weight("lm_head.weight"))
        self.rotary = RotaryEmbedding(config).to(self.embed_tokens.device)

    def _layer(self, prefix: str, weight: Callable[[str], Tensor]) -> LayerWeights:
        bias = self.config.attention_bias

        def qkv(name: str) -> Linear:
            path = f"{prefix}self_attn.{name}."
            return Linear(weight(path + "weight"), weight(path + "bias") if bias else None)

        return LayerWeights(
            input_layernorm=weight(prefix + "input_layernorm.weight"),
            q_proj=qkv("q_proj"),
            k_proj=qkv("k_proj"),
            v_proj=qkv("v_proj"),
            o_proj=Linear(weight(prefix + "self_attn.o_proj.weight")),
            post_self_attn_layernorm=weight(prefix + "post_self_attn_layernorm.weight"),
            post_attention_layernorm=weight(prefix + "post_attention_layernorm.weight"),
            gate_up_proj=Linear(weight(prefix + "mlp.gate_up_proj.weight")),
            down_proj=Linear(weight(prefix + "mlp.down_proj.weight")),
            post_mlp_layernorm=weight(prefix + "post_mlp_layernorm.weight"),
        )

    def new_kv_cache(self, slots: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Per layer the keys and the values of `slots` tokens: [slots, kv_heads, head_dim], not initialised."""
        shape = (slots, self.config.num_key_value_heads, self.config.head_dim)
        device = self.embed_tokens.device
        return [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in self.layers
        ]

    def forward(
        self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch, kv_cache: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """token_ids, positions: int64 [tokens] → the last layer's normalised hidden states [tokens, hidden_size]."""
        x = self.embed_tokens[token_ids]
        cos, sin = self.rotary(positions, x.dtype)
        eps = self.config.rms_norm_eps
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache, strict=True):
            attended = self._attend(layer, rms_norm(x, layer.input_layernorm, eps), cos, sin, batch, k_cache, v_cache)
            x = x + rms_norm(attended, layer.post_self_attn_layernorm, eps)
            gated = swiglu(layer.gate_up_proj(rms_norm(x, layer.post_attention_layernorm, eps)))
            x = x + rms_norm(layer.down_proj(gated), layer.post_mlp_layernorm, eps)
        return rms_norm(x, self.norm, eps)

    def _attend(
        self,
        layer: LayerWeights,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: AttentionBatch,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        tokens, head_dim = x.shape[0], self.config.head_dim
        q, k, v = (proj(x).view(tokens, -1, head_dim) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return layer.o_proj(paged_attention(q, k, v, k_cache, v_cache, batch).view(tokens, -1))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] → float32 [rows, vocab_size]."""
        return self.lm_head(hidden).float()
