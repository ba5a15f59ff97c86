"""GLM-4-0414 as mathematics: the whole sequence at once, no cache. The reference, and what trains the demo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4.model.configuration_glm4 import Glm4Config
from glm4.ops.activation import swiglu
from glm4.ops.norm import rms_norm
from glm4.ops.rotary import apply_rotary, rotary_frequencies, yarn_attention_factor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """cos and sin of every position's angles."""

    frequencies: Tensor

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        rope = config.rope
        self.scale = 1.0
        if rope.yarn:
            self.scale = rope.attention_factor or yarn_attention_factor(rope.factor, rope.mscale, rope.mscale_all_dim)
        frequencies = rotary_frequencies(
            config.rotary_dim,
            rope.theta,
            factor=rope.factor,
            original_max_positions=rope.original_max_position_embeddings if rope.yarn else None,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            truncate=rope.truncate,
        )
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: int64 [tokens] → cos, sin: `dtype` [tokens, rotary_dim/2]; the angles are float32."""
        angles = positions[:, None].float() * self.frequencies.float()
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


class Attention(nn.Module):
    """Causal self-attention in which several query heads share one key/value head."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (proj(x).view(batch, length, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """One matrix holds the gate's rows first, then the up projection's."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    """Normalised before *and* after each half; post_attention_layernorm is the MLP's input norm."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.post_self_attn_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.post_mlp_layernorm = RMSNorm(size, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


class Glm4Model(nn.Module):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: int64 [batch, length] → hidden states [batch, length, hidden_size]."""
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary(torch.arange(input_ids.shape[1], device=input_ids.device), x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Glm4ForCausalLM(nn.Module):
    """The names of the parameters are those of the checkpoint."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.config = config
        self.model = Glm4Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: int64 [batch, length], right padding allowed → logits [batch, length, vocab_size]."""
        return self.lm_head(self.model(input_ids))
